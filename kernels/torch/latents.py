"""Operations of multi-head latent attention, as a part of the torch backend.

Shape suffixes as in ``kernels/api/types.py``; Z channels of a latent.
"""

from __future__ import annotations

from typing import Protocol

import torch

from ..api.latents import readable
from ..api.types import AttentionBatch, KVLayer, LinearWeights


class _Attends(Protocol):
    dtype: torch.dtype

    def attention(
        self,
        q_THC: torch.Tensor,
        layer: KVLayer,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor: ...


class LatentOperations:
    """What a backend has of them; see :class:`.TorchBackend`."""

    device: torch.device
    dtype: torch.dtype

    def pack_head_linear(self, weight_HOI: torch.Tensor) -> LinearWeights:
        """A weight for each head in this backend's layout."""
        data = weight_HOI.to(self.device, self.dtype).contiguous()
        return LinearWeights.of(weight_HOI.shape[1:], self.dtype, data, data)

    def head_linear(self, x_THI: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
        """``x[:, h] @ weight[h].T`` of every head, (T, H, O). Rows and heads of ``x`` may lie apart."""
        return torch.einsum("thi,hoi->tho", x_THI, weights.data)

    def latent_attention(
        self: _Attends,
        q_THC: torch.Tensor,
        layer: KVLayer,
        batch: AttentionBatch,
        *,
        latent: int,
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor:
        """Attention of all heads over entries of one head, whose latents are the values: (T, H, Z).

        Arguments:
            q_THC: queries, Z channels for the latent in front of those for the key behind it.
            layer: entries, see ``kernels/api/latents.py``.
            latent: Z.
            Others as for :func:`reference.paged_attention`.
        """
        read, places = readable(layer, batch, latent, self.dtype)
        return self.attention(q_THC, read, places, scale=scale, window=window)[..., :latent]
