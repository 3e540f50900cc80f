"""Quantised weights as the C++ kernels keep them (``cpu/quant.h``): codes and scales of 32 outputs in one piece.

Shape suffixes are explained in ``types.py``; X stands for whatever the last dimension is.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..api.formats import UNQUANTIZED, ActivationScheme
from ..api.quantized_weight import QuantizedWeight
from ..api.types import ExpertWeights, LinearWeights, Routing
from ..torch.backend import TorchBackend
from ..torch.quantized import check_experts
from .layout import ACTIVATIONS, BLOCK, GATED, count_bytes, join_gate_up_bias, padded

log = logging.getLogger(__name__)
_SCALES = (torch.float32, torch.float16, torch.bfloat16)


class Layout(NamedTuple):
    """A packed weight in numbers, as the C++ kernels take it (``quant/quant_tensors.h``).

    Arguments:
        format: :attr:`Format.cpu`.
        outputs, inputs: of all experts together.
        group: inputs that share a scale.
        offsets: 1 for offsets, 2 for zero points, 0 for neither.
        byte_rows: whether rows are rounded to 8 bits.
        scale_type: where the scales' dtype is in ``_SCALES``.
    """

    format: int
    outputs: int
    inputs: int
    group: int
    offsets: int
    byte_rows: int
    scale_type: int


@dataclass(frozen=True)
class CpuQuantLinear:
    """A packed linear layer. ``skip`` outputs in front are computed and dropped: its tail began inside a block."""

    isa: int
    packed: torch.Tensor
    bias: torch.Tensor | None
    layout: Layout
    skip: int = 0

    def run(self, x_TI: torch.Tensor, *, float_out: bool = False) -> torch.Tensor:
        """(T, O), of x's dtype or float32."""
        out_TO = torch.ops.dynamoe_cpu.quant_linear.default(
            self.isa, x_TI, self.packed, self.bias, self.layout, float_out
        )
        return out_TO[:, self.skip :] if self.skip else out_TO

    def tail(self, start: int) -> CpuQuantLinear:
        """The layer that computes the outputs from ``start`` on; it shares this one's memory."""
        start += self.skip
        first = start // BLOCK
        outputs = self.layout.outputs
        words = self.packed.numel() // -(-outputs // BLOCK)
        return replace(
            self,
            packed=self.packed[first * words :],
            bias=None if self.bias is None else self.bias[first * BLOCK :],
            layout=self.layout._replace(outputs=outputs - first * BLOCK),
            skip=start % BLOCK,
        )


def layout_of(weights: LinearWeights) -> list[int]:
    """The layout of a linear layer of the CPU's kernels as they take it: empty unless it is quantised."""
    return list(weights.data.layout) if isinstance(weights.data, CpuQuantLinear) else []


def skipped_outputs(weights: LinearWeights) -> int:
    """See :class:`CpuQuantLinear`; 0 unless the layer is quantised."""
    return weights.data.skip if isinstance(weights.data, CpuQuantLinear) else 0


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

    def run(self, x_TD: torch.Tensor, routing: Routing | None) -> torch.Tensor:
        """(T, D); without a routing every row uses every expert with weight 1."""
        parts: tuple[Any, ...] = (None, None, None)
        if routing is not None:
            parts = (routing.expert_ids_TK, routing.weights_TK, routing.counts_T)
        return torch.ops.dynamoe_cpu.quant_experts.default(
            self.isa,
            x_TD,
            self.gate_up,
            self.gate_up_layout,
            self.down,
            self.down_layout,
            self.gate_up_bias,
            self.down_bias,
            self.shape,
            *parts,
        )


@dataclass(frozen=True)
class _Codes:
    """One byte per weight, (…, O, I), scales (…, O, G), and offsets likewise or None."""

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None


def pack_linear(
    isa: int, weight_OI: QuantizedWeight, bias: torch.Tensor | None, scheme: ActivationScheme
) -> CpuQuantLinear:
    """Take a quantised weight into the kernels' layout; ``bias`` is padded to whole blocks.

    Raises:
        ValueError: for fp8 codes that are NaN.
    """
    packed, layout = _pack(isa, weight_OI, _read(weight_OI, has_offsets=weight_OI.needs_offsets), scheme)
    return CpuQuantLinear(isa, packed, bias, layout)


def pack_experts(
    isa: int,
    gate_EFD: QuantizedWeight,
    up_EFD: QuantizedWeight,
    down_EDF: QuantizedWeight,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: int,
    scheme: ActivationScheme,
) -> CpuQuantExperts:
    """Take the experts of a layer into the kernels' layout; biases are in that layout already.

    Raises:
        ValueError: for gate and up of different formats or groups, or fp8 codes that are NaN.
    """
    num_experts, width, hidden = gate_EFD.shape
    if gate_EFD.format != up_EFD.format or _group(gate_EFD) != _group(up_EFD):
        raise ValueError(
            f"gate and up must have one format, not {gate_EFD.format.name} in groups of {_group(gate_EFD)} and "
            f"{up_EFD.format.name} in groups of {_group(up_EFD)}"
        )
    has_offsets = gate_EFD.needs_offsets or up_EFD.needs_offsets
    gate, up = (_read(weight, has_offsets=has_offsets) for weight in (gate_EFD, up_EFD))
    both = _interleaved(gate, up)
    del gate, up  # a layer's codes are large, and here twice
    gate_up, gate_up_layout = _pack(isa, gate_EFD, both, scheme)
    del both
    down = _read(down_EDF, has_offsets=down_EDF.needs_offsets)
    down_packed, down_layout = _pack(isa, down_EDF, _map(lambda t: _padded_rows(t, BLOCK).flatten(0, 1), down), scheme)
    shape = (num_experts, hidden, width, activation)
    return CpuQuantExperts(isa, gate_up, gate_up_layout, down_packed, down_layout, gate_up_bias, down_bias, shape)


