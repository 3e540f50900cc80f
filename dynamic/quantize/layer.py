"""One layer's tensors outside of any backend: read from a checkpoint, changed, packed for a backend, written.

Shape suffixes as in ``kernels/api/types.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ...kernels.api.format_join import concatenate
from ...kernels.api.formats import UNQUANTIZED, ActivationScheme
from ...kernels.api.quantized_weight import QuantizedWeight
from ...kernels.api.types import ExpertWeights, LinearWeights
from ...kernels.torch.backend import TorchBackend
from ..checkpoint.compressed_writer import compressed
from ..checkpoint.weights import Checkpoint
from ..model.attention.kind import AttentionLayout
from ..model.channel_order import in_order, inverse
from ..model.family import Family, one_each
from ..model.layer_weights import LayerWeights, packed_router_tensors
from ..model.layout import FFNLayout, LayerLayout, expert_tensors
from ..model.norms import TensorLayout
from ..model.spec import ModelSpec

Weight = torch.Tensor | QuantizedWeight


@dataclass(frozen=True, kw_only=True)
class FFNTensors:
    """Experts of a layer, or a dense FFN as one expert. Biases: of gate, up and down, (E, …), or none."""

    gate_EFD: Weight
    up_EFD: Weight
    down_EDF: Weight
    biases: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LinearTensors:
    """A linear layer: weights whose outputs follow each other, and their biases, or none."""

    weights: tuple[Weight, ...]
    biases: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LayerTensors:
    """What :class:`.LayerWeights` is made of; floating tensors are float32. Fields as there.

    Arguments:
        attention, norm_layouts: what the tensors of attention and of the norms are.
        linears, tensors: of attention, by the names of the fields of the kind's weights.
        router_bias_E: of the router's linear layer.
        router_tensors: what else the router reads, by fields of :class:`.LayerWeights`.
    """

    attention: AttentionLayout
    norm_layouts: Mapping[str, TensorLayout]
    norms: Mapping[str, torch.Tensor]
    linears: Mapping[str, LinearTensors]
    tensors: Mapping[str, torch.Tensor]
    ffn: FFNTensors
    router_ED: torch.Tensor | None
    router_bias_E: torch.Tensor | None
    router_tensors: Mapping[str, torch.Tensor]
    shared: FFNTensors | None
    shared_gate_1D: torch.Tensor | None

    @property
    def qkv(self) -> tuple[Weight, ...]:
        """Of queries, keys and values."""
        return self.linears["qkv"].weights

    @property
    def o(self) -> Weight:
        """Of attention's output."""
        return self.linears["o"].weights[0]

    def with_attention(self, **weights: tuple[Weight, ...]) -> LayerTensors:
        """The layer with other weights in some of attention's linear layers."""
        changed = {name: replace(self.linears[name], weights=parts) for name, parts in weights.items()}
        return replace(self, linears={**self.linears, **changed})


def plain(weight: Weight) -> torch.Tensor:
    """A weight that is known not to be quantised yet."""
    assert isinstance(weight, torch.Tensor)
    return weight


def read_layer(checkpoint: Checkpoint, layout: LayerLayout, spec: ModelSpec) -> LayerTensors:
    """A layer in float32, copied from the file."""

    orders = layout.attention.orders()

    def one(*names: str) -> torch.Tensor:
        return torch.cat([in_order(checkpoint.view(name).float(), orders.get(name, ())) for name in names])

    def maybe(name: str) -> torch.Tensor | None:
        return one(name) if name else None

    def ffn(part: FFNLayout) -> FFNTensors:
        biases = tuple(one(*names).view(len(names), -1) for names in part.biases)
        gate, up, down = (t.contiguous() for t in expert_tensors(part, spec.hidden_size, one))
        return FFNTensors(gate_EFD=gate, up_EFD=up, down_EDF=down, biases=biases)

    linears = {
        field: LinearTensors(
            weights=tuple(one(name) for name in linear.weights), biases=tuple(one(name) for name in linear.biases)
        )
        for field, linear in layout.attention.linears.items()
    }
    return LayerTensors(
        attention=layout.attention,
        norm_layouts=layout.norms,
        norms={name: one(tensor.name) for name, tensor in layout.norms.items()},
        linears=linears,
        tensors={field: one(tensor.name) for field, tensor in layout.attention.tensors.items()},
        ffn=ffn(layout.ffn),
        router_ED=maybe(layout.router),
        router_bias_E=maybe(layout.router_bias),
        router_tensors={field: one(name) for field, name in layout.router_tensors.items()},
        shared=ffn(layout.shared) if layout.shared else None,
        shared_gate_1D=maybe(layout.shared_gate),
    )


