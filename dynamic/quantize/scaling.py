"""Statistics of linear layers' inputs on the calibration text, and scales between activations and weights that follow
from them: AWQ (Lin et al. 2024), SmoothQuant (Xiao et al. 2023).

An input is divided by its scale, its weights are multiplied by it, so full precision is unchanged.

Shape suffixes: B layers of one shape that are treated alike (experts, or a single one), O outputs, I inputs, T rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch

_EXPONENTS = tuple(step / 20 for step in range(20))
_SMALLEST = 1e-4


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


@dataclass(frozen=True, kw_only=True)
class ScaledLayers:
    """Layers whose inputs the searched scale divides.

    Arguments:
        weight_BOI: float32.
        statistics: of their inputs, of B layers or of one that serves all.
    """

    weight_BOI: torch.Tensor
    statistics: InputStatistics


def awq_scale(
    layers: Sequence[ScaledLayers], mean_abs_I: torch.Tensor, rounded: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The power of the inputs' mean size with the smallest error of the layers' outputs; one scale for all layers.

    Arguments:
        layers: all that read these inputs.
        mean_abs_I: mean absolute value of the inputs, float32.
        rounded: a weight (B, O, I) after quantisation, dequantised.

    Returns: scales above zero, (I). Ones when no power does better.
    """

    def error(scale_I: torch.Tensor) -> torch.Tensor:
        total = mean_abs_I.new_zeros(())
        for part in layers:
            error_BOI = rounded(part.weight_BOI * scale_I) / scale_I - part.weight_BOI
            total += (output_error(error_BOI, part.statistics.hessian_BII) * part.statistics.rows_B).sum()
        return total

    candidates = [_power(mean_abs_I, exponent) for exponent in _EXPONENTS]
    errors = torch.stack([error(scale_I) for scale_I in candidates])
    return candidates[int(errors.argmin())]


def smooth_scale(max_abs_x: torch.Tensor, max_abs_w: torch.Tensor, strength: float = 0.5) -> torch.Tensor:
    """SmoothQuant's: the largest input to the power of ``strength``, by the largest weight to the power of the rest.

    Arguments:
        max_abs_x: float32, (…, I), largest absolute value of each input.
        max_abs_w: the same of the weights that multiply it.
        strength: 0 … 1, how much of the range moves into the weights.

    Returns: scales above zero, (…, I); 1 where inputs or weights are all zero.
    """
    scale = max_abs_x.clamp(min=_SMALLEST) ** strength / max_abs_w.clamp(min=_SMALLEST) ** (1 - strength)
    return torch.where((max_abs_x > 0) & (max_abs_w > 0), scale, 1.0)


def _power(mean_abs: torch.Tensor, exponent: float) -> torch.Tensor:
    """(…, I); the middle of the scales, on a logarithmic axis, is 1."""
    scale = mean_abs.clamp(min=_SMALLEST) ** exponent
    return scale / (scale.amax(-1, keepdim=True) * scale.amin(-1, keepdim=True)).sqrt()
