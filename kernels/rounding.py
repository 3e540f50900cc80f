"""Weights rounded to nearest in our formats, without calibration.

Shape suffixes as in ``types.py``; G groups of inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

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


def quantize_int8(weight: torch.Tensor, *, group: int | None = None) -> Int8Weight:
    """Round to nearest in steps of a 127th of the largest weight of each output, or of its group of inputs.

    Arguments:
        weight: floating, (O, I) or (E, O, I).
        group: inputs per scale: 32, 64 or 128; None: all of an output's.

    Raises:
        ValueError: for another shape or group, or weights that are not finite.
    """
    w = _source(weight)
    if group is None:
        scale = _positive(w.abs().amax(-1) / 127)
        wide = scale[..., None]
    else:
        check_group("int8", group)
        grouped = F.pad(w, (0, -w.shape[-1] % group)).unflatten(-1, (-1, group))
        scale = _positive(grouped.abs().amax(-1) / 127)
        wide = spread(scale, group, w.shape[-1])
    return Int8Weight(data=(w / wide).round().clamp(-127, 127).to(torch.int8), scale=scale, group=group)


def quantize_int4(weight: torch.Tensor, *, group: int = 64, symmetric: bool = True) -> Int4Weight:
    """Round to nearest in 15 equal steps over the range of each output's group of inputs.

    Arguments:
        weight: floating, (O, I) or (E, O, I).
        group: inputs per scale: 32, 64 or 128.
        symmetric: the range is ± the largest weight; otherwise from the smallest to the largest, zero included.

    Raises:
        ValueError: for another shape or group, or weights that are not finite.
    """
    w = _source(weight)
    scale, zero = int4_grid(w, group, symmetric)
    grouped = F.pad(w, (0, -w.shape[-1] % group)).unflatten(-1, (-1, group))
    q = ((grouped / scale[..., None]).round() + zero[..., None]).clamp(0, 15).to(torch.uint8)
    codes = q.flatten(-2)[..., : w.shape[-1]]
    return Int4Weight(
        data=pack_int4(codes),
        scale=scale,
        inputs=w.shape[-1],
        group=group,
        zero=None if symmetric else zero.to(torch.uint8),
    )


def int4_grid(
    weight: torch.Tensor, group: int, symmetric: bool, shrink: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points of a grid that reaches from end to end of each output's group of inputs.

    Arguments:
        weight: float32, (…, O, I).
        group: inputs per scale: 32, 64 or 128.
        symmetric: as for :func:`quantize_int4`.
        shrink: share of the range that is kept; what lies outside is clipped.

    Returns: float32, (…, O, G) each; zero points are whole numbers.

    Raises:
        ValueError: for another group.
    """
    check_group("int4", group)
    grouped = F.pad(weight, (0, -weight.shape[-1] % group)).unflatten(-1, (-1, group))  # zeros move neither end
    low, high = grouped.amin(-1).clamp(max=0) * shrink, grouped.amax(-1).clamp(min=0) * shrink
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = _positive((high - low) / 15)
    return scale, torch.full_like(scale, 8.0) if symmetric else (-low / scale).round().clamp(0, 15)


def quantize_fp8(weight: torch.Tensor, *, block: bool = False) -> Fp8Weight:
    """Round to the nearest e4m3 value, scaled so that the largest weight becomes the format's largest.

    Arguments:
        weight: floating, (O, I) or (E, O, I).
        block: scales per block of 128 by 128 instead of per output.

    Raises:
        ValueError: for another shape, or weights that are not finite.
    """
    w = _source(weight)
    if not block:
        scale = _positive(w.abs().amax(-1, keepdim=True) / FP8_MAX)
        return Fp8Weight(data=_to_fp8(w / scale), scale=scale)
    outputs, inputs = w.shape[-2:]
    padded = F.pad(w.abs(), (0, -inputs % FP8_BLOCK, 0, -outputs % FP8_BLOCK))
    tiles = padded.unflatten(-1, (-1, FP8_BLOCK)).unflatten(-3, (-1, FP8_BLOCK))
    scale = _positive(tiles.amax((-1, -3)) / FP8_MAX)
    wide = spread(scale, FP8_BLOCK, inputs).repeat_interleave(FP8_BLOCK, -2)[..., :outputs, :]
    return Fp8Weight(data=_to_fp8(w / wide), scale=scale, block_out=FP8_BLOCK, block_in=FP8_BLOCK)


def _source(weight: torch.Tensor) -> torch.Tensor:
    if weight.dim() not in (2, 3) or not weight.is_floating_point() or 0 in weight.shape:
        raise ValueError(
            f"a weight to quantise must be floating with shape (O, I) or (E, O, I), not {describe(weight)}"
        )
    w = weight.float()
    if not bool(w.isfinite().all()):
        raise ValueError(f"a weight to quantise must be finite; {int((~w.isfinite()).sum())} of {w.numel()} are not")
    return w


def _positive(scale: torch.Tensor) -> torch.Tensor:
    """Scales of nothing but zeros become 1; those of subnormal weights stay above zero."""
    return torch.where(scale > 0, scale.clamp(min=torch.finfo(torch.float32).tiny), 1.0)


def _to_fp8(w: torch.Tensor) -> torch.Tensor:
    return w.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
