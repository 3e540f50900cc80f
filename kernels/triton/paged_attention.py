"""Attention over a paged cache as an operation: its calls, and the tilings of its kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..api.types import AttentionBatch, KVLayer
from .attention import AttentionConfig, attention_kernel, merge_kernel
from .device import DeviceProperties
from .kv import stored_kv, stored_latents
from .launch import Launch, cdiv, next_power_of_2, require_contiguous, require_contiguous_channels
from .shapes import Steps, WarmUpShape, meta
from .variants import Call, OpVariant, Planned, Planner, Ranked, Tilings, has_tensor_cores, register

_CONTEXT_STEP = 128
_LOG2_E = 1.4426950408889634
_MOST_CHANNELS, _MOST_REST = 512, 64  # of a head's values, and of its keys beyond: their tiles fit into registers


class AttentionProblem(NamedTuple):
    """Sizes of a step's attention.

    Arguments:
        max_context_len: a multiple of ``_CONTEXT_STEP``, so that few problems differ.
        programs_per_tile: sequences times key/value heads. heads: query heads per key/value head.
        head_dim: of values. rest: channels of keys beyond these; None: keys and values are tensors of their own.
        narrow: keys and values are kept in 8 bits: half the bytes per stage, and registers to widen them in.
    """

    max_query_len: int
    max_context_len: int
    programs_per_tile: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    narrow: bool = False
    rest: int | None = None


@dataclass(frozen=True)
class AttentionCall(Call[torch.Tensor]):
    """Causal attention of a batch, (T, H, C); it fills ``lse_TH`` too. See :func:`reference.paged_attention`.

    With ``latent`` values are that many of the keys' first channels, and the output is as wide.

    Planning raises ValueError when the channels of an input or the batch's numbers are strided, or keys and values have
    different strides.
    """

    operation = "attention"

    q_THC: torch.Tensor
    layer: KVLayer
    batch: AttentionBatch
    scale: float
    window: int | None = None
    sinks_H: torch.Tensor | None = None
    lse_TH: torch.Tensor | None = None
    softcap: float | None = None
    latent: int | None = None

    def problem(self) -> AttentionProblem:
        num_heads, head_dim = self.q_THC.shape[1:]
        num_kv_heads, batch = self.layer.keys_BGPC.shape[1], self.batch
        return AttentionProblem(
            batch.max_query_len,
            cdiv(batch.max_context_len, _CONTEXT_STEP) * _CONTEXT_STEP,
            batch.num_sequences * num_kv_heads,
            num_heads // num_kv_heads,
            self.latent or head_dim,
            self.q_THC.dtype,
            self.layer.keys_BGPC.itemsize == 1,
            None if self.latent is None else head_dim - self.latent,
        )

    @classmethod
    def of_layer(
        cls, layer: WarmUpShape, steps: Steps, dtype: torch.dtype, planner: Planner
    ) -> Iterator[AttentionCall]:
        cache, sinks_H = layer.cache(dtype), meta(layer.num_heads) if layer.sinks else None
        parts = {"window": layer.window, "softcap": layer.softcap, "latent": layer.latent}
        for sequences, query_len, context in steps.batches:
            q_THC = meta(sequences * query_len, layer.num_heads, layer.head_dim, dtype=dtype)
            batch = layer.batch(sequences, query_len, context)
            yield cls(q_THC, cache, batch, layer.head_dim**-0.5, sinks_H=sinks_H, **parts)


@register
class PagedAttention(OpVariant[AttentionCall, AttentionProblem]):
    """Grouped queries over tiles of the context, which is split where there are few programs."""

    call, name, kernels = AttentionCall, "paged", (attention_kernel, merge_kernel)

    def refuses(self, problem: AttentionProblem, device: DeviceProperties) -> str | None:
        rest = problem.rest or 0
        if problem.head_dim > _MOST_CHANNELS or rest > _MOST_REST:
            return f"attention over heads of {problem.head_dim + rest} channels"
        return None if has_tensor_cores(problem.dtype) else f"attention in {problem.dtype}"

    def tilings(self, problem: AttentionProblem, device: DeviceProperties, count: int) -> list[Ranked]:
        return [{"attention": [best_attention(problem, device)]}]

    def plan(self, call: AttentionCall, tilings: Tilings, device: DeviceProperties) -> Planned[torch.Tensor]:
        q_THC, batch, config = call.q_THC, call.batch, tilings["attention"]
        kv = stored_kv(call.layer) if call.latent is None else stored_latents(call.layer, call.latent)
        require_contiguous_channels(q_THC=q_THC, keys_BGPC=kv.keys, values_BGPC=kv.values)
        require_contiguous(
            cache_index_T=batch.cache_index_T,
            query_start_S1=batch.query_start_S1,
            context_len_S=batch.context_len_S,
            block_table_SM=batch.block_table_SM[:1],  # its rows may lie apart
            sinks_H=call.sinks_H,
            lse_TH=call.lse_TH,
        )
        num_rows, num_heads, _ = q_THC.shape
        head_dim, rest = call.latent or q_THC.shape[2], call.problem().rest
        num_kv_heads, splits = kv.keys.shape[1], config.splits
        heads = num_heads // num_kv_heads
        block_h = min(heads, config.block_h)
        rest_strides = (0, 0, 0) if kv.rest is None else kv.rest.stride()[:3]
        scale, cap = float(call.scale) * _LOG2_E, (call.softcap or 0.0) * _LOG2_E
        if call.softcap is not None:
            scale *= 2 / call.softcap
        out_THC = torch.empty((*q_THC.shape[:2], head_dim), dtype=q_THC.dtype, device=q_THC.device)
        outputs: dict[str, torch.Tensor | None] = {
            "out_ptr": out_THC,
            "part_ptr": None,
            "part_max_ptr": None,
            "part_sum_ptr": None,
        }
        if splits > 1:
            for name, size in (("part_ptr", (head_dim,)), ("part_max_ptr", ()), ("part_sum_ptr", ())):
                outputs[name] = q_THC.new_empty(splits, num_rows, num_heads, *size, dtype=torch.float32)
        # Of the kernel that writes the output.
        last = {"sinks_ptr": call.sinks_H, "lse_ptr": call.lse_TH}
        last_flags = {"SINKS": call.sinks_H is not None, "LSE": call.lse_TH is not None}
        sizes = {"C": head_dim, "C_PAD": max(16, next_power_of_2(head_dim)), "SPLITS": splits}
        launch = Launch(
            kernel=attention_kernel,
            grid=(
                cdiv(batch.max_query_len, config.block_q),
                batch.num_sequences * num_kv_heads * cdiv(heads, block_h),
                splits,
            ),
            args={
                "q_ptr": q_THC,
                **kv.arguments,
                "rest_ptr": kv.rest,
                **dict(zip(("rest_b", "rest_g", "rest_p"), rest_strides, strict=True)),
                **outputs,
                **(last if splits == 1 else dict.fromkeys(last)),
                "cache_index_ptr": batch.cache_index_T,
                "query_start_ptr": batch.query_start_S1,
                "context_len_ptr": batch.context_len_S,
                "block_table_ptr": batch.block_table_SM,
                "log2_scale": scale,
                "log2_cap": cap,
                "window": call.window or 0,
                "num_rows": num_rows,
                "q_stride_t": q_THC.stride(0),
                "q_stride_h": q_THC.stride(1),
                "table_stride": batch.block_table_SM.stride(0),
            },
            constexprs={
                **sizes,
                **(last_flags if splits == 1 else dict.fromkeys(last_flags, False)),
                "G": num_kv_heads,
                "HEADS": heads,
                "PAGE": call.layer.page_size,
                "REST": rest or 0,
                "REST_PAD": max(16, next_power_of_2(rest or 0)),
                "REST_AT": kv.rest_at,
                "SCALE_AT": kv.scale_at,
                "BLOCK_Q": config.block_q,
                "BLOCK_H": block_h,
                "BLOCK_M": max(16, next_power_of_2(config.block_q * block_h)),
                "BLOCK_L": config.block_l,
                "WINDOW": call.window is not None,
                "CAPPED": call.softcap is not None,
                "SHARED": rest is not None,
                "FORMAT": kv.format,
                "NATIVE_FP8": device.has_fp8 and kv.format == "fp8",
            },
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if splits == 1:
            return out_THC, [launch]
        merge = Launch(
            kernel=merge_kernel,
            grid=(num_rows * num_heads,),
            args={**outputs, **last, "num_items": num_rows * num_heads},
            constexprs={**sizes, **last_flags, "HEADS": num_heads, "SPLITS_PAD": next_power_of_2(splits)},
            num_warps=max(2, min(8, sizes["C_PAD"] * next_power_of_2(splits) // 4096)),
        )
        return out_THC, [launch, merge]


def best_attention(problem: AttentionProblem, device: DeviceProperties) -> AttentionConfig:
    """Few rows take small tiles and split the context; many rows take as many as the registers hold."""
    heads, narrow = problem.heads, problem.narrow
    if problem.head_dim > 256:
        return _best_of_widest(problem, device)
    wide_head = problem.head_dim > 128
    warps = 8 if wide_head and device.backend == "cuda" else 4
    if problem.max_query_len * heads <= 64:
        block_q = max(1, next_power_of_2(problem.max_query_len))
        programs = problem.programs_per_tile * cdiv(problem.max_query_len, block_q)
        block_l = 32 if wide_head or device.backend == "hip" else 64
        splits = _splits(problem, device, programs, block_l)
        stages = 3 if narrow and device.has_tma else 2
        return AttentionConfig(block_q=block_q, block_l=block_l, splits=splits, num_warps=warps, num_stages=stages)
    # Ampere multiplies out of registers.
    crowded = wide_head or (narrow and not device.has_tma and device.backend == "cuda")
    rows = 64 if crowded else 128
    return AttentionConfig(
        block_q=max(1, rows // next_power_of_2(heads)),
        block_l=32 if crowded or device.backend == "hip" else 64,
        splits=1,
        num_warps=8 if rows == 128 else warps,
        num_stages=2,
        block_h=rows,
    )


def _best_of_widest(problem: AttentionProblem, device: DeviceProperties) -> AttentionConfig:
    """Of heads whose output alone fills many registers: few rows, with more warps."""
    hip, narrow = device.backend == "hip", problem.narrow
    most = 16 if hip and narrow else 64 if device.has_tma and not narrow else 32
    block_h = min(problem.heads, most)
    block_q = min(next_power_of_2(problem.max_query_len), max(1, most // next_power_of_2(block_h)))
    tiles = cdiv(problem.heads, block_h) * cdiv(problem.max_query_len, block_q)
    rows = block_q * next_power_of_2(block_h)
    widened = narrow and rows <= 16  # codes on their way to products
    # Tiles of 64 rows leave room for a longer tile of keys where these are the values.
    block_l = 16 if hip or widened or (rows == 64 and problem.rest is None) else 32
    return AttentionConfig(
        block_q=block_q,
        block_l=block_l,
        splits=_splits(problem, device, problem.programs_per_tile * tiles, block_l),
        num_warps=4 if widened and not hip else 8,
        num_stages=2,
        block_h=block_h,
    )


def _splits(problem: AttentionProblem, device: DeviceProperties, programs: int, block_l: int) -> int:
    """Parts of the context that fill the device; powers of two keep the number of compiled variants small."""
    splits = min(cdiv(problem.max_context_len, 4 * block_l), cdiv(2 * device.num_sms, programs), 64)
    return next_power_of_2(splits + 1) // 2 if splits > 1 else 1
