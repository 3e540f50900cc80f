"""Quantised weights as the C++ kernels keep them (``cpu/quant.h``): codes and scales of 32 outputs in one piece.

Shape suffixes are explained in ``types.py``; X stands for whatever the last dimension is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..api.formats import MXFP4, UNQUANTIZED, ActivationScheme
from ..api.quantized_weight import QuantizedWeight
from ..api.types import ExpertWeights, LinearWeights, Routing
from ..torch.backend import TorchBackend
from ..torch.experts import PlainExperts
from ..torch.quantized import QuantExperts
from .layout import BLOCK, GATED, PLAIN_ACTIVATIONS, activation_number, join_gate_up_bias, padded

log = logging.getLogger(__name__)
_MOST_CODES = 1 << 26  # unpacked at once
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


class Part(NamedTuple):
    """Some outputs of a packed layer: their layout, and the words of 32 bits that a block takes."""

    layout: Layout
    block_words: int

    @property
    def blocks(self) -> int:
        return -(-self.layout.outputs // BLOCK)


@dataclass(frozen=True)
class CpuLinear:
    """A packed linear layer of so many outputs.

    Arguments:
        packed, bias: of a quantised layer those of its parts, one behind the other, each in whole blocks.
        parts: of a quantised layer; their outputs follow each other, and their formats may differ.
        skip: outputs in front that are computed and dropped: the tail of a quantised layer began inside a block.
    """

    isa: int
    packed: torch.Tensor
    bias: torch.Tensor | None
    outputs: int
    parts: tuple[Part, ...] = ()
    skip: int = 0

    @cached_property
    def layout(self) -> list[int]:
        """Of all parts, as the C++ kernels take it."""
        return [number for part in self.parts for number in part.layout]

    def run(self, x_TI: torch.Tensor, *, float_out: bool = False) -> torch.Tensor:
        """(T, O), of x's dtype or float32."""
        ops, arguments = torch.ops.dynamoe_cpu, (self.isa, x_TI, self.packed, self.bias)
        if not self.layout:
            return ops.linear.default(*arguments, self.outputs, float_out)
        out_TO = ops.quant_linear.default(*arguments, self.layout, float_out)
        return out_TO[:, self.skip :] if self.skip else out_TO

    def tail(self, start: int) -> CpuLinear:
        """The layer that computes the outputs from ``start`` on, which shares this one's memory. Unless the layer is
        quantised they begin with a block."""
        inside, words, blocks, parts = start + self.skip, 0, 0, list(self.parts)
        while len(parts) > 1 and inside >= parts[0].layout.outputs:
            gone = parts.pop(0)
            inside -= gone.layout.outputs
            words += gone.blocks * gone.block_words
            blocks += gone.blocks
        first, skip = divmod(inside, BLOCK)
        if parts:
            layout = parts[0].layout
            words += first * parts[0].block_words
            parts[0] = parts[0]._replace(layout=layout._replace(outputs=layout.outputs - first * BLOCK))
        else:
            assert not skip
            words = first * (self.packed.numel() // -(-self.outputs // BLOCK))
        bias = None if self.bias is None else self.bias[(blocks + first) * BLOCK :]
        return CpuLinear(self.isa, self.packed[words:], bias, self.outputs - start, tuple(parts), skip)


@dataclass(frozen=True)
class CpuQuantExperts:
    """The packed experts of a layer; ``shape`` is experts, hidden size, width, activation."""

    isa: int
    gate_up: torch.Tensor
    gate_up_layout: Layout
    down: torch.Tensor
    down_layout: Layout
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    shape: tuple[int, int, int, int]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> CpuQuantExperts:
        """As :meth:`QuantExperts.map`; an expert's codes and scales are one row."""
        before = self.shape[0]
        first, second = (change(part.view(before, -1)) for part in (self.gate_up, self.down))
        bias, down_bias = (None if bias is None else change(bias) for bias in (self.gate_up_bias, self.down_bias))
        wide = [layout._replace(outputs=layout.outputs // before * len(first)) for layout in self._layouts]
        shape = (len(first), *self.shape[1:])
        return CpuQuantExperts(self.isa, first.flatten(), wide[0], second.flatten(), wide[1], bias, down_bias, shape)

    @property
    def _layouts(self) -> tuple[Layout, Layout]:
        return self.gate_up_layout, self.down_layout

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Of one expert's packed weights."""
        return tuple(layout._replace(outputs=layout.outputs // self.shape[0]) for layout in self._layouts)

    def run(self, x_TD: torch.Tensor, routing: Routing | None) -> torch.Tensor:
        """(T, D); without a routing every row uses every expert with weight 1."""
        packed = (self.gate_up, self.gate_up_layout, self.down, self.down_layout, self.gate_up_bias, self.down_bias)
        parts: tuple[Any, ...] = (None, None, None)
        if routing is not None:
            parts = (routing.expert_ids_TK, routing.weights_TK, routing.counts_T)
        return torch.ops.dynamoe_cpu.quant_experts.default(self.isa, x_TD, *packed, self.shape, *parts)


class _Codes(NamedTuple):
    """One byte per weight, (…, O, I), scales (…, O, G), and offsets likewise or None.

    With two levels of scales those of groups are bytes, and there are outer ones.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None
    outer_scales: torch.Tensor | None = None
    outer_offsets: torch.Tensor | None = None


def _pack(isa: int, weight: QuantizedWeight, stored: _Codes, scheme: ActivationScheme) -> tuple[torch.Tensor, Layout]:
    offsets, two_level = stored.offsets, stored.outer_scales is not None
    types = (torch.float8_e8m0fnu,) if weight.format == MXFP4 else _SCALES[1:3]
    dtype = next(d for d in (*types, torch.float32) if two_level or _holds(d, stored.scales))
    kind = int(offsets is not None)
    if offsets is not None and not two_level and not _holds(dtype, offsets):
        zeros = _zero_points(stored.scales, offsets)
        if zeros is None:
            dtype = torch.float32
        else:
            kind, offsets = 2, zeros
    assert weight.format.cpu is not None
    layout = Layout(
        format=weight.format.cpu,
        outputs=stored.codes.shape[0],
        inputs=weight.in_features,
        group=_group(weight),
        offsets=kind,
        byte_rows=int(scheme.kind != "none"),
        scale_type=_SCALES.index(dtype),
    )
    parts = _map(lambda t: t.contiguous(), stored._replace(offsets=offsets))
    return torch.ops.dynamoe_cpu.pack_quant.default(isa, *parts, layout), layout


def _pack_by_parts(
    isa: int, weight: QuantizedWeight, codes_of: Callable[[slice], _Codes], scheme: ActivationScheme
) -> tuple[torch.Tensor, Layout]:
    """Experts, some at a time, because their codes take a byte each on the way."""
    count = weight.num_experts
    assert count is not None
    step = max(1, _MOST_CODES // (weight.out_features * weight.in_features))
    parts = [_pack(isa, weight, codes_of(slice(at, at + step)), scheme) for at in range(0, count, step)]
    layouts = {layout._replace(outputs=0) for _, layout in parts}
    if len(parts) == 1:
        return parts[0]
    if len(layouts) > 1:  # scales of all together are of the type that holds them all
        return _pack(isa, weight, codes_of(slice(0, count)), scheme)
    packed = torch.ops.dynamoe_cpu.allocate(sum(words.numel() for words, _ in parts))
    torch.cat([words.view(-1) for words, _ in parts], out=packed)
    return packed, layouts.pop()._replace(outputs=sum(layout.outputs for _, layout in parts))


def _holds(dtype: torch.dtype, values: torch.Tensor) -> bool:
    """Whether a dtype has exactly these values; of bfloat16 only normal numbers and zeros are used, of powers of two
    only normal ones."""
    if dtype == torch.float32:
        return True
    same = (values.to(dtype).float() == values) & values.isfinite()
    if dtype in (torch.bfloat16, torch.float8_e8m0fnu):
        zero = (values == 0) & (dtype == torch.bfloat16)
        same &= zero | (values.abs() >= torch.finfo(torch.float32).tiny)
    return bool(same.all())


def _zero_points(scales: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor | None:
    """Whole numbers 0 … 15 with ``-zero · scale`` being the offsets, bit by bit; None where there are not such."""
    zeros = torch.where(scales == 0, 0.0, -offsets / scales).round()
    fits = (zeros >= 0) & (zeros <= 15) & (-zeros * scales == offsets)
    return zeros if bool(fits.all()) else None


def _group(weight: QuantizedWeight) -> int:
    return weight.group or weight.in_features


def _read(weight: QuantizedWeight, has_offsets: bool = False) -> _Codes:
    """A weight's codes; with zero offsets where ``has_offsets`` asks for some that it does not need."""
    codes = weight.codes()
    if weight.format.codes.dtype == torch.float8_e4m3fn and bool(((codes & 127) == 127).any()):
        raise ValueError(f"an {weight.format.name} weight of shape {weight.shape} holds NaN")
    if weight.format == MXFP4:  # the kernels' numbers are whole: twice what codes stand for
        return _Codes(codes, weight.scales() / 2, None)
    if not weight.format.two_level:
        return _Codes(codes, weight.scales(), weight.offsets() if has_offsets or weight.needs_offsets else None)
    offset, wants_offsets = weight.offset, weight.format.offsets
    if weight.outer_scale is None or (wants_offsets and (offset is None or weight.outer_offset is None)):
        wanted = "two levels of scales" + (" and of offsets" if wants_offsets else "")
        raise ValueError(f"{weight.format.name} weights have {wanted}, not {', '.join(sorted(weight.tensors()))}")
    scales = (weight.scale.view(torch.uint8), offset, weight.outer_scale, weight.outer_offset)
    return _Codes(codes, *scales)


def _map(function: Callable[..., torch.Tensor], *stored: _Codes) -> _Codes:
    """``function`` of the codes, of the scales, and of whatever else there is."""
    fields = zip(*stored, strict=True)
    return _Codes(*(None if tensors[0] is None else function(*tensors) for tensors in fields))  # type: ignore[arg-type]


def _interleaved(gate_EFX: torch.Tensor, up_EFX: torch.Tensor) -> torch.Tensor:
    """Gated blocks of all experts: 16 gate outputs, then the 16 up outputs that belong to them."""
    halves = [_padded_rows(t, GATED).unflatten(1, (-1, GATED)) for t in (gate_EFX, up_EFX)]
    return torch.cat(halves, 2).flatten(0, 2)


def _padded_rows(t_EOX: torch.Tensor, multiple: int) -> torch.Tensor:
    more = -t_EOX.shape[1] % multiple
    return F.pad(t_EOX, (0, 0, 0, more)) if more else t_EOX  # padding by nothing would copy


class CpuQuantPacking(TorchBackend):
    """How quantised weights come into the kernels' layout; :class:`.CpuBackend` runs them."""

    _isa: int

    def _with_room(self, part: torch.Tensor, count: int) -> torch.Tensor:
        if part.dtype != torch.int32:
            return super()._with_room(part, count)
        roomy = torch.ops.dynamoe_cpu.allocate(count * part.shape[1]).view(count, -1)
        roomy[: len(part)] = part
        return roomy

    def pack_quantized_linear(
        self, weight_OI: QuantizedWeight, bias_O: torch.Tensor | None = None, scheme: ActivationScheme = UNQUANTIZED
    ) -> LinearWeights:
        scheme.check(weight_OI.format, weight_OI.group)
        if weight_OI.format.cpu is None:
            return self.pack_linear(self._dequantized(weight_OI, scheme), bias_O)
        self.formats.add(weight_OI.format.name)
        packed, layout = _pack(self._isa, weight_OI, _read(weight_OI), scheme)
        outputs = weight_OI.out_features
        part = Part(layout, packed.numel() // -(-outputs // BLOCK))
        data = CpuLinear(self._isa, packed, self._padded(bias_O), outputs, (part,))
        return LinearWeights.of(weight_OI.shape, self.dtype, data, packed, data.bias)

    def join_linear(self, *parts: LinearWeights) -> LinearWeights:
        layers: list[CpuLinear] = [part.data for part in parts]
        if len(parts) == 1 or not all(layer.parts and not layer.skip for layer in layers):
            if len(parts) > 1:
                self._fall_back("projections of which some are not quantised")
            return super().join_linear(*parts)
        packed, bias = torch.cat([layer.packed for layer in layers]), None
        if any(layer.bias is not None for layer in layers):
            zeros = (torch.zeros(-(-layer.outputs // BLOCK) * BLOCK) for layer in layers)
            bias = torch.cat([z if layer.bias is None else layer.bias for z, layer in zip(zeros, layers, strict=True)])
        outputs = sum(layer.outputs for layer in layers)
        data = CpuLinear(self._isa, packed, bias, outputs, tuple(part for layer in layers for part in layer.parts))
        return LinearWeights.of((outputs, parts[0].in_features), self.dtype, data, packed, bias)

    def _pack_quantized_experts(self, experts: QuantExperts, activation: str) -> ExpertWeights:
        if any(weight.format.cpu is None for weight in experts.weights):
            gate, up, down = (self._dequantized(weight, experts.scheme) for weight in experts.weights)
            return self._pack_experts(PlainExperts(gate, up, down, *experts.biases), activation)
        self.formats.update(weight.format.name for weight in experts.weights)
        number = self._activation(activation)
        gate_EFD, up_EFD, down_EDF = experts.weights
        if gate_EFD.format != up_EFD.format or _group(gate_EFD) != _group(up_EFD):
            raise ValueError(
                f"gate and up must have one format, not {gate_EFD.format.name} in groups of {_group(gate_EFD)} and "
                f"{up_EFD.format.name} in groups of {_group(up_EFD)}"
            )
        has_offsets = gate_EFD.needs_offsets or up_EFD.needs_offsets

        def gate_up_codes(part: slice) -> _Codes:
            return _map(_interleaved, *(_read(weight.experts(part), has_offsets) for weight in (gate_EFD, up_EFD)))

        def down_codes(part: slice) -> _Codes:
            return _map(lambda t: _padded_rows(t, BLOCK).flatten(0, 1), _read(down_EDF.experts(part)))

        first = _pack_by_parts(self._isa, gate_EFD, gate_up_codes, experts.scheme)
        second = _pack_by_parts(self._isa, down_EDF, down_codes, experts.scheme)
        biases = join_gate_up_bias(experts.gate_bias_EF, experts.up_bias_EF), self._padded(experts.down_bias_ED)
        num_experts, width, hidden = gate_EFD.shape
        data = CpuQuantExperts(self._isa, *first, *second, *biases, (num_experts, hidden, width, number))
        return ExpertWeights.of(gate_EFD.shape, activation, self.dtype, data, first[0], second[0], *biases)

    def _activation(self, activation: str) -> int:
        """What the kernels call an activation."""
        number = activation_number(activation)
        if activation not in PLAIN_ACTIVATIONS:
            self.formats.add(activation)
        return number

    def _padded(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """A bias rounded to this backend's dtype and padded to whole blocks."""
        return None if bias is None else padded(bias.to(self.dtype), BLOCK)

    def _dequantized(self, weight: QuantizedWeight, scheme: ActivationScheme) -> torch.Tensor:
        """A weight for whose format there are no kernels, to be packed like any other.

        Raises:
            ValueError: when rows would have to be rounded for it.
        """
        name = weight.format.name
        if scheme.kind != "none":
            raise ValueError(f"the {self.name} backend has no kernel for {name} weights and {scheme.kind} activations")
        if name not in self._said:
            self._said.add(name)
            log.warning("the %s backend has no kernel for %s weights: they run as %s", self.name, name, self.dtype)
        return weight.dequantize().to(self.dtype)
