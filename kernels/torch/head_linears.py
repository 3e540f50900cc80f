"""Linear layers that every head has for itself."""

from __future__ import annotations

import torch

from ..api.types import LinearWeights


class HeadLinears:
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
