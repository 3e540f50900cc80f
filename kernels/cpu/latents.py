"""Multi-head latent attention on the C++ kernels: products of every head, and attention over latents in the cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..api.types import AttentionBatch, KVLayer, LinearWeights
from .layout import BLOCK
from .quantized import CpuQuantPacking


class CpuLatentOperations(CpuQuantPacking):
    """See :class:`.LatentOperations`."""

    def pack_head_linear(self, weight_HOI: torch.Tensor) -> LinearWeights:
        # Heads in whole blocks follow each other as the outputs of one layer do.
        blocks_HOI = F.pad(weight_HOI.to(self.dtype), (0, 0, 0, -weight_HOI.shape[1] % BLOCK))
        packed = torch.ops.dynamoe_cpu.pack_linear(self._isa, blocks_HOI.flatten(0, 1).contiguous())
        return LinearWeights.of(weight_HOI.shape[1:], self.dtype, packed, packed)

    def head_linear(self, x_THI: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
        return torch.ops.dynamoe_cpu.head_linear.default(self._isa, x_THI, weights.data, weights.out_features)

    def latent_attention(
        self,
        q_THC: torch.Tensor,
        layer: KVLayer,
        batch: AttentionBatch,
        *,
        latent: int,
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor:
        where = (batch.query_start_S1, batch.context_len_S, batch.block_table_SM)
        return torch.ops.dynamoe_cpu.latent_attention.default(
            self._isa, q_THC, layer.keys_BGPC, *where, scale, window or 0, latent
        )
