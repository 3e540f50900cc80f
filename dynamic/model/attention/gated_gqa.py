"""Grouped-query attention whose output goes through the sigmoid of a gate, as in Qwen3-Next.

Queries and gates come out of one projection. Shape suffixes as in ``kernels/api/types.py``.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ....kernels.api.stack import StackBlock
from ....kernels.api.types import AttentionBatch, KVLayer, KVProjection, LinearWeights
from ....kernels.reference.elementwise import sigmoid
from ....kernels.torch.backend import TorchBackend
from .gqa import GqaSpec, GqaWeights
from .kind import AttentionContext, AttentionLayout


@dataclass(frozen=True, kw_only=True)
class GatedGqaWeights(GqaWeights):
    """See :class:`GqaWeights`; the projection has as many gates as queries."""

    @property
    def propagated_bytes(self) -> int:
        return self.qkv.nbytes * (self.qkv.out_features - 2 * self.o.in_features) // self.qkv.out_features


@dataclass(frozen=True, kw_only=True)
class GatedGqaSpec(GqaSpec):
    """See :class:`GqaSpec`."""

    kind: ClassVar[str] = "gated_gqa"

    def layout(self, prefix: str, hidden_size: int, available: Container[str]) -> AttentionLayout:
        plain = super().layout(prefix, hidden_size, available)
        qkv = plain.linears["qkv"]
        order = (*qkv.orders[0], *range(self.head_dim, 2 * self.head_dim)) if qkv.orders[0] else ()
        joined = replace(qkv, outputs=(2 * self.q_size, *qkv.outputs[1:]), orders=(order, *qkv.orders[1:]))
        return replace(plain, linears={**plain.linears, "qkv": joined})

    def weights(self, parts: Mapping[str, LinearWeights | torch.Tensor]) -> GatedGqaWeights:
        return GatedGqaWeights(**parts)  # type: ignore[arg-type]

    @property
    def rows_per_head(self) -> tuple[int, int]:
        return 2 * self.head_dim, self.head_dim

    def forward(
        self, weights: Any, x_TD: torch.Tensor, kv: KVLayer, batch: AttentionBatch, context: AttentionContext
    ) -> torch.Tensor:
        backend = context.backend
        qkv_TXC = backend.linear(x_TD, weights.qkv).view(x_TD.shape[0], -1, self.head_dim)
        q_TXC, kv_TXC = qkv_TXC.split((2 * self.num_heads, 2 * self.num_kv_heads), 1)
        # Each head's queries lie in front of its gate, as in checkpoints.
        q_THC, gate_THC = q_TXC[:, ::2].contiguous(), q_TXC[:, 1::2]
        k_TGC, v_TGC = kv_TXC.chunk(2, 1)
        heads = self.normed((q_THC, k_TGC, v_TGC), (weights.q_norm, weights.k_norm), context)
        q_THC = backend.rope_and_write(*heads, context.cos_sin_LC, batch, kv)
        out_THC = backend.attention(q_THC, kv, batch, scale=self.scale, window=self.window)
        gated_THC = out_THC.float() * sigmoid(gate_THC.float())
        return backend.linear(gated_THC.to(x_TD.dtype).flatten(1), weights.o)

    def stack_block(self, weights: Any) -> StackBlock:
        if type(self) is not GatedGqaSpec:
            return super().stack_block(weights)
        return self.stack_parts(weights, gated_queries=True)

    def flops(self, hidden_size: int) -> int:
        return super().flops(hidden_size) + 2 * hidden_size * self.q_size

    def projection(self, norm_D: torch.Tensor | None, weights: Any, backend: TorchBackend) -> KVProjection:
        kv = backend.linear_tail(weights.qkv, 2 * self.q_size)
        return KVProjection(norm_D=norm_D, kv=kv, k_norm=weights.k_norm)
