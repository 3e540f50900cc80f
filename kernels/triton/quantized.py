"""Products with quantised weights on a GPU, for dense layers and for experts alike: one kernel.

Rows as they are meet weights that are widened where they are loaded. Rows that were rounded to 8 bits meet codes: int8
in integer tensor cores with int32 sums, e4m3 in those of its own where there are any, else in float16, which holds it.

Shape suffixes are explained in ``types.py``; N outputs, K inputs of a product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

import triton
import triton.language as tl

from ..api.formats import ActivationScheme
from ..api.quantized_weight import QuantizedWeight
from .device import DeviceProperties
from .index import ExpertIndex
from .launch import Launch, cdiv
from .rounding import RoundedRows
from .tiles import (
    dot,
    fp4_to_float16,
    fp8_to_float16,
    gated_activation,
    load_quant_scales,
    load_quant_tile,
    tile_coordinates,
)
from .variants import NoKernelError


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Tiling: rows, outputs and depth of a tile."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@triton.jit
def multiply_tile(
    x_MK, x_scale_M, acc, codes, scales, offsets, outer_scales, outer_offsets, expert, n0, k0, n_size, k_size,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, OUTER_GROUP: tl.constexpr, ROWS: tl.constexpr, NATIVE_FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``acc + x · weights`` for one step along K; scales of whole outputs (GROUP 0) are left to the end.

    Arguments:
        x_scale_M: what the step's share of the rows is scaled by; None for rows as they are (ROWS ``none``).
    """
    middle: tl.constexpr = 8 if FORMAT == "int4" else 16 if FORMAT == "int5" else 32  # pyright: ignore[reportAssignmentType]
    zero: tl.constexpr = middle if offsets is None else 0  # pyright: ignore[reportAssignmentType]
    w_NK = load_quant_tile(codes, expert, n0, k0, n_size, k_size, zero, FORMAT, BLOCK_N, BLOCK_K)
    if ROWS == "none":
        wide_NK = fp8_to_float16(w_NK) if FORMAT == "fp8" else fp4_to_float16(w_NK) if FORMAT == "mxfp4" else w_NK
        wide_NK = wide_NK.to(tl.float32).to(x_MK.dtype)
        if GROUP == 0:
            return dot(x_MK, tl.trans(wide_NK), acc)
        step = dot(x_MK, tl.trans(wide_NK), tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32))
        row_M = tl.sum(x_MK.to(tl.float32), 1)
    elif ROWS == "int8":
        step = tl.dot(x_MK, tl.trans(w_NK), out_dtype=tl.int32).to(tl.float32) * x_scale_M[:, None]
        row_M = tl.sum(x_MK.to(tl.int32), 1).to(tl.float32) * x_scale_M
    else:
        if NATIVE_FP8:
            a_MK, b_NK = x_MK.to(tl.float8e4nv, bitcast=True), w_NK.to(tl.float8e4nv, bitcast=True)
        else:
            a_MK, b_NK = fp8_to_float16(x_MK), fp8_to_float16(w_NK)
        step = dot(a_MK, tl.trans(b_NK), tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)) * x_scale_M[:, None]
        row_M = x_scale_M
    if GROUP == 0:
        return acc + step
    tl.static_assert(GROUP % BLOCK_K == 0)
    scale_N = load_quant_scales(scales, outer_scales, expert, n0, k0, n_size, k_size, GROUP, OUTER_GROUP, BLOCK_N)
    acc += step * scale_N[None, :]
    if offsets is not None:
        offset_N = load_quant_scales(
            offsets, outer_offsets, expert, n0, k0, n_size, k_size, GROUP, OUTER_GROUP, BLOCK_N
        )
        acc += row_M[:, None] * offset_N[None, :]
    return acc


