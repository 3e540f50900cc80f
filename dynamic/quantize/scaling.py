"""Scales between activations and weights: AWQ (Lin et al. 2024), SmoothQuant (Xiao et al. 2023).

An input is divided by its scale, its weights are multiplied by it, so full precision is unchanged. Shape
suffixes as in ``statistics.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .statistics import InputStatistics, output_error

_EXPONENTS = tuple(step / 20 for step in range(20))
_SMALLEST = 1e-4


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


def awq_scales(
    weight_BOI: torch.Tensor, statistics: InputStatistics, rounded: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """As :func:`awq_scale`, with separate scales for each of the B layers: (B, I)."""
    candidates = torch.stack([_power(statistics.mean_abs_BI, exponent) for exponent in _EXPONENTS])
    errors = [
        output_error(rounded(weight_BOI * scale_BI[:, None]) / scale_BI[:, None] - weight_BOI, statistics.hessian_BII)
        for scale_BI in candidates
    ]
    return candidates[torch.stack(errors).argmin(0), torch.arange(len(weight_BOI))]


def smooth_scale(max_abs_x: torch.Tensor, max_abs_w: torch.Tensor, strength: float = 0.5) -> torch.Tensor:
    """SmoothQuant's: the largest input to the power of ``strength``, by the largest weight to the power of the rest.

    Arguments:
        max_abs_x: float32, (…, I), largest absolute value of each input.
        max_abs_w: the same of the weights that multiply it.
        strength: 0 … 1, how much of the range moves into the weights.

    Returns: scales above zero, (…, I); 1 where inputs or weights are all zero.

    Raises:
        ValueError: for a strength outside.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"SmoothQuant's strength must be 0 … 1, not {strength}")
    scale = max_abs_x.clamp(min=_SMALLEST) ** strength / max_abs_w.clamp(min=_SMALLEST) ** (1 - strength)
    return torch.where((max_abs_x > 0) & (max_abs_w > 0), scale, 1.0)


def _power(mean_abs: torch.Tensor, exponent: float) -> torch.Tensor:
    """(…, I); the middle of the scales, on a logarithmic axis, is 1."""
    scale = mean_abs.clamp(min=_SMALLEST) ** exponent
    return scale / (scale.amax(-1, keepdim=True) * scale.amin(-1, keepdim=True)).sqrt()
