"""The calibrated methods on a whole layer: which statistics each part uses, and where scales are folded in.

Shape suffixes as in ``kernels/api/types.py``; B experts treated at once, X outputs of several projections.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ...kernels.api.format_join import stack_experts
from ...kernels.api.formats import GROUPS, INT8_PER_GROUP, UNQUANTIZED, ActivationScheme
from ...kernels.api.quantized_weight import QuantizedWeight
from ...kernels.api.ranges import check_ranges
from ...kernels.api.rounding import quantize_int4, quantize_int8
from ...kernels.reference.operations import CLAMPED_SWIGLU
from ..model.attention.gqa import GqaSpec
from ..model.spec import ModelSpec
from .gptq import gptq_int4
from .grid import searched_grid
from .inputs import LayerInputs, neurons
from .layer import (
    FFNTensors,
    LayerTensors,
    fold_into_attention_norm,
    fold_into_ffn_norm,
    fold_into_up,
    fold_into_values,
    plain,
)
from .scaling import InputStatistics, ScaledLayers, awq_scale, smooth_scale

METHODS = ("gptq", "awq", "smoothquant")
_CHUNK_BYTES = 256 << 20  # of second moments that are held at once
ROUTED, POOLED, NEAREST = "own tokens", "all of the layer's tokens", "round to nearest"


@dataclass(frozen=True, kw_only=True)
class CalibratedMethod:
    """How weights are quantised with calibration.

    Arguments:
        name: ``gptq`` or ``awq`` (int4 weights), ``smoothquant`` (int8 weights, int8 activations).
        group: inputs that share a scale, with int4: 32, 64 or 128.
        symmetric: whether int4 zero points are 8 everywhere.
        damping: GPTQ's, see :func:`gptq_int4`.
        strength: SmoothQuant's, see :func:`smooth_scale`.
        fewest_tokens: an expert that saw fewer tokens than this uses all tokens of its layer.

    Raises:
        ValueError: naming the value that is out of range.
    """

    name: str
    group: int = 64
    symmetric: bool = True
    damping: float = 0.01
    strength: float = 0.5
    fewest_tokens: int = 64

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise ValueError(f"quantization must be one of {', '.join(METHODS)}, not {self.name!r}")
        if self.group not in GROUPS:
            raise ValueError(f"group must be one of {', '.join(map(str, GROUPS))}, not {self.group}")
        check_ranges(self, "damping", above=0, most=1)
        check_ranges(self, "strength", least=0, most=1)
        check_ranges(self, "fewest_tokens", least=1)

    @property
    def scheme(self) -> ActivationScheme:
        """How the inputs of the quantised weights are rounded."""
        return INT8_PER_GROUP if self.name == "smoothquant" else UNQUANTIZED


class LayerMethod:
    """A method applied to one layer. ``sources`` counts which rows the layer's experts were calibrated on.

    Arguments:
        norm_dtype: in which norms are stored: scales are chosen so that what is folded into a norm is stored exactly.
    """

    def __init__(self, method: CalibratedMethod, spec: ModelSpec, norm_dtype: torch.dtype) -> None:
        self.method = method
        self.spec = spec
        self.norm_dtype = norm_dtype
        self.sources: Counter[str] = Counter()

    def scaled(self, layer: LayerTensors, inputs: LayerInputs) -> tuple[LayerTensors, LayerInputs]:
        """The layer with scales folded into it, which computes the same, and its parts' new inputs."""
        if self.method.name == "gptq":
            return layer, inputs
        layer, inputs = self._scale_attention(layer, inputs)
        layer, inputs = self._scale_ffn_inputs(layer, inputs)
        if self.spec.activation == CLAMPED_SWIGLU:  # what the up projections give is no factor of its result
            return layer, inputs
        shared = layer.shared
        if shared is not None:
            shared = fold_into_up(shared, self._neuron_scales(shared, [inputs.ffn_TD]))
        rows = [part for _, chunk in self._chunks(layer.ffn, inputs) for part in chunk]
        return replace(layer, ffn=fold_into_up(layer.ffn, self._neuron_scales(layer.ffn, rows)), shared=shared), inputs

    def quantized(self, layer: LayerTensors, inputs: LayerInputs) -> LayerTensors:
        """The layer with its projections and experts quantised."""
        attention, output = InputStatistics.of([inputs.attention_TD]), InputStatistics.of([inputs.o_TX])
        linears = {
            field: tuple(self._one(plain(weight), output if field == "o" else attention) for weight in part.weights)
            for field, part in layer.linears.items()
        }
        shared = layer.shared
        if shared is not None:
            shared = self._ffn(shared, [(range(1), [inputs.ffn_TD])])
        ffn = self._ffn(layer.ffn, self._chunks(layer.ffn, inputs, count=True))
        layer = layer.with_attention(**linears)
        return replace(layer, ffn=ffn, shared=shared)

    def _scale_attention(self, layer: LayerTensors, inputs: LayerInputs) -> tuple[LayerTensors, LayerInputs]:
        statistics = InputStatistics.of([inputs.attention_TD])
        readers = [part for field, part in layer.linears.items() if field != "o"]
        weight_XD = torch.cat([plain(weight) for part in readers for weight in part.weights])
        scale_D = self._input_scale([ScaledLayers(weight_BOI=weight_XD[None], statistics=statistics)], statistics)
        scale_D = _storable(layer.norms["attention"], scale_D, self.norm_dtype)
        layer = fold_into_attention_norm(layer, scale_D)
        inputs = replace(inputs, attention_TD=inputs.attention_TD / scale_D)
        kind = layer.attention.kind
        assert isinstance(kind, GqaSpec)
        if kind.clip is not None:  # clipped values are not the projection's to scale
            return layer, inputs
        # Heads that share their values share their scales: the statistics are those of all of them together.
        groups, repeats = kind.num_kv_heads, kind.num_heads // kind.num_kv_heads
        rows_TX = inputs.o_TX.unflatten(1, (groups, repeats, -1)).transpose(1, 2).flatten(2).flatten(0, 1)
        weight_DGRC = plain(layer.o).unflatten(1, (groups, repeats, -1))
        weight_XI = weight_DGRC.permute(2, 0, 1, 3).flatten(2).flatten(0, 1)
        shared = InputStatistics.of([rows_TX])
        scale_GC = self._input_scale([ScaledLayers(weight_BOI=weight_XI[None], statistics=shared)], shared)
        scale_GC = scale_GC.view(groups, -1)
        spread_X = scale_GC.repeat_interleave(repeats, 0).flatten()
        return fold_into_values(layer, scale_GC, repeats), replace(inputs, o_TX=inputs.o_TX / spread_X)

    def _scale_ffn_inputs(self, layer: LayerTensors, inputs: LayerInputs) -> tuple[LayerTensors, LayerInputs]:
        """One scale for all experts: they read the same norm's output."""
        everything = InputStatistics.of([inputs.ffn_TD])
        readers = []
        for experts, rows in self._chunks(layer.ffn, inputs):
            part = slice(experts.start, experts.stop)
            weight_BXD = torch.cat((plain(layer.ffn.gate_EFD)[part], plain(layer.ffn.up_EFD)[part]), 1)
            statistics = everything if inputs.routing is None else InputStatistics.of(rows)
            readers.append(ScaledLayers(weight_BOI=weight_BXD, statistics=statistics))
        if layer.shared is not None:
            weight_1XD = torch.cat((plain(layer.shared.gate_EFD), plain(layer.shared.up_EFD)), 1)
            readers.append(ScaledLayers(weight_BOI=weight_1XD, statistics=everything))
        scale_D = _storable(layer.norms["ffn"], self._input_scale(readers, everything), self.norm_dtype)
        return fold_into_ffn_norm(layer, scale_D), replace(inputs, ffn_TD=inputs.ffn_TD / scale_D)

    def _input_scale(self, readers: list[ScaledLayers], statistics: InputStatistics) -> torch.Tensor:
        """One scale per input of all that reads it."""
        if self.method.name == "awq":
            return awq_scale(readers, statistics.mean_abs_BI[0], self._nearest)
        largest_I = torch.stack([part.weight_BOI.abs().amax((0, 1)) for part in readers]).amax(0)
        return smooth_scale(statistics.max_abs_BI[0], largest_I, self.method.strength)

    def _neuron_scales(self, ffn: FFNTensors, rows: list[torch.Tensor]) -> torch.Tensor:
        """For the neurons of every expert, (E, F)."""
        down_EDF, scales = plain(ffn.down_EDF), []
        for expert, x_TD in enumerate(rows):
            statistics = InputStatistics.of([neurons(x_TD, ffn, expert, self.spec.activation)])
            layers = ScaledLayers(weight_BOI=down_EDF[expert, None], statistics=statistics)
            scales.append(self._input_scale([layers], statistics))
        return torch.stack(scales)

    def _nearest(self, weight_BOI: torch.Tensor) -> torch.Tensor:
        return quantize_int4(weight_BOI, group=self.method.group, symmetric=self.method.symmetric).dequantize()

    def _chunks(
        self, ffn: FFNTensors, inputs: LayerInputs, *, count: bool = False
    ) -> Iterator[tuple[range, list[torch.Tensor]]]:
        """Experts, as many as are treated at once, with the rows that each is calibrated on."""
        num_experts, _, hidden = ffn.gate_EFD.shape
        at_once = max(1, _CHUNK_BYTES // (4 * hidden * hidden))
        for first in range(0, num_experts, at_once):
            experts, rows = range(first, min(first + at_once, num_experts)), []
            for expert in experts:
                own_TD = inputs.expert_rows(expert)
                enough = len(own_TD) >= self.method.fewest_tokens or inputs.routing is None
                rows.append(own_TD if enough else inputs.ffn_TD)
                if count:
                    usable = bool((rows[-1].isfinite().all() & (rows[-1] != 0).any()).item())
                    self.sources[(ROUTED if enough else POOLED) if usable else NEAREST] += 1
            yield experts, rows

    def _ffn(self, ffn: FFNTensors, chunks: Iterator[tuple[range, list[torch.Tensor]]] | list) -> FFNTensors:
        gates, ups, downs = [], [], []
        for experts, rows in chunks:
            part, width = slice(experts.start, experts.stop), ffn.gate_EFD.shape[1]
            gate_up = torch.cat((plain(ffn.gate_EFD)[part], plain(ffn.up_EFD)[part]), 1)
            alike = all(x_TD is rows[0] for x_TD in rows)  # one set of statistics serves all of them
            both = self._quantize(gate_up, InputStatistics.of(rows[:1] if alike else rows))
            gates.append(both.rows(0, width))
            ups.append(both.rows(width, 2 * width))
            inner = [neurons(x_TD, ffn, e, self.spec.activation) for e, x_TD in zip(experts, rows, strict=True)]
            downs.append(self._quantize(plain(ffn.down_EDF)[part], InputStatistics.of(inner)))
        return FFNTensors(
            gate_EFD=stack_experts(gates), up_EFD=stack_experts(ups), down_EDF=stack_experts(downs), biases=ffn.biases
        )

    def _one(self, weight_OI: torch.Tensor, statistics: InputStatistics) -> QuantizedWeight:
        return self._quantize(weight_OI[None], statistics).expert(0)

    def _quantize(self, weight_BOI: torch.Tensor, statistics: InputStatistics) -> QuantizedWeight:
        method = self.method
        if method.name == "smoothquant":
            return quantize_int8(weight_BOI)
        eye_II = torch.eye(weight_BOI.shape[-1], device=weight_BOI.device)  # with it, all methods round to nearest
        hessian_BII = torch.where(statistics.usable_B[:, None, None], statistics.hessian_BII, eye_II)
        if method.name == "gptq":
            return gptq_int4(
                weight_BOI, hessian_BII, group=method.group, symmetric=method.symmetric, damping=method.damping
            )
        grid = searched_grid(weight_BOI, hessian_BII, method.group, method.symmetric)
        return grid.weight(grid.nearest(weight_BOI))


def _storable(norm_D: torch.Tensor, scale_D: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale nearest to the one that is wanted with which the norm, divided by it, is a number of that dtype."""
    stored_D = (norm_D / scale_D).to(dtype).float()
    exact_D = norm_D / stored_D
    return torch.where((stored_D != 0) & exact_D.isfinite() & (exact_D > 0), exact_D, 1.0)
