"""Attention over a paged cache as an operation: its calls, and the tilings of its kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..api.types import AttentionBatch, KVLayer
from .attention import AttentionConfig, attention_kernel, merge_kernel, plan_attention
from .device import DeviceProperties
from .launch import cdiv, next_power_of_2
from .shapes import Steps, WarmUpShape, meta
from .variants import Call, OpVariant, Planned, Planner, Ranked, Tilings, has_tensor_cores, register

_CONTEXT_STEP = 128


class AttentionProblem(NamedTuple):
    """Sizes of a step's attention.

    Arguments:
        max_context_len: a multiple of ``_CONTEXT_STEP``, so that few problems differ.
        programs_per_tile: sequences times key/value heads. heads: query heads per key/value head.
        narrow: keys and values are kept in 8 bits: half the bytes per stage, and registers to widen them in.
    """

    max_query_len: int
    max_context_len: int
    programs_per_tile: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    narrow: bool = False


@dataclass(frozen=True)
class AttentionCall(Call[torch.Tensor]):
    """Causal attention of a batch, (T, H, C); it fills ``lse_TH`` too. See :func:`reference.paged_attention`."""

    operation = "attention"

    q_THC: torch.Tensor
    layer: KVLayer
    batch: AttentionBatch
    scale: float
    window: int | None = None
    sinks_H: torch.Tensor | None = None
    lse_TH: torch.Tensor | None = None

    def problem(self) -> AttentionProblem:
        num_heads, head_dim = self.q_THC.shape[1:]
        num_kv_heads, batch = self.layer.keys_BGPC.shape[1], self.batch
        return AttentionProblem(
            batch.max_query_len,
            cdiv(batch.max_context_len, _CONTEXT_STEP) * _CONTEXT_STEP,
            batch.num_sequences * num_kv_heads,
            num_heads // num_kv_heads,
            head_dim,
            self.q_THC.dtype,
            self.layer.keys_BGPC.itemsize == 1,
        )

    @classmethod
    def of_layer(
        cls, layer: WarmUpShape, steps: Steps, dtype: torch.dtype, planner: Planner
    ) -> Iterator[AttentionCall]:
        cache = layer.cache(dtype)
        for sequences, query_len, context in steps.batches:
            q_THC = meta(sequences * query_len, layer.num_heads, layer.head_dim, dtype=dtype)
            batch = layer.batch(sequences, query_len, context)
            yield cls(q_THC, cache, batch, layer.head_dim**-0.5, layer.window)


@register
class PagedAttention(OpVariant[AttentionCall, AttentionProblem]):
    """Grouped queries over tiles of the context, which is split where there are few programs."""

    call, name, kernels = AttentionCall, "paged", (attention_kernel, merge_kernel)

    def refuses(self, problem: AttentionProblem, device: DeviceProperties) -> str | None:
        return None if has_tensor_cores(problem.dtype) else f"attention in {problem.dtype}"

    def tilings(self, problem: AttentionProblem, device: DeviceProperties, count: int) -> list[Ranked]:
        return [{"attention": [best_attention(problem, device)]}]

    def plan(self, call: AttentionCall, tilings: Tilings, device: DeviceProperties) -> Planned[torch.Tensor]:
        q_THC = call.q_THC
        out_THC = torch.empty(q_THC.shape, dtype=q_THC.dtype, device=q_THC.device)
        return out_THC, plan_attention(
            q_THC,
            call.layer,
            call.batch,
            out_THC,
            scale=call.scale,
            window=call.window,
            config=tilings["attention"],
            native_fp8=device.has_fp8,
            sinks_H=call.sinks_H,
            lse_TH=call.lse_TH,
        )


def best_attention(problem: AttentionProblem, device: DeviceProperties) -> AttentionConfig:
    """Few rows take small tiles and split the context; many rows take as many as the registers hold."""
    heads, narrow = problem.heads, problem.narrow
    wide_head = problem.head_dim > 128
    if problem.max_query_len * heads <= 64:
        block_q = max(1, next_power_of_2(problem.max_query_len))
        programs = problem.programs_per_tile * cdiv(problem.max_query_len, block_q)
        block_l = 32 if wide_head or device.backend == "hip" else 64
        splits = min(cdiv(problem.max_context_len, 4 * block_l), cdiv(2 * device.num_sms, programs), 64)
        # Powers of two keep the number of compiled variants small.
        splits = next_power_of_2(splits + 1) // 2 if splits > 1 else 1
        stages = 3 if narrow and device.has_tma else 2
        return AttentionConfig(block_q=block_q, block_l=block_l, splits=splits, num_warps=4, num_stages=stages)
    # Ampere multiplies out of registers.
    crowded = wide_head or (narrow and not device.has_tma and device.backend == "cuda")
    rows = 64 if crowded else 128
    return AttentionConfig(
        block_q=max(1, rows // next_power_of_2(heads)),
        block_l=32 if crowded or device.backend == "hip" else 64,
        splits=1,
        num_warps=8 if rows == 128 else 4,
        num_stages=2,
    )