def pack_layer(
    backend: TorchBackend, layer: LayerTensors, activation: str, scheme: ActivationScheme = UNQUANTIZED
) -> LayerWeights:
    """The layer packed for the backend; ``scheme``: how the inputs of quantised weights are rounded."""

    def kept(tensors: Mapping[str, torch.Tensor], layouts: Mapping[str, TensorLayout]) -> dict[str, torch.Tensor]:
        return {
            name: tensor.to(backend.device, layouts[name].dtype(backend.dtype)) + layouts[name].offset
            for name, tensor in tensors.items()
        }

    def linear(weight: Weight, bias: torch.Tensor | None = None) -> LinearWeights:
        if isinstance(weight, torch.Tensor):
            return backend.pack_linear(weight, bias)
        return backend.pack_quantized_linear(weight, bias, scheme)

    def ffn(part: FFNTensors) -> ExpertWeights:
        gate, up, down = part.gate_EFD, part.up_EFD, part.down_EDF
        if isinstance(gate, torch.Tensor):
            return backend.pack_experts(gate, plain(up), plain(down), activation, *part.biases)
        assert not isinstance(up, torch.Tensor)
        assert not isinstance(down, torch.Tensor)
        return backend.pack_quantized_experts(gate, up, down, activation, *part.biases, scheme=scheme)

    def joined(parts: LinearTensors) -> LinearWeights:
        quantized = [part for part in parts.weights if not isinstance(part, torch.Tensor)]
        weight = concatenate(quantized) if quantized else torch.cat([plain(part) for part in parts.weights])
        return linear(weight, torch.cat(parts.biases) if parts.biases else None)

    linears = {field: joined(parts) for field, parts in layer.linears.items()}
    return LayerWeights(
        norms=kept(layer.norms, layer.norm_layouts),
        attention=layer.attention.kind.pack({**linears, **kept(layer.tensors, layer.attention.tensors)}, backend),
        ffn=ffn(layer.ffn),
        router=None if layer.router_ED is None else linear(layer.router_ED, layer.router_bias_E),
        **packed_router_tensors(layer.router_tensors, backend.device, backend.dtype),
        shared=None if layer.shared is None else ffn(layer.shared),
        shared_gate=None if layer.shared_gate_1D is None else linear(layer.shared_gate_1D),
        latent_in=None,  # only of models with states, which are not written
        latent_out=None,
    )


def fold_into_attention_norm(layer: LayerTensors, scale_D: torch.Tensor) -> LayerTensors:
    """Divide what attention's projections read by a scale, all but that of its output; multiply their weights by it."""
    scaled = {
        field: tuple(plain(weight) * scale_D for weight in part.weights)
        for field, part in layer.linears.items()
        if field != "o"
    }
    norms = {**layer.norms, "attention": layer.norms["attention"] / scale_D}
    return replace(layer.with_attention(**scaled), norms=norms)


def fold_into_ffn_norm(layer: LayerTensors, scale_D: torch.Tensor) -> LayerTensors:
    """The same for all that reads the normed input of the FFN: experts, router, shared expert and its gate.

    Raises:
        ValueError: for a router with a norm of its own, which undoes the scale.
    """
    if "router_norm_D" in layer.router_tensors:
        raise ValueError("a router that norms its input cannot read scaled ones; a method that scales none can be used")

    def ffn(part: FFNTensors) -> FFNTensors:
        return replace(part, gate_EFD=plain(part.gate_EFD) * scale_D, up_EFD=plain(part.up_EFD) * scale_D)

    return replace(
        layer,
        norms={**layer.norms, "ffn": layer.norms["ffn"] / scale_D},
        ffn=ffn(layer.ffn),
        router_ED=None if layer.router_ED is None else layer.router_ED * scale_D,
        shared=None if layer.shared is None else ffn(layer.shared),
        shared_gate_1D=None if layer.shared_gate_1D is None else layer.shared_gate_1D * scale_D,
    )


