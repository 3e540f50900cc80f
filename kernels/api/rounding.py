"""Weights rounded to nearest in our formats, without calibration.

Shape suffixes as in ``types.py``; G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .format_join import Weight, concatenate, stack_experts
from .formats import (
    FP8_BLOCK,
    FP8_MAX,
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    check_group,
    describe,
    pack_int4,
    spread,
)

_PIECE = 1 << 22  # weights that are rounded at once


def quantize_int8(weight: torch.Tensor, *, group: int | None = None) -> Int8Weight:
    """Round to nearest in steps of a 127th of the largest weight of each output, or of its group of inputs.

    Arguments:
        weight: floating, (O, I) or (E, O, I).
        group: inputs per scale: 32, 64 or 128; None: all of an output's.

    Raises:
        ValueError: for another shape or group, or weights that are not finite.
    """
    if group is not None:
        check_group("int8", group)

    def rounded(w_OI: torch.Tensor) -> Int8Weight:
        step = group or w_OI.shape[-1]
        grouped = F.pad(w_OI, (0, -w_OI.shape[-1] % step)).unflatten(-1, (-1, step))
        scale_OG = _positive(grouped.abs().amax(-1) / 127)
        if group:
            scale_OG = scale_OG.bfloat16().float()  # half the memory, and nothing lost beside a step of the codes
        data = (w_OI / spread(scale_OG, step, w_OI.shape[-1])).round().clamp(-127, 127).to(torch.int8)
        return Int8Weight(data=data, scale=scale_OG if group else scale_OG[:, 0], group=group)

    return _in_pieces(weight, rounded)


def quantize_int4(weight: torch.Tensor, *, group: int = 64, symmetric: bool = True) -> Int4Weight:
    """Round to nearest in 15 equal steps over the range of each output's group of inputs.

    Arguments:
        weight: floating, (O, I) or (E, O, I).
        group: inputs per scale: 32, 64 or 128.
        symmetric: the range is ± the largest weight; otherwise from the smallest to the largest, zero included.

    Raises:
        ValueError: for another shape or group, or weights that are not finite.
    """

    def rounded(w_OI: torch.Tensor) -> Int4Weight:
        scale, zero = int4_grid(w_OI, group, symmetric)
        grouped = F.pad(w_OI, (0, -w_OI.shape[-1] % group)).unflatten(-1, (-1, group))
        q = ((grouped / scale[..., None]).round() + zero[..., None]).clamp(0, 15).to(torch.uint8)
        return Int4Weight(
            data=pack_int4(q.flatten(-2)[:, : w_OI.shape[-1]]),
            scale=scale,
            inputs=w_OI.shape[-1],
            group=group,
            zero=None if symmetric else zero.to(torch.uint8),
        )

    return _in_pieces(weight, rounded)


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
    check_group("int4", group)
    grouped = F.pad(weight, (0, -weight.shape[-1] % group)).unflatten(-1, (-1, group))  # zeros move neither end
    low, high = grouped.amin(-1).clamp(max=0) * shrink, grouped.amax(-1).clamp(min=0) * shrink
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = _positive((high - low) / 15).bfloat16().float()  # as in quantize_int8
    return scale, torch.full_like(scale, 8.0) if symmetric else (-low / scale).round().clamp(0, 15)


def quantize_fp8(weight: torch.Tensor, *, block: bool = False) -> Fp8Weight:
    """Round to the nearest e4m3 value, scaled so that the largest weight becomes the format's largest.

    Arguments:
        weight: floating, (O, I) or (E, O, I).
        block: scales per block of 128 by 128 instead of per output.

    Raises:
        ValueError: for another shape, or weights that are not finite.
    """

    def rounded(w_OI: torch.Tensor) -> Fp8Weight:
        if not block:
            scale = _positive(w_OI.abs().amax(-1, keepdim=True) / FP8_MAX)
            return Fp8Weight(data=_to_fp8(w_OI / scale), scale=scale)
        outputs, inputs = w_OI.shape
        padded = F.pad(w_OI.abs(), (0, -inputs % FP8_BLOCK, 0, -outputs % FP8_BLOCK))
        tiles = padded.unflatten(-1, (-1, FP8_BLOCK)).unflatten(-3, (-1, FP8_BLOCK))
        scale = _positive(tiles.amax((-1, -3)) / FP8_MAX)
        wide = spread(scale, FP8_BLOCK, inputs).repeat_interleave(FP8_BLOCK, -2)[:outputs]
        return Fp8Weight(data=_to_fp8(w_OI / wide), scale=scale, block_out=FP8_BLOCK, block_in=FP8_BLOCK)

    return _in_pieces(weight, rounded)


def _in_pieces(weight: torch.Tensor, rounded: Callable[[torch.Tensor], Weight]) -> Weight:
    """A weight rounded piece by piece, outputs by outputs, so that little of it is ever there in float32."""
    if weight.dim() not in (2, 3) or not weight.is_floating_point() or 0 in weight.shape:
        raise ValueError(f"a weight to quantise must be floating, (O, I) or (E, O, I), not {describe(weight)}")
    if weight.dim() == 3:
        return stack_experts([_in_pieces(part_OI, rounded) for part_OI in weight])
    rows = max(1, _PIECE // weight.shape[1] // FP8_BLOCK) * FP8_BLOCK  # whole blocks
    pieces = []
    for piece in weight.split(rows):
        w_OI = piece.float()
        if not bool(w_OI.isfinite().all()):
            wrong = int((~w_OI.isfinite()).sum())
            raise ValueError(f"a weight to quantise must be finite; {wrong} of {w_OI.numel()} are not")
        pieces.append(rounded(w_OI))
    return pieces[0] if len(pieces) == 1 else concatenate(pieces)


def _positive(scale: torch.Tensor) -> torch.Tensor:
    """Scales of nothing but zeros become 1; those of subnormal weights stay above zero."""
    return torch.where(scale > 0, scale.clamp(min=torch.finfo(torch.float32).tiny), 1.0)


def _to_fp8(w: torch.Tensor) -> torch.Tensor:
    return w.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
