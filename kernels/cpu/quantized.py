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

from ..api import formats
from ..api.format_join import stack_experts
from ..api.formats import UNQUANTIZED, ActivationScheme, Format
from ..api.packed_weight import PackedWeight
from ..api.quantized_weight import QuantizedWeight
from ..api.rounding import Rounding
from ..api.types import ExpertWeights, LinearWeights, Routing
from ..torch.backend import TorchBackend
from ..torch.experts import PlainExperts
from ..torch.quantized import QuantExperts
from .layout import BLOCK, PLAIN_ACTIVATIONS, activation_number, join_gate_up_bias, padded
from .quant_packing import Layout, down_values, gate_up_values, group_of, linear_values, pack

log = logging.getLogger(__name__)
_ROUNDED = (torch.float32, torch.bfloat16, torch.float16)  # that the kernels round
_NAMES = {form.cpu: form.name for form in vars(formats).values() if isinstance(form, Format) and form.cpu is not None}


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


class CpuQuantPacking(TorchBackend):
    """How quantised weights come into the kernels' layout; :class:`.CpuBackend` runs them."""

    _isa: int

    def _with_room(self, part: torch.Tensor, count: int) -> torch.Tensor:
        if part.dtype != torch.int32:
            return super()._with_room(part, count)
        roomy = torch.ops.dynamoe_cpu.allocate(count * part.shape[1]).view(count, -1)
        roomy[: len(part)] = part
        return roomy

    def quantize(self, rounding: Callable[[torch.Tensor], QuantizedWeight], weight: torch.Tensor) -> QuantizedWeight:
        rounded = self._rounded(rounding, weight) if isinstance(rounding, Rounding) else None
        return rounding(weight) if rounded is None else rounded  # which also says what is wrong

    def _rounded(self, rounding: Rounding, weight: torch.Tensor) -> QuantizedWeight | None:
        """None for weights that the kernels do not round, and those that are not finite."""
        if weight.dim() not in (2, 3) or not weight.numel() or weight.dtype not in _ROUNDED:
            return None
        form, group, inputs = rounding.format, rounding.group, weight.shape[-1]
        form.check_group(group, rounding.block_out)
        if weight.stride(-1) != 1:
            if weight.dim() == 3:  # little of it is copied at a time
                parts = [self._rounded(rounding, part) for part in weight]
                found = [part for part in parts if part is not None]
                return stack_experts(found) if len(found) == len(parts) else None
            weight = weight.contiguous()
        codes, scale, zero, finite = torch.ops.dynamoe_cpu.round_weight.default(
            weight, form.cpu, group or 0, rounding.block_out, rounding.symmetric
        )
        if not finite:
            return None
        return QuantizedWeight(
            format=form,
            data=codes.view(form.codes.dtype),
            scale=scale,
            inputs=inputs if form.codes.bits < 8 else None,
            group=group,
            block_out=rounding.block_out,
            zero=zero if zero.numel() else None,
        )

    def pack_quantized_linear(
        self, weight_OI: QuantizedWeight, bias_O: torch.Tensor | None = None, scheme: ActivationScheme = UNQUANTIZED
    ) -> LinearWeights:
        scheme.check(weight_OI.format, weight_OI.group)
        if weight_OI.format.cpu is None:
            return self.pack_linear(self._dequantized(weight_OI, scheme), bias_O)
        words, layout = pack(self._isa, weight_OI, [weight_OI.data], linear_values(weight_OI), scheme)
        return self.packed_linear(PackedWeight(shape=weight_OI.shape, words=(words,), layouts=(layout,)), bias_O)

    def packed_weight(self, weights: LinearWeights | ExpertWeights) -> PackedWeight | None:
        data = weights.data
        if isinstance(data, CpuLinear) and len(data.parts) == 1 and not data.skip:
            shape = (weights.out_features, weights.in_features)  # type: ignore[union-attr]
            return PackedWeight(shape=shape, words=(data.packed,), layouts=(data.parts[0].layout,))
        if isinstance(data, CpuQuantExperts):
            num_experts, hidden, width, _ = data.shape
            layouts = (data.gate_up_layout, data.down_layout)
            return PackedWeight(shape=(num_experts, width, hidden), words=(data.gate_up, data.down), layouts=layouts)
        return None

    def packed_linear(self, packed: PackedWeight, bias_O: torch.Tensor | None) -> LinearWeights:
        (words,), (layout,) = packed.words, (Layout(*numbers) for numbers in packed.layouts)
        self._runs(layout)
        part = Part(layout, words.numel() // -(-layout.outputs // BLOCK))
        data = CpuLinear(self._isa, words, self._padded(bias_O), layout.outputs, (part,))
        return LinearWeights.of(packed.shape, self.dtype, data, words, data.bias)

    def packed_experts(self, packed: PackedWeight, activation: str, *biases: torch.Tensor | None) -> ExpertWeights:
        number = self._activation(activation)
        gate_up, down = (Layout(*numbers) for numbers in packed.layouts)
        self._runs(gate_up, down)
        gate_EF, up_EF, down_ED = biases
        joined = join_gate_up_bias(gate_EF, up_EF), self._padded(down_ED)
        num_experts, width, hidden = packed.shape
        words = packed.words
        shape = (num_experts, hidden, width, number)
        data = CpuQuantExperts(self._isa, words[0], gate_up, words[1], down, *joined, shape)
        return ExpertWeights.of(packed.shape, activation, self.dtype, data, *words, *joined)

    def allocate(self, words: int) -> torch.Tensor:
        return torch.ops.dynamoe_cpu.allocate(words)

    def _runs(self, *layouts: Layout) -> None:
        """Note the formats that this backend runs."""
        self.formats.update(_NAMES[layout.format] for layout in layouts)

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
        gate_EFD, up_EFD, down_EDF = experts.weights
        if gate_EFD.format != up_EFD.format or group_of(gate_EFD) != group_of(up_EFD):
            raise ValueError(
                f"gate and up must have one format, not {gate_EFD.format.name} in groups of {group_of(gate_EFD)} and "
                f"{up_EFD.format.name} in groups of {group_of(up_EFD)}"
            )
        codes = [gate_EFD.data, up_EFD.data]
        values = gate_up_values(gate_EFD, up_EFD)
        gate_up, gate_up_layout = pack(self._isa, gate_EFD, codes, values, experts.scheme)
        down, down_layout = pack(self._isa, down_EDF, [down_EDF.data], down_values(down_EDF), experts.scheme)
        layouts = gate_up_layout, down_layout
        return self.packed_experts(
            PackedWeight(shape=gate_EFD.shape, words=(gate_up, down), layouts=layouts), activation, *experts.biases
        )

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
