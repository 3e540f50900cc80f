"""Weights rounded to nearest in our formats, without calibration.

Shape suffixes as in ``types.py``; G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .codes import pack_int4
from .format_join import concatenate, stack_experts
from .formats import FP8, FP8_BLOCK, FP8_MAX, INT4, INT8, Format
from .quantized_weight import QuantizedWeight, describe, spread

_CHUNK = 1 << 22  # weights that are rounded at once


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How weights become one of our formats. Called with a weight, (O, I) or (E, O, I), it is the oracle of whatever
    does the same faster, see :meth:`.TorchBackend.quantize`.

    Arguments:
        format: int8, int4 or fp8.
        group: inputs per scale; None: all of an output's.
        block_out: outputs per scale.
        symmetric: of int4, see :func:`quantize_int4`.
    """

    format: Format
    group: int | None = None
    block_out: int = 1
    symmetric: bool = True

    def __call__(self, weight: torch.Tensor) -> QuantizedWeight:
        if self.format == INT8:
            return quantize_int8(weight, group=self.group)
        if self.format == INT4:
            assert self.group is not None
            return quantize_int4(weight, group=self.group, symmetric=self.symmetric)
        assert self.format == FP8
        return quantize_fp8(weight, block=self.block_out > 1)


def quantize_int8(weight: torch.Tensor, *, group: int | None = None) -> QuantizedWeight:
    """Round to nearest in steps of a 127th of the largest weight of each output, or of its group of inputs.

    Arguments:
        weight: floating, (O, I) or (E, O, I).
        group: inputs per scale: 32, 64 or 128; None: all of an output's.

    Raises:
        ValueError: for another shape or group, or weights that are not finite.
    """
    INT8.check_group(group)

    def rounded(w_OI: torch.Tensor) -> QuantizedWeight:
        step = group or w_OI.shape[-1]
        grouped = F.pad(w_OI, (0, -w_OI.shape[-1] % step)).unflatten(-1, (-1, step))
        scale_OG = _positive(grouped.abs().amax(-1) / 127)
        if group:
            scale_OG = scale_OG.bfloat16().float()  # half the memory, and nothing lost beside a step of the codes
        data = (w_OI / spread(scale_OG, step, w_OI.shape[-1])).round().clamp(-127, 127).to(torch.int8)
        return QuantizedWeight(format=INT8, data=data, scale=scale_OG, group=group)

    return in_chunks(weight, rounded)


def quantize_int4(weight: torch.Tensor, *, group: int = 64, symmetric: bool = True) -> QuantizedWeight:
    """Round to nearest in 15 equal steps over the range of each output's group of inputs.

    Arguments:
        weight: floating, (O, I) or (E, O, I).
        group: inputs per scale: 32, 64 or 128.
        symmetric: the range is ± the largest weight; otherwise from the smallest to the largest, zero included.

    Raises:
        ValueError: for another shape or group, or weights that are not finite.
    """

    def rounded(w_OI: torch.Tensor) -> QuantizedWeight:
        scale, zero = int4_grid(w_OI, group, symmetric)
        grouped = F.pad(w_OI, (0, -w_OI.shape[-1] % group)).unflatten(-1, (-1, group))
        q = ((grouped / scale[..., None]).round() + zero[..., None]).clamp(0, 15).to(torch.uint8)
        return QuantizedWeight(
            format=INT4,
            data=pack_int4(q.flatten(-2)[:, : w_OI.shape[-1]]),
            scale=scale,
            inputs=w_OI.shape[-1],
            group=group,
            zero=None if symmetric else zero.to(torch.uint8),
        )

    return in_chunks(weight, rounded)


def int4_grid(
    weight: torch.Tensor, group: int, symmetric: bool, shrink: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points of a grid that reaches from end to end of each output's group of inputs.

    Arguments:
        weight: float32, (…, O, I).
        group: inputs per scale: 32, 64 or 128.
        symmetric: as for :func:`quantize_int4`.
        shrink: share of the range that is kept; what lies outside is clipped.

    Returns: float32, (…, O, G) each; scales are numbers of bfloat16, zero points whole.

    Raises:
        ValueError: for another group.
    """
    INT4.check_group(group)
    grouped = F.pad(weight, (0, -weight.shape[-1] % group)).unflatten(-1, (-1, group))  # zeros move neither end
    low, high = grouped.amin(-1).clamp(max=0) * shrink, grouped.amax(-1).clamp(min=0) * shrink
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = _positive((high - low) / 15).bfloat16().float()  # as in quantize_int8
    return scale, torch.full_like(scale, 8.0) if symmetric else (-low / scale).round().clamp(0, 15)


def quantize_fp8(weight: torch.Tensor, *, block: bool = False) -> QuantizedWeight:
    """Round to the nearest e4m3 value, scaled so that the largest weight becomes the format's largest.

    Arguments:
        weight: floating, (O, I) or (E, O, I).
        block: scales per block of 128 by 128 instead of per output.

    Raises:
        ValueError: for another shape, or weights that are not finite.
    """

    def rounded(w_OI: torch.Tensor) -> QuantizedWeight:
        if not block:
            scale = _positive(w_OI.abs().amax(-1, keepdim=True) / FP8_MAX)
            return QuantizedWeight(format=FP8, data=_to_fp8(w_OI / scale), scale=scale)
        outputs, inputs = w_OI.shape
        padded = F.pad(w_OI.abs(), (0, -inputs % FP8_BLOCK, 0, -outputs % FP8_BLOCK))
        tiles = padded.unflatten(-1, (-1, FP8_BLOCK)).unflatten(-3, (-1, FP8_BLOCK))
        scale = _positive(tiles.amax((-1, -3)) / FP8_MAX)
        wide = spread(scale, FP8_BLOCK, inputs).repeat_interleave(FP8_BLOCK, -2)[:outputs]
        data = _to_fp8(w_OI / wide)
        return QuantizedWeight(format=FP8, data=data, scale=scale, group=FP8_BLOCK, block_out=FP8_BLOCK)

    return in_chunks(weight, rounded)


def in_chunks(weight: torch.Tensor, rounded: Callable[[torch.Tensor], QuantizedWeight]) -> QuantizedWeight:
    """A weight rounded chunk by chunk, outputs by outputs, so that little of it is ever there in float32."""
    if weight.dim() not in (2, 3) or not weight.is_floating_point() or 0 in weight.shape:
        raise ValueError(f"a weight to quantise must be floating, (O, I) or (E, O, I), not {describe(weight)}")
    if weight.dim() == 3:
        return stack_experts([in_chunks(part_OI, rounded) for part_OI in weight])
    rows = max(1, _CHUNK // weight.shape[1] // FP8_BLOCK) * FP8_BLOCK  # whole blocks
    chunks = []
    for chunk in weight.split(rows):
        w_OI = chunk.float()
        if not bool(w_OI.isfinite().all()):
            wrong = int((~w_OI.isfinite()).sum())
            raise ValueError(f"a weight to quantise must be finite; {wrong} of {w_OI.numel()} are not")
        chunks.append(rounded(w_OI))
    return chunks[0] if len(chunks) == 1 else concatenate(chunks)


def _positive(scale: torch.Tensor) -> torch.Tensor:
    """Scales of nothing but zeros become 1; those of subnormal weights stay above zero."""
    return torch.where(scale > 0, scale.clamp(min=torch.finfo(torch.float32).tiny), 1.0)


def _to_fp8(w: torch.Tensor) -> torch.Tensor:
    return w.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