def fold_into_values(layer: LayerTensors, scale_GC: torch.Tensor, queries_per_key: int) -> LayerTensors:
    """Divide the values by a scale, and multiply the output projection's weights by it.

    All query heads that share values share their scales.
    """
    q, k, v = layer.qkv
    flat_X = scale_GC.flatten()
    spread_X = scale_GC.repeat_interleave(queries_per_key, 0).flatten()
    layer = layer.with_attention(qkv=(q, k, plain(v) / flat_X[:, None]), o=(plain(layer.o) * spread_X,))
    if not (biases := layer.linears["qkv"].biases):
        return layer
    qkv = replace(layer.linears["qkv"], biases=(*biases[:2], biases[2] / flat_X))
    return replace(layer, linears={**layer.linears, "qkv": qkv})


def fold_into_up(ffn: FFNTensors, scale_EF: torch.Tensor) -> FFNTensors:
    """Divide what the up projections give by a scale, and multiply the down projections' inputs by it."""
    biases = ffn.biases
    if biases:
        biases = (biases[0], biases[1] / scale_EF, biases[2])
    return replace(
        ffn,
        up_EFD=plain(ffn.up_EFD) / scale_EF[:, :, None],
        down_EDF=plain(ffn.down_EDF) * scale_EF[:, None, :],
        biases=biases,
    )


def layer_tensors(
    layer: LayerTensors, layout: LayerLayout, family: Family, prefix: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """A layer by tensor name.

    Experts are written one by one, however the source stored them: groups of inputs then begin with each expert.

    Arguments:
        layer: with quantised projections and experts.
        layout: names of the source's tensors.
        prefix: of the layer's names, with the dot at its end.
        dtype: of what is not quantised.
    """
    kept: list[tuple[str, torch.Tensor | None]] = [
        *((layout.norms[name].name, tensor) for name, tensor in layer.norms.items()),
        (layout.router, layer.router_ED),
        (layout.router_bias, layer.router_bias_E),
        (layout.shared_gate, layer.shared_gate_1D),
        *((layout.attention.tensors[field].name, tensor) for field, tensor in layer.tensors.items()),
    ]
    weights: list[tuple[str, Weight]] = []
    for field, part in layer.linears.items():
        linear = layout.attention.linears[field]
        weights += zip(linear.weights, part.weights, strict=True)
        kept += zip(linear.biases, part.biases, strict=True)
    for part, ffn in ((layout.ffn, layer.ffn), (layout.shared, layer.shared)):
        if part is not None and ffn is not None:
            weights += _ffn_weights(ffn, part, family, prefix)
            for names, biases in zip(part.biases, ffn.biases, strict=True):
                kept += zip(names, biases, strict=True)
    stored = {name: inverse(order) for name, order in layout.attention.orders().items()}
    out = {
        name: in_order(tensor.to(dtype), stored.get(name, ())).contiguous()
        for name, tensor in kept
        if name and tensor is not None
    }
    out |= {layout.router_tensors[field]: tensor for field, tensor in layer.router_tensors.items()}
    for name, weight in weights:
        assert not isinstance(weight, torch.Tensor)
        out |= compressed(name, in_order(weight, stored.get(name, ())))
    return out


def _ffn_weights(ffn: FFNTensors, layout: FFNLayout, family: Family, prefix: str) -> list[tuple[str, Weight]]:
    if layout.num_experts == 1 and layout.gate:
        names = [(layout.gate[0], layout.up[0], layout.down[0])]
    else:
        each = one_each(family)
        patterns = (each.gate, each.up, each.down)
        names = [
            tuple(prefix + pattern.replace("{e}", str(expert)) for pattern in patterns)
            for expert in range(layout.num_experts)
        ]
    out: list[tuple[str, Weight]] = []
    for expert, triple in enumerate(names):
        for name, weight in zip(triple, (ffn.gate_EFD, ffn.up_EFD, ffn.down_EDF), strict=True):
            assert not isinstance(weight, torch.Tensor)
            out.append((name, weight.expert(expert)))
    return out