def _pack(isa: int, weight: QuantizedWeight, stored: _Codes, scheme: ActivationScheme) -> tuple[torch.Tensor, Layout]:
    offsets, dtype = stored.offsets, next(d for d in (*_SCALES[1:], torch.float32) if _holds(d, stored.scales))
    kind = int(offsets is not None)
    if offsets is not None and not _holds(dtype, offsets):
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
    parts = _map(lambda t: t.contiguous(), _Codes(stored.codes, stored.scales, offsets))
    return torch.ops.dynamoe_cpu.pack_quant.default(isa, parts.codes, parts.scales, parts.offsets, layout), layout


def _holds(dtype: torch.dtype, values: torch.Tensor) -> bool:
    """Whether a dtype has exactly these values; of 16 bits only normal numbers and zeros are used."""
    if dtype == torch.float32:
        return True
    same = (values.to(dtype).float() == values) & values.isfinite()
    return bool((same & ((values == 0) | (values.abs() >= torch.finfo(dtype).tiny))).all())


def _zero_points(scales: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor | None:
    """Whole numbers 0 … 15 with ``-zero · scale`` being the offsets, bit by bit; None where there are not such."""
    zeros = torch.where(scales == 0, 0.0, -offsets / scales).round()
    fits = (zeros >= 0) & (zeros <= 15) & (-zeros * scales == offsets)
    return zeros if bool(fits.all()) else None


def _group(weight: QuantizedWeight) -> int:
    return weight.group or weight.in_features


def _read(weight: QuantizedWeight, *, has_offsets: bool) -> _Codes:
    codes = weight.codes()
    if weight.format.codes.dtype == torch.float8_e4m3fn and bool(((codes & 127) == 127).any()):
        raise ValueError(f"an {weight.format.name} weight of shape {weight.shape} holds NaN")
    return _Codes(codes, weight.scales(), weight.offsets() if has_offsets else None)


def _map(function: Any, stored: _Codes) -> _Codes:
    parts = (stored.codes, stored.scales, stored.offsets)
    return _Codes(*(None if t is None else function(t) for t in parts))  # type: ignore[arg-type]


def _interleaved(gate: _Codes, up: _Codes) -> _Codes:
    """Gated blocks of all experts: 16 gate outputs, then the 16 up outputs that belong to them."""

    def join(gate_EFX: torch.Tensor | None, up_EFX: torch.Tensor | None) -> Any:
        if gate_EFX is None or up_EFX is None:
            return None
        halves = [_padded_rows(t, GATED).unflatten(1, (-1, GATED)) for t in (gate_EFX, up_EFX)]
        return torch.cat(halves, 2).flatten(0, 2)

    return _Codes(join(gate.codes, up.codes), join(gate.scales, up.scales), join(gate.offsets, up.offsets))


def _padded_rows(t_EOX: torch.Tensor, multiple: int) -> torch.Tensor:
    more = -t_EOX.shape[1] % multiple
    return F.pad(t_EOX, (0, 0, 0, more)) if more else t_EOX  # padding by nothing would copy


class CpuQuantPacking(TorchBackend):
    """How quantised weights come into the kernels' layout; :class:`.CpuBackend` runs them."""

    _isa: int

    def pack_quantized_linear(
        self, weight_OI: QuantizedWeight, bias_O: torch.Tensor | None = None, scheme: ActivationScheme = UNQUANTIZED
    ) -> LinearWeights:
        scheme.check(weight_OI.format, weight_OI.group)
        if weight_OI.format.cpu is None:
            return self.pack_linear(self._dequantized(weight_OI, scheme), bias_O)
        bias = None if bias_O is None else padded(bias_O.to(self.dtype), BLOCK)
        data = pack_linear(self._isa, weight_OI, bias, scheme)
        return LinearWeights(
            out_features=weight_OI.out_features,
            in_features=weight_OI.in_features,
            dtype=self.dtype,
            data=data,
            nbytes=count_bytes(data.packed, bias),
        )

    def pack_quantized_experts(
        self,
        gate_EFD: QuantizedWeight,
        up_EFD: QuantizedWeight,
        down_EDF: QuantizedWeight,
        activation: str,
        gate_bias_EF: torch.Tensor | None = None,
        up_bias_EF: torch.Tensor | None = None,
        down_bias_ED: torch.Tensor | None = None,
        scheme: ActivationScheme = UNQUANTIZED,
    ) -> ExpertWeights:
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
        num_experts, expert_size, hidden_size = check_experts(gate_EFD, up_EFD, down_EDF)
        for weight in (gate_EFD, up_EFD, down_EDF):
            scheme.check(weight.format, weight.group)
        if any(weight.format.cpu is None for weight in (gate_EFD, up_EFD, down_EDF)):
            gate, up, down = (self._dequantized(weight, scheme) for weight in (gate_EFD, up_EFD, down_EDF))
            return self.pack_experts(gate, up, down, activation, gate_bias_EF, up_bias_EF, down_bias_ED)
        gate_up_bias = join_gate_up_bias(gate_bias_EF, up_bias_EF, self.dtype)
        down_bias = None if down_bias_ED is None else padded(down_bias_ED.to(self.dtype), BLOCK)
        number = ACTIVATIONS.index(activation)
        data = pack_experts(self._isa, gate_EFD, up_EFD, down_EDF, gate_up_bias, down_bias, number, scheme)
        return ExpertWeights(
            num_experts=num_experts,
            hidden_size=hidden_size,
            expert_size=expert_size,
            activation=activation,
            dtype=self.dtype,
            data=data,
            nbytes=count_bytes(data.gate_up, data.down, gate_up_bias, down_bias),
        )

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
