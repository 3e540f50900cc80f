"""Statistics of linear layers' inputs on the calibration text: second moments and sizes.

Shape suffixes: B layers of one shape that are treated alike (experts, or a single one), O outputs, I inputs, T rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """Statistics of the inputs of B layers.

    Arguments:
        hessian_BII: float32, mean over rows of x xᵀ: half the Hessian of a layer's squared output error.
        mean_abs_BI, max_abs_BI: float32, of each input's absolute value.
        rows_B: int64, how many rows were seen.
    """

    hessian_BII: torch.Tensor
    mean_abs_BI: torch.Tensor
    max_abs_BI: torch.Tensor
    rows_B: torch.Tensor

    @classmethod
    def of(cls, rows: Sequence[torch.Tensor]) -> Self:
        """From each layer's inputs, (T, I), any floating dtype; T differs from layer to layer and may be 0."""
        wide = [part.float() for part in rows]
        return cls(
            hessian_BII=torch.stack([x_TI.T @ x_TI / max(1, len(x_TI)) for x_TI in wide]),
            mean_abs_BI=torch.stack([x_TI.abs().sum(0) / max(1, len(x_TI)) for x_TI in wide]),
            max_abs_BI=torch.stack(
                [x_TI.abs().amax(0) if len(x_TI) else x_TI.new_zeros(x_TI.shape[1]) for x_TI in wide]
            ),
            rows_B=torch.tensor([len(x_TI) for x_TI in wide]),
        )

    @property
    def usable_B(self) -> torch.Tensor:
        """Whether there are rows to calibrate on: some, finite, not all zero."""
        return self.hessian_BII.isfinite().all(-1).all(-1) & (self.hessian_BII.diagonal(dim1=-2, dim2=-1).sum(-1) > 0)


def output_error(error_BOI: torch.Tensor, hessian_BII: torch.Tensor) -> torch.Tensor:
    """Mean squared change of each layer's output, summed over outputs, when its weight changes: (B)."""
    return ((error_BOI @ hessian_BII) * error_BOI).sum((-1, -2))
