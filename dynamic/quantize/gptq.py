"""GPTQ (Frantar et al. 2023): round one input after the other; the remaining inputs compensate for the error.

Inputs are taken in the order of their size (act-order). The grids of all groups are fixed before (static groups), so
that groups stay contiguous whatever the order. Shape suffixes as in ``scaling.py``.
"""

from __future__ import annotations

import torch

from ...kernels.api.quantized_weight import QuantizedWeight
from .grid import Int4Grid, full_grid, searched_grid

_BLOCK = 128  # inputs between two updates of all remaining ones
_MOST_DAMPING = 1.0


def gptq_int4(
    weight_BOI: torch.Tensor,
    hessian_BII: torch.Tensor,
    *,
    group: int = 64,
    symmetric: bool = True,
    damping: float = 0.01,
    search: bool = True,
) -> QuantizedWeight:
    """Quantise B layers of one shape at once.

    Arguments:
        weight_BOI: floating, (B, O, I).
        hessian_BII: second moments of the inputs, finite, not all zero; (1, I, I) serves all layers.
        group: inputs per scale: 32, 64 or 128; the last group may be shorter.
        symmetric: the zero point is 8 everywhere.
        damping: share of the mean second moment that is added to each; more where that is not enough to invert.
        search: use the share of each group's range with the smallest error; else the whole range.

    Raises:
        ValueError: for shapes that do not fit, another group, or a Hessian that is not finite or all zero.
    """
    _check(weight_BOI, hessian_BII)
    weight = weight_BOI.float()
    grid = searched_grid(weight, hessian_BII, group, symmetric) if search else full_grid(weight, group, symmetric)
    hessian = hessian_BII.float().clone()
    diagonal_BI = hessian.diagonal(dim1=-2, dim2=-1)
    dead_BI = diagonal_BI == 0  # inputs that were always zero: any weight works, and its own is nearest
    diagonal_BI += dead_BI * diagonal_BI.mean(-1, keepdim=True)
    order_BI = diagonal_BI.argsort(-1, descending=True)
    ordered = hessian.gather(-2, order_BI[:, :, None].expand_as(hessian))
    ordered = ordered.gather(-1, order_BI[:, None, :].expand_as(hessian))
    factor_BII = _inverse_factor(ordered, damping)
    codes_BOI = _round_in_order(weight, grid, order_BI.expand(len(weight), -1), factor_BII)
    return grid.weight(codes_BOI)


def _check(weight_BOI: torch.Tensor, hessian_BII: torch.Tensor) -> None:
    if weight_BOI.dim() != 3 or not weight_BOI.is_floating_point():
        raise ValueError(f"weights must be floating with shape (B, O, I), not {tuple(weight_BOI.shape)}")
    inputs = weight_BOI.shape[-1]
    if hessian_BII.shape not in ((len(weight_BOI), inputs, inputs), (1, inputs, inputs)):
        raise ValueError(f"the Hessian of weights {tuple(weight_BOI.shape)} cannot be {tuple(hessian_BII.shape)}")
    if not bool(hessian_BII.isfinite().all()):
        raise ValueError("a Hessian must be finite")
    if bool((hessian_BII.diagonal(dim1=-2, dim2=-1).sum(-1) <= 0).any()):
        raise ValueError("a Hessian must not be all zero: its layer saw no inputs")


def _inverse_factor(hessian_BII: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper Cholesky factor of the damped inverse."""
    mean_B = hessian_BII.diagonal(dim1=-2, dim2=-1).mean(-1)
    eye_II = torch.eye(hessian_BII.shape[-1], device=hessian_BII.device)
    share = damping
    while True:
        lower, failed_B = torch.linalg.cholesky_ex(hessian_BII + share * mean_B[:, None, None] * eye_II)
        if not bool(failed_B.any()):
            upper, failed_B = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed_B.any()) and bool(upper.isfinite().all()):
                return upper
        if share >= _MOST_DAMPING:
            raise ValueError(f"a Hessian cannot be inverted, not even with damping {share}")
        share = min(_MOST_DAMPING, max(share, 1e-4) * 10)


def _round_in_order(
    weight_BOI: torch.Tensor, grid: Int4Grid, order_BI: torch.Tensor, factor_BII: torch.Tensor
) -> torch.Tensor:
    """Codes, uint8, in the inputs' own order."""
    inputs = weight_BOI.shape[-1]
    index_BOI = order_BI[:, None, :].expand_as(weight_BOI)
    left_BOI = weight_BOI.gather(-1, index_BOI)
    scale_BOI, zero_BOI = (part.gather(-1, index_BOI) for part in grid.per_input(inputs))
    codes_BOI = torch.empty_like(left_BOI)
    for first in range(0, inputs, _BLOCK):
        last = min(first + _BLOCK, inputs)
        block_BOJ = left_BOI[..., first:last]
        errors_BOJ = torch.empty_like(block_BOJ)
        for column in range(last - first):
            at = first + column
            w_BO, scale_BO, zero_BO = block_BOJ[..., column], scale_BOI[..., at], zero_BOI[..., at]
            q_BO = ((w_BO / scale_BO).round() + zero_BO).clamp_(0, 15)
            codes_BOI[..., at] = q_BO
            row_BJ = factor_BII[:, at, at:last]
            error_BO = (w_BO - (q_BO - zero_BO) * scale_BO) / row_BJ[:, :1]
            block_BOJ[..., column:] -= error_BO[..., None] * row_BJ[:, None, :]
            errors_BOJ[..., column] = error_BO
        left_BOI[..., last:] -= errors_BOJ @ factor_BII[:, first:last, last:]
    return torch.empty_like(codes_BOI).scatter_(-1, index_BOI, codes_BOI).to(torch.uint8)
