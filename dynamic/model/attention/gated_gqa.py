"""Grouped-query attention whose output goes through the sigmoid of a gate, as in Qwen3-Next.

Queries and gates come out of one projection. Shape suffixes as in ``kernels/api/types.py``.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch

from ....kernels.api.types import AttentionBatch, KVLayer, KVProjection
from ....kernels.reference.elementwise import sigmoid
from ....kernels.torch.backend import TorchBackend
from .gqa import GqaSpec
from .kind import AttentionContext, AttentionLayout


@dataclass(frozen=True, kw_only=True)
class GatedGqaSpec(GqaSpec):
    """See :class:`GqaSpec`."""

    kind: ClassVar[str] = "gated_gqa"

    def layout(self, prefix: str, hidden_size: int, available: Container[str]) -> AttentionLayout:
        plain = super().layout(prefix, hidden_size, available)
        qkv, channels = plain.linears["qkv"], range(self.head_dim)
        head = qkv.orders[0] or channels
        # Checkpoints have each head's queries in front of its gate; here all queries are in front of all gates.
        order = tuple(
            2 * self.head_dim * number + first + channel
            for first, own in ((0, head), (self.head_dim, channels))
            for number in range(self.num_heads)
            for channel in own
        )
        joined = replace(qkv, outputs=(2 * self.q_size, *qkv.outputs[1:]), orders=(order, *qkv.orders[1:]))
        return replace(plain, linears={**plain.linears, "qkv": joined})

    def forward(
        self, weights: Any, x_TD: torch.Tensor, kv: KVLayer, batch: AttentionBatch, context: AttentionContext
    ) -> torch.Tensor:
        backend = context.backend
        qkv_TXC = backend.linear(x_TD, weights.qkv).view(x_TD.shape[0], -1, self.head_dim)
        q_THC, gate_THC, kv_TXC = qkv_TXC.split((self.num_heads, self.num_heads, 2 * self.num_kv_heads), 1)
        k_TGC, v_TGC = kv_TXC.chunk(2, 1)
        heads = self.normed((q_THC, k_TGC, v_TGC), (weights.q_norm, weights.k_norm), context)
        q_THC = backend.rope_and_write(*heads, context.cos_sin_LC, batch, kv)
        out_THC = backend.attention(q_THC, kv, batch, scale=self.scale, window=self.window)
        gated_THC = out_THC.float() * sigmoid(gate_THC.float())
        return backend.linear(gated_THC.to(x_TD.dtype).flatten(1), weights.o)

    def part(self, parts: int, part: int) -> Self:
        if parts > 1:
            raise ValueError(f"parallel.tensor={parts}: layers of kind {self.kind!r} are not shared out")
        return self

    def flops(self, hidden_size: int) -> int:
        return super().flops(hidden_size) + 2 * hidden_size * self.q_size

    def projection(self, norm_D: torch.Tensor | None, weights: Any, backend: TorchBackend) -> KVProjection:
        raise ValueError(f"attention of kind {self.kind!r} makes no keys and values for rows that exit early")
