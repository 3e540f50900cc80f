"""Codes and scales of quantised weights on their way into the blocks of the C++ kernels (``cpu/quant.h``).

Shape suffixes are explained in ``types.py``; X stands for whatever the last dimension is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..api.formats import FP8, MXFP4, ActivationScheme
from ..api.quantized_weight import QuantizedWeight
from .layout import BLOCK, GATED

_SCALES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e8m0fnu)


class Layout(NamedTuple):
    """A packed weight in numbers, as the C++ kernels take it (``quant/quant_tensors.h``).

    Arguments:
        format: :attr:`Format.cpu`.
        outputs, inputs: of all experts together.
        group: inputs that share a scale.
        offsets: 1 for offsets, 2 for zero points, 0 for neither.
        byte_rows: whether rows are rounded to 8 bits.
        scale_type: where the scales' dtype is in ``_SCALES``; with two levels that of the outer ones.
    """

    format: int
    outputs: int
    inputs: int
    group: int
    offsets: int
    byte_rows: int
    scale_type: int


class Values(NamedTuple):
    """What a weight has beside its codes: scales (…, O, G), and offsets likewise or None.

    With two levels of scales those of groups are bytes, and there are outer ones.
    """

    scales: torch.Tensor
    offsets: torch.Tensor | None
    outer_scales: torch.Tensor | None = None
    outer_offsets: torch.Tensor | None = None


def pack(
    isa: int, weight: QuantizedWeight, codes: Sequence[torch.Tensor], values: Values, scheme: ActivationScheme
) -> tuple[torch.Tensor, Layout]:
    """Codes as ``pack_quant`` takes them, with values (O, G) of all outputs in blocks, those that fill them up too."""
    offsets, two_level = values.offsets, values.outer_scales is not None
    if values.scales.dtype == torch.uint8 and not two_level:  # exponents
        dtype, values = torch.float8_e8m0fnu, values._replace(scales=(values.scales.int() << 23).view(torch.float32))
    else:
        types = () if weight.format == MXFP4 else _SCALES[1:3]
        dtype = next(d for d in (*types, torch.float32) if two_level or _holds(d, values.scales))
    kind = int(offsets is not None)
    if offsets is not None and not two_level and not _holds(dtype, offsets):
        zeros = _zero_points(values.scales, offsets)
        if zeros is None:
            dtype = torch.float32
        else:
            kind, offsets = 2, zeros
    assert weight.format.cpu is not None
    layout = Layout(
        format=weight.format.cpu,
        outputs=values.scales.shape[0],
        inputs=weight.in_features,
        group=group_of(weight),
        offsets=kind,
        byte_rows=int(scheme.kind != "none"),
        scale_type=_SCALES.index(dtype),
    )
    parts = _map(lambda t: t.contiguous(), values._replace(offsets=offsets))
    stored = [data.contiguous() if data.dtype == torch.int8 else data.contiguous().view(torch.uint8) for data in codes]
    return torch.ops.dynamoe_cpu.pack_quant.default(isa, stored, *parts, layout), layout


def _holds(dtype: torch.dtype, values: torch.Tensor) -> bool:
    """Whether a dtype has exactly these values; of bfloat16 only normal numbers and zeros are used."""
    if dtype == torch.float32:
        return True
    same = (values.to(dtype).float() == values) & values.isfinite()
    if dtype == torch.bfloat16:
        same &= (values == 0) | (values.abs() >= torch.finfo(torch.float32).tiny)
    return bool(same.all())


def _zero_points(scales: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor | None:
    """Whole numbers 0 … 15 with ``-zero · scale`` being the offsets, bit by bit; None where there are not such."""
    zeros = torch.where(scales == 0, 0.0, -offsets / scales).round()
    fits = (zeros >= 0) & (zeros <= 15) & (-zeros * scales == offsets)
    return zeros if bool(fits.all()) else None


def group_of(weight: QuantizedWeight) -> int:
    return weight.group or weight.in_features


def _have_halves(*weights: QuantizedWeight) -> bool:
    """Whether scales are powers of two, and halves of all of them normal numbers."""
    if any(weight.format != MXFP4 for weight in weights):
        return False
    ends = [end for weight in weights for end in weight.scale.view(torch.uint8).aminmax()]
    return all(2 <= int(end) < 255 for end in ends)


def _read(weight: QuantizedWeight, has_offsets: bool = False, exponents: bool = False) -> Values:
    """A weight's scales and offsets; with zero offsets where ``has_offsets`` asks for some that it does not need, and
    with the exponents of powers of two in place of these, as uint8."""
    if weight.format == FP8 and bool(((weight.data.view(torch.uint8) & 127) == 127).any()):
        raise ValueError(f"an {weight.format.name} weight of shape {weight.shape} holds NaN")
    if weight.format == MXFP4:  # the kernels' numbers are whole: twice what codes stand for
        return Values(weight.scale.view(torch.uint8) - 1 if exponents else weight.scales() / 2, None)
    if not weight.format.two_level:
        return Values(weight.scales(), weight.offsets() if has_offsets or weight.needs_offsets else None)
    offset, wants_offsets = weight.offset, weight.format.offsets
    if weight.outer_scale is None or (wants_offsets and (offset is None or weight.outer_offset is None)):
        wanted = "two levels of scales" + (" and of offsets" if wants_offsets else "")
        raise ValueError(f"{weight.format.name} weights have {wanted}, not {', '.join(sorted(weight.tensors()))}")
    return Values(weight.scale.view(torch.uint8), offset, weight.outer_scale, weight.outer_offset)


def _map(function: Callable[..., torch.Tensor], *values: Values) -> Values:
    """``function`` of the scales, and of whatever else there is."""
    fields = zip(*values, strict=True)
    return Values(*(None if tensors[0] is None else function(*tensors) for tensors in fields))  # type: ignore[arg-type]


def _interleaved(gate_EFX: torch.Tensor, up_EFX: torch.Tensor) -> torch.Tensor:
    """Gated blocks of all experts: 16 gate outputs, then the 16 up outputs that belong to them."""
    halves = [_padded_rows(t, GATED).unflatten(1, (-1, GATED)) for t in (gate_EFX, up_EFX)]
    return torch.cat(halves, 2).flatten(0, 2)


def _padded_rows(t_EOX: torch.Tensor, multiple: int) -> torch.Tensor:
    more = -t_EOX.shape[1] % multiple
    return F.pad(t_EOX, (0, 0, 0, more)) if more else t_EOX  # padding by nothing would copy


def linear_values(weight_OI: QuantizedWeight) -> Values:
    """Of a linear layer."""
    return _read(weight_OI, exponents=_have_halves(weight_OI))


def gate_up_values(gate_EFD: QuantizedWeight, up_EFD: QuantizedWeight) -> Values:
    """Of gates and ups of experts in gated blocks."""
    has_offsets = gate_EFD.needs_offsets or up_EFD.needs_offsets
    exponents = _have_halves(gate_EFD, up_EFD)
    return _map(_interleaved, *(_read(weight, has_offsets, exponents) for weight in (gate_EFD, up_EFD)))


def down_values(down_EDF: QuantizedWeight) -> Values:
    """Of downs of experts in blocks."""
    values = _read(down_EDF, exponents=_have_halves(down_EDF))
    return _map(lambda t: _padded_rows(t, BLOCK).flatten(0, 1), values)