@triton.jit
def quant_gemm_kernel(
    x_ptr, x_scales_ptr, codes_ptr, scales_ptr, offsets_ptr, outer_scales_ptr, outer_offsets_ptr, bias_ptr,
    up_codes_ptr, up_scales_ptr, up_offsets_ptr, up_outer_scales_ptr, up_outer_offsets_ptr, up_bias_ptr,
    weights_ptr, out_ptr, sorted_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr, num_tiles_ptr,
    num_rows, n_size, k_size, stride_x,
    K: tl.constexpr, GATHER: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, OUTER_GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, ROW_GROUP: tl.constexpr, NATIVE_FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """``out = x · weights + bias`` for the rows of one expert per tile; with ``up`` ``act(gate) * up`` of two products.

    Without tables there is one expert and rows are where they are. With them GATHER reads the row of each slot and
    writes in expert order; otherwise rows come in expert order and go to their slots. ``weights_ptr``, if given, are
    the slots' weights on the result (in front of the activation where there is one). ROWS says what rows were rounded
    to; each ROW_GROUP inputs of them then have a scale.
    """
    column_tiles = tl.cdiv(n_size, BLOCK_N)
    row_tiles = tl.cdiv(num_rows, BLOCK_M) if num_tiles_ptr is None else tl.load(num_tiles_ptr)
    tile = tl.program_id(0)
    if tile >= row_tiles * column_tiles:
        return
    row_tile, column_tile = tile_coordinates(tile, row_tiles, column_tiles, GROUP_M)  # pyright: ignore[reportGeneralTypeIssues]
    if num_tiles_ptr is None:
        expert = row_tile * 0
        i_M = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        ok_M = i_M < num_rows
        slot_M = i_M
    else:
        expert = tl.load(tile_expert_ptr + row_tile)
        i_M = tl.load(tile_row_ptr + row_tile) + tl.arange(0, BLOCK_M)
        ok_M = i_M < tl.load(starts_ptr + expert + 1)
        slot_M = tl.load(sorted_ptr + i_M, mask=ok_M, other=0)
    in_M = slot_M // K if GATHER else i_M
    n0 = column_tile * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in tl.range(0, k_size, BLOCK_K):
        k_K = k0 + tl.arange(0, BLOCK_K)
        x_at_MK = x_ptr + in_M.to(tl.int64)[:, None] * stride_x + k_K[None, :]
        x_MK = tl.load(x_at_MK, mask=ok_M[:, None] & (k_K < k_size)[None, :], other=0)
        x_scale_M = None
        if ROWS != "none":
            tl.static_assert(ROW_GROUP % BLOCK_K == 0)
            x_scale_at_M = x_scales_ptr + in_M.to(tl.int64) * tl.cdiv(k_size, ROW_GROUP) + k0 // ROW_GROUP
            x_scale_M = tl.load(x_scale_at_M, mask=ok_M, other=0.0)
        acc = multiply_tile(
            x_MK, x_scale_M, acc, codes_ptr, scales_ptr, offsets_ptr, outer_scales_ptr, outer_offsets_ptr,
            expert, n0, k0, n_size, k_size, FORMAT, GROUP, OUTER_GROUP, ROWS, NATIVE_FP8, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if up_codes_ptr is not None:
            up_acc = multiply_tile(
                x_MK, x_scale_M, up_acc, up_codes_ptr, up_scales_ptr, up_offsets_ptr, up_outer_scales_ptr,
                up_outer_offsets_ptr, expert, n0, k0, n_size, k_size,
                FORMAT, GROUP, OUTER_GROUP, ROWS, NATIVE_FP8, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    if GROUP == 0:
        acc *= load_quant_scales(scales_ptr, None, expert, n0, 0, n_size, k_size, 0, 0, BLOCK_N)[None, :]
        if up_codes_ptr is not None:
            up_acc *= load_quant_scales(up_scales_ptr, None, expert, n0, 0, n_size, k_size, 0, 0, BLOCK_N)[None, :]

    n_N = n0 + tl.arange(0, BLOCK_N)
    ok_N = n_N < n_size
    if up_codes_ptr is not None and weights_ptr is not None:
        weight_M = tl.load(weights_ptr + slot_M, mask=ok_M, other=0.0)
        acc, up_acc = acc * weight_M[:, None], up_acc * weight_M[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + expert * n_size + n_N, mask=ok_N, other=0.0).to(tl.float32)[None, :]
    if up_codes_ptr is not None:
        if up_bias_ptr is not None:
            up_acc += tl.load(up_bias_ptr + expert * n_size + n_N, mask=ok_N, other=0.0).to(tl.float32)[None, :]
        acc = gated_activation(acc, up_acc, ACTIVATION)
    elif weights_ptr is not None:
        acc *= tl.load(weights_ptr + slot_M, mask=ok_M, other=0.0)[:, None]
    out_M = i_M if GATHER else slot_M
    out_at_MN = out_ptr + out_M.to(tl.int64)[:, None] * n_size + n_N[None, :]
    tl.store(out_at_MN, acc.to(out_ptr.dtype.element_ty), mask=ok_M[:, None] & ok_N[None, :])


class WeightKind(NamedTuple):
    """How a quantised weight is kept: all of it that decides what a kernel does with it.

    Arguments:
        format: as the kernel calls it.
        group: inputs that share a scale; 0: all.
        outer_group: inputs that share an outer scale; 0: there are none.
        offsets: whether groups have some.
    """

    format: str
    group: int
    outer_group: int = 0
    offsets: bool = False


@dataclass(frozen=True)
class StoredWeight:
    """A quantised weight as the kernel reads it, all contiguous: uint8 codes; scales and offsets in float32, powers of
    two as their exponents, or in two levels as they are, the outer ones for ``outer_group`` inputs each."""

    format: str
    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None
    group: int
    outputs: int
    inputs: int
    outer_scales: torch.Tensor | None = None
    outer_offsets: torch.Tensor | None = None
    outer_group: int = 0

    @property
    def kind(self) -> WeightKind:
        return WeightKind(self.format, self.group, self.outer_group, self.offsets is not None)


def kernel_form(weight: QuantizedWeight) -> QuantizedWeight:
    """A weight whose scales and offsets are what the kernel reads, so that no launch has to convert them: contiguous
    float32, powers of two or two levels, offsets in place of zero points, a scale for every output. Formats without a
    kernel stay as they are."""
    if weight.format.triton is None:
        return weight
    if weight.outer_scale is not None or weight.scale.dtype == torch.float8_e8m0fnu:
        return replace(weight, **{name: tensor.contiguous() for name, tensor in weight.tensors().items()})
    return QuantizedWeight(
        format=replace(weight.format, offsets=True) if weight.needs_offsets else weight.format,
        data=weight.data.contiguous(),
        scale=weight.scales().contiguous(),
        inputs=weight.inputs,
        group=weight.group,
        offset=weight.offsets().contiguous() if weight.needs_offsets else None,
    )


def store_weight(weight: QuantizedWeight) -> StoredWeight:
    """The kernel's view of a weight in :func:`kernel_form`; nothing is copied.

    Raises:
        NoKernelError: for a format without a kernel.
    """
    name = weight.format.triton
    if name is None:
        raise NoKernelError(f"{weight.format.name} weights")
    assert all(t.is_contiguous() for t in weight.tensors().values())
    exponents = weight.scale.dtype == torch.float8_e8m0fnu
    assert weight.scale.dtype == torch.float32 or exponents or weight.outer_scale is not None
    scale = weight.scale.view(torch.uint8) if exponents else weight.scale
    codes, shape = weight.data.view(torch.uint8), (weight.out_features, weight.in_features)
    outer = (weight.outer_scale, weight.outer_offset, weight.format.outer_group or 0)
    return StoredWeight(name, codes, scale, weight.offset, weight.group or 0, *shape, *outer)


def quant_config(
    num_rows: int, kind: WeightKind, gated: bool, scheme: ActivationScheme, device: DeviceProperties
) -> QuantConfig:
    """Tiling for tiles of about so many rows; a tile is never deeper than a group, which then has one scale for it.

    Arguments:
        scheme: how rows were rounded.
    """
    # Sums of integers come to float32 with every step, so that long steps pay; but two more factors need registers.
    block_k = scheme.group if scheme.kind == "int8" and not kind.group else min(64, kind.group or 64)
    assert block_k is not None
    # A step along K that is scaled before it is added needs a second set of accumulators.
    block_n = 32 if (kind.group or scheme.group) and gated else 64
    # Cutting codes of 5 bits out of their bytes takes registers as well.
    num_warps = 8 if (gated and scheme.kind != "int8") or kind.format == "int5" else 4
    if num_rows > 32:
        if gated and kind.outer_group and device.backend == "hip":
            # Two levels of scales of two matrices: AMD's compiler takes all registers for a tile of 32 outputs.
            return QuantConfig(block_m=64, block_n=16, block_k=block_k, num_warps=4, num_stages=3)
        return QuantConfig(block_m=64, block_n=block_n, block_k=block_k, num_warps=num_warps, num_stages=3)
    stages = 4 if scheme.kind == "fp8" else 3
    return QuantConfig(block_m=16, block_n=block_n, block_k=block_k, num_warps=4, num_stages=stages)


def plan_quant(
    x: torch.Tensor | RoundedRows,
    weight: StoredWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: QuantConfig,
    *,
    up: StoredWeight | None = None,
    up_bias: torch.Tensor | None = None,
    weights_TK: torch.Tensor | None = None,
    index: ExpertIndex | None = None,
    top_k: int = 1,
    gather: bool = False,
    activation: str = "silu",
    native_fp8: bool = False,
) -> Launch:
    """One launch; see :func:`quant_gemm_kernel`. Rows of ``x`` must be contiguous, ``out`` as a whole.

    Arguments:
        native_fp8: whether the device multiplies e4m3.
    """
    rounded = x if isinstance(x, RoundedRows) else None
    rows = x.codes if isinstance(x, RoundedRows) else x
    if index is None:
        tiles = cdiv(rows.shape[0], config.block_m)
        names = ("sorted_ptr", "starts_ptr", "tile_expert_ptr", "tile_row_ptr", "num_tiles_ptr")
        tables: dict[str, Any] = dict.fromkeys(names)
    else:
        assert config.block_m == index.block_m, f"tables have tiles of {index.block_m} rows, not {config.block_m}"
        tiles = index.max_tiles
        tables = index.arguments
    return Launch(
        kernel=quant_gemm_kernel,
        grid=(tiles * cdiv(weight.outputs, config.block_n),),
        args={
            "x_ptr": rows,
            "x_scales_ptr": None if rounded is None else rounded.scales,
            "codes_ptr": weight.codes,
            "scales_ptr": weight.scales,
            "offsets_ptr": weight.offsets,
            "outer_scales_ptr": weight.outer_scales,
            "outer_offsets_ptr": weight.outer_offsets,
            "bias_ptr": bias,
            "up_codes_ptr": None if up is None else up.codes,
            "up_scales_ptr": None if up is None else up.scales,
            "up_offsets_ptr": None if up is None else up.offsets,
            "up_outer_scales_ptr": None if up is None else up.outer_scales,
            "up_outer_offsets_ptr": None if up is None else up.outer_offsets,
            "up_bias_ptr": up_bias,
            "weights_ptr": weights_TK,
            "out_ptr": out,
            **tables,
            "num_rows": rows.shape[0],
            "n_size": weight.outputs,
            "k_size": weight.inputs,
            "stride_x": rows.stride(0),
        },
        constexprs={
            "K": top_k,
            "GATHER": gather,
            "FORMAT": weight.format,
            "GROUP": weight.group,
            "OUTER_GROUP": weight.outer_group,
            "ACTIVATION": activation,
            "ROWS": "none" if rounded is None else rounded.kind,
            "ROW_GROUP": 0 if rounded is None else rounded.group,
            "NATIVE_FP8": native_fp8 and rounded is not None and rounded.kind == "fp8",
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "GROUP_M": 8,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
