"""Row-wise operations around the matrix products: RMS norm, residual add with norm, rotation with cache write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

import triton
import triton.language as tl

from ..api.types import AttentionBatch, KVLayer
from .device import DeviceProperties
from .kv import store_heads, stored_kv
from .launch import Launch, next_power_of_2, require_contiguous, require_contiguous_channels
from .shapes import Steps, WarmUpShape, meta
from .variants import Call, OpVariant, Planned, Planner, RowProblem, Tilings, register

Normed = tuple[torch.Tensor, torch.Tensor | None]


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, stride_x, width, eps, scale, D_PAD: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """Norm of a row, or of ``residual + scale * x``, which then goes to ``sum``. Rounds where the oracle rounds.

    The sum has the residual's dtype, the norm the weight's.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D_PAD)
    ok_D = d < width
    dtype: tl.constexpr = x_ptr.dtype.element_ty if residual_ptr is None else residual_ptr.dtype.element_ty
    x_D = tl.load(x_ptr + row * stride_x + d, mask=ok_D, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        if SCALED:
            x_D = (x_D * scale).to(dtype).to(tl.float32)
        x_D += tl.load(residual_ptr + row * width + d, mask=ok_D, other=0.0).to(tl.float32)
        sum_D = x_D.to(dtype)
        tl.store(sum_ptr + row * width + d, sum_D, mask=ok_D)
        x_D = sum_D.to(tl.float32)
    normed_D = (x_D * tl.rsqrt(tl.sum(x_D * x_D, axis=0) / width + eps)).to(dtype).to(tl.float32)
    weight_D = tl.load(weight_ptr + d, mask=ok_D, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + d, (weight_D * normed_D).to(out_ptr.dtype.element_ty), mask=ok_D)


@triton.jit
def rope_and_write_kernel(
    q_ptr, k_ptr, v_ptr, q_out_ptr, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr,
    cos_sin_ptr, positions_ptr, slots_ptr,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    stride_b, stride_g, stride_p, scale_b, scale_g, scale_p, cos_sin_stride,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, PAGE: tl.constexpr,
    H_PAD: tl.constexpr, G_PAD: tl.constexpr, HALF_PAD: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """One row: rotate its queries and keys (half-split layout), write its keys and values to their slot."""
    row = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = C // 2
    i = tl.arange(0, HALF_PAD)
    ok = i < HALF
    table = cos_sin_ptr + tl.load(positions_ptr + row) * cos_sin_stride
    cos = tl.load(table + i, mask=ok, other=0.0)[None, :]
    sin = tl.load(table + HALF + i, mask=ok, other=0.0)[None, :]

    h = tl.arange(0, H_PAD)
    ok_HC = (h < H)[:, None] & ok[None, :]
    q_at = q_ptr + row * q_stride_t + h[:, None] * q_stride_h + i[None, :]
    a = tl.load(q_at, mask=ok_HC, other=0.0).to(tl.float32)
    b = tl.load(q_at + HALF, mask=ok_HC, other=0.0).to(tl.float32)
    out_at = q_out_ptr + (row * H + h)[:, None] * C + i[None, :]
    tl.store(out_at, (a * cos - b * sin).to(q_out_ptr.dtype.element_ty), mask=ok_HC)
    tl.store(out_at + HALF, (b * cos + a * sin).to(q_out_ptr.dtype.element_ty), mask=ok_HC)

    slot = tl.load(slots_ptr + row)
    page, inside = slot // PAGE, slot % PAGE
    g = tl.arange(0, G_PAD)
    ok_G = g < G
    ok_GC = ok_G[:, None] & ok[None, :]
    at_GC = (page * stride_b + inside * stride_p + g * stride_g)[:, None] + i[None, :]
    scale_at_G = page * scale_b + inside * scale_p + g * scale_g
    k_at = k_ptr + row * k_stride_t + g[:, None] * k_stride_h + i[None, :]
    a = tl.load(k_at, mask=ok_GC, other=0.0).to(tl.float32)
    b = tl.load(k_at + HALF, mask=ok_GC, other=0.0).to(tl.float32)
    # The cache may be narrower than the model: keys round to the model's dtype first, as the oracle does.
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    rotated = (a * cos - b * sin).to(dtype)
    store_heads(
        keys_ptr, key_scales_ptr, at_GC, scale_at_G, rotated, (b * cos + a * sin).to(dtype), ok_GC, ok_G, HALF, FORMAT
    )
    v_at = v_ptr + row * v_stride_t + g[:, None] * v_stride_h + i[None, :]
    a = tl.load(v_at, mask=ok_GC, other=0.0)
    b = tl.load(v_at + HALF, mask=ok_GC, other=0.0)
    store_heads(values_ptr, value_scales_ptr, at_GC, scale_at_G, a, b, ok_GC, ok_G, HALF, FORMAT)


@dataclass(frozen=True)
class NormCall(Call[Normed]):
    """The norm of ``x`` in the weight's dtype; with a residual that of ``residual + scale * x``, and this sum.

    Rows of x may be strided; planning raises ValueError when their elements are.
    """

    operation = "rms_norm"

    x_TD: torch.Tensor
    weight_D: torch.Tensor
    eps: float
    residual_TD: torch.Tensor | None = None
    scale: float = 1.0

    def problem(self) -> RowProblem:
        return RowProblem.of(self.x_TD)

    @classmethod
    def of_layer(cls, layer: WarmUpShape, steps: Steps, dtype: torch.dtype, planner: Planner) -> Iterator[NormCall]:
        for tokens in steps.tokens:
            x_TD = meta(tokens, layer.hidden_size, dtype=dtype)
            for residual_TD in (x_TD, x_TD.float()):
                yield cls(residual_TD, x_TD[0], 1e-6)
                for scale in (1.0, 0.5):
                    yield cls(x_TD, x_TD[0], 1e-6, residual_TD, scale)
            for width in layer.norm_widths:
                rows_TC = meta(tokens, width, dtype=dtype)
                yield cls(rows_TC, rows_TC[0], 1e-6)


@register
class RowNorm(OpVariant[NormCall, RowProblem]):
    """A program per row, which holds it whole."""

    call, name, kernels = NormCall, "rows", (rms_norm_kernel,)

    def plan(self, call: NormCall, tilings: Tilings, device: DeviceProperties) -> Planned[Normed]:
        x_TD, weight_D, residual_TD = call.x_TD, call.weight_D, call.residual_TD
        require_contiguous(residual_TD=residual_TD, weight_D=weight_D)
        num_rows, width = x_TD.shape
        if x_TD.stride(1) != 1:
            raise ValueError(f"x_TD must have contiguous rows; its strides are {x_TD.stride()}")
        out_TD = torch.empty(x_TD.shape, dtype=weight_D.dtype, device=x_TD.device)
        sum_TD = None if residual_TD is None else torch.empty_like(residual_TD)
        d_pad = next_power_of_2(width)
        launch = Launch(
            kernel=rms_norm_kernel,
            grid=(num_rows,),
            args={
                "x_ptr": x_TD,
                "residual_ptr": residual_TD,
                "weight_ptr": weight_D,
                "out_ptr": out_TD,
                "sum_ptr": sum_TD,
                "stride_x": x_TD.stride(0),
                "width": width,
                "eps": float(call.eps),
                "scale": float(call.scale),
            },
            constexprs={"D_PAD": d_pad, "SCALED": call.scale != 1.0},
            num_warps=max(1, min(16, d_pad // 256)),
        )
        return (out_TD, sum_TD), [launch]


@dataclass(frozen=True)
class RopeCall(Call[torch.Tensor]):
    """The rotated queries; rotated keys, and values, go to the rows' slots. Heads and rows may be strided.

    Planning raises ValueError when the channels of an input are strided, positions or slots are, or keys and values
    have different strides.
    """

    operation = "rope_and_write"

    q_THC: torch.Tensor
    k_TGC: torch.Tensor
    v_TGC: torch.Tensor
    cos_sin_LC: torch.Tensor
    batch: AttentionBatch
    layer: KVLayer

    def problem(self) -> RowProblem:
        return RowProblem.of(self.q_THC)

    @classmethod
    def of_layer(cls, layer: WarmUpShape, steps: Steps, dtype: torch.dtype, planner: Planner) -> Iterator[RopeCall]:
        if layer.latent is not None:
            return
        h, g, c = layer.num_heads, layer.num_kv_heads, layer.head_dim
        cache, table = layer.cache(dtype), meta(layer.max_context, layer.head_dim)
        for sequences, query_len, context in steps.batches:
            rows = sequences * query_len
            q_TX, k_TX, v_TX = meta(rows, (h + 2 * g) * c, dtype=dtype).split((h * c, g * c, g * c), -1)
            batch = layer.batch(sequences, query_len, context)
            yield cls(q_TX.view(rows, h, c), k_TX.view(rows, g, c), v_TX.view(rows, g, c), table, batch, cache)
        # Rows that exit write keys and values of the layers that they skip; there keys stand in for queries.
        for tokens in steps.tokens if layer.probes else ():
            k_TGC, v_TGC = (part.unflatten(-1, (g, c)) for part in meta(tokens, 2 * g * c, dtype=dtype).chunk(2, -1))
            for keys in (k_TGC, meta(tokens, g, c, dtype=dtype)):
                yield cls(keys, keys, v_TGC, table, layer.batch(1, tokens, tokens), cache)


@register
class RowRope(OpVariant[RopeCall, RowProblem]):
    """A program per row, for all its heads."""

    call, name, kernels = RopeCall, "rows", (rope_and_write_kernel,)

    def plan(self, call: RopeCall, tilings: Tilings, device: DeviceProperties) -> Planned[torch.Tensor]:
        q_THC, k_TGC, v_TGC, cos_sin_LC, batch = call.q_THC, call.k_TGC, call.v_TGC, call.cos_sin_LC, call.batch
        kv = stored_kv(call.layer)
        require_contiguous(positions_T=batch.positions_T, slots_T=batch.slots_T)
        require_contiguous_channels(
            q_THC=q_THC, k_TGC=k_TGC, v_TGC=v_TGC, cos_sin_LC=cos_sin_LC, keys_BGPC=kv.keys, values_BGPC=kv.values
        )
        num_rows, num_heads, head_dim = q_THC.shape
        num_kv_heads = k_TGC.shape[1]
        out_THC = torch.empty(q_THC.shape, dtype=q_THC.dtype, device=q_THC.device)
        launch = Launch(
            kernel=rope_and_write_kernel,
            grid=(num_rows,),
            args={
                "q_ptr": q_THC,
                "k_ptr": k_TGC,
                "v_ptr": v_TGC,
                "q_out_ptr": out_THC,
                "cos_sin_ptr": cos_sin_LC,
                "positions_ptr": batch.positions_T,
                "slots_ptr": batch.slots_T,
                "q_stride_t": q_THC.stride(0),
                "q_stride_h": q_THC.stride(1),
                "k_stride_t": k_TGC.stride(0),
                "k_stride_h": k_TGC.stride(1),
                "v_stride_t": v_TGC.stride(0),
                "v_stride_h": v_TGC.stride(1),
                **kv.arguments,
                "cos_sin_stride": cos_sin_LC.stride(0),
            },
            constexprs={
                "H": num_heads,
                "G": num_kv_heads,
                "C": head_dim,
                "PAGE": call.layer.page_size,
                "H_PAD": next_power_of_2(num_heads),
                "G_PAD": next_power_of_2(num_kv_heads),
                "HALF_PAD": next_power_of_2(head_dim // 2),
                "FORMAT": kv.format,
            },
            num_warps=8 if head_dim > 128 else 4,
        )
        return out_THC, [launch]
