"""Grids of int4 weights: a scale and a zero point for each output and group of inputs, and their range.

Shape suffixes as in ``scaling.py``; G groups of inputs, the last one may be shorter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...kernels.api.codes import pack_int4
from ...kernels.api.formats import INT4
from ...kernels.api.quantized_weight import QuantizedWeight
from ...kernels.api.rounding import int4_grid

_SHRINKS = tuple(1 - 0.05 * step for step in range(10))  # shares of a group's range, from all of it to 55 %


@dataclass(frozen=True, kw_only=True)
class Int4Grid:
    """The representable weights: ``(q - zero) · scale`` for q in 0 … 15.

    Arguments:
        scale_BOG: float32, above zero.
        zero_BOG: float32 whole numbers 0 … 15.
        group: inputs that share a scale.
        symmetric: every zero point is 8.
    """

    scale_BOG: torch.Tensor
    zero_BOG: torch.Tensor
    group: int
    symmetric: bool

    def per_input(self, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of every weight, (B, O, I) each."""
        scale, zero = (t.repeat_interleave(self.group, -1)[..., :inputs] for t in (self.scale_BOG, self.zero_BOG))
        return scale, zero

    def nearest(self, weight_BOI: torch.Tensor) -> torch.Tensor:
        """Codes of the nearest points, uint8."""
        scale, zero = self.per_input(weight_BOI.shape[-1])
        return ((weight_BOI / scale).round() + zero).clamp(0, 15).to(torch.uint8)

    def values(self, codes_BOI: torch.Tensor) -> torch.Tensor:
        """The dequantised weights of codes, float32."""
        scale, zero = self.per_input(codes_BOI.shape[-1])
        return (codes_BOI.float() - zero) * scale

    def weight(self, codes_BOI: torch.Tensor) -> QuantizedWeight:
        """Codes packed into the format that the kernels read."""
        return QuantizedWeight(
            format=INT4,
            data=pack_int4(codes_BOI),
            scale=self.scale_BOG,
            inputs=codes_BOI.shape[-1],
            group=self.group,
            zero=None if self.symmetric else self.zero_BOG.to(torch.uint8),
        )


def full_grid(weight_BOI: torch.Tensor, group: int, symmetric: bool, shrink: float = 1.0) -> Int4Grid:
    """The grid over the whole range of each group, as :func:`.rounding.quantize_int4` takes it.

    Arguments:
        weight_BOI: float32.
        group: 32, 64 or 128.
        shrink: share of the range that is kept; values outside are clipped.

    Raises:
        ValueError: for another group.
    """
    scale, zero = int4_grid(weight_BOI, group, symmetric, shrink)
    return Int4Grid(scale_BOG=scale, zero_BOG=zero, group=group, symmetric=symmetric)


def searched_grid(weight_BOI: torch.Tensor, hessian_BII: torch.Tensor, group: int, symmetric: bool) -> Int4Grid:
    """For every group the share of its range that changes the layer's output least when rounding to nearest.

    What other groups add to the output counts as independent.

    Arguments:
        weight_BOI: float32.
        hessian_BII: second moments of the inputs, float32, or (1, I, I) for all layers.
    """
    inputs = weight_BOI.shape[-1]
    blocks_BGJJ = _diagonal_blocks(hessian_BII, group)
    best = full_grid(weight_BOI, group, symmetric)
    least_BOG = torch.full_like(best.scale_BOG, float("inf"))
    scale_BOG, zero_BOG = best.scale_BOG, best.zero_BOG
    for shrink in _SHRINKS:
        grid = full_grid(weight_BOI, group, symmetric, shrink)
        error_BOI = grid.values(grid.nearest(weight_BOI)) - weight_BOI
        error_BOGJ = F.pad(error_BOI, (0, -inputs % group)).unflatten(-1, (-1, group))
        moved_BGOJ = error_BOGJ.transpose(1, 2) @ blocks_BGJJ
        cost_BOG = (moved_BGOJ.transpose(1, 2) * error_BOGJ).sum(-1)
        better = cost_BOG < least_BOG
        least_BOG = torch.where(better, cost_BOG, least_BOG)
        scale_BOG = torch.where(better, grid.scale_BOG, scale_BOG)
        zero_BOG = torch.where(better, grid.zero_BOG, zero_BOG)
    return Int4Grid(scale_BOG=scale_BOG, zero_BOG=zero_BOG, group=group, symmetric=symmetric)


def _diagonal_blocks(hessian_BII: torch.Tensor, group: int) -> torch.Tensor:
    """(B, I, I) → (B, G, group, group), zeros beyond the last input."""
    more = -hessian_BII.shape[-1] % group
    padded = F.pad(hessian_BII, (0, more, 0, more)).unflatten(-1, (-1, group)).unflatten(-3, (-1, group))
    return padded.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
