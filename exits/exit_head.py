"""Exit-head adapters: a light map in front of the shared final norm and LM head, one per exit.

Shape suffixes: D hidden size, J rank of the adapter; ``...`` any leading dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class ExitHeadAdapter(nn.Module):
    """A residual low-rank linear map. It starts as the identity, so that adding one changes nothing.

    Raises:
        ValueError: for a rank that is not between 1 and ``hidden_size``.
    """

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        if not 1 <= rank <= hidden_size:
            raise ValueError(f"adapter rank must be between 1 and hidden_size={hidden_size}, not {rank}")
        self.down_JD = nn.Parameter(torch.empty(rank, hidden_size))
        self.up_DJ = nn.Parameter(torch.zeros(hidden_size, rank))
        self.reset()

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Start as the identity, with a random subspace to learn in."""
        with torch.no_grad():
            self.down_JD.normal_(0, self.down_JD.shape[1] ** -0.5, generator=generator)
            self.up_DJ.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x + up (down x)``, the input of the final norm and the LM head at an exit; ``x`` is (..., D)."""
        return x + F.linear(F.linear(x, self.down_JD.to(x.dtype)), self.up_DJ.to(x.dtype))
