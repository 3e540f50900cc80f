"""The tensors of a quantised layer in a checkpoint.

Experts are written one by one, however the source stored them: groups of inputs then begin with each expert.
"""

from __future__ import annotations

import torch

from ..checkpoint.compressed_writer import compressed
from ..model.family import Family, one_each
from ..model.layout import FFNLayout, LayerLayout
from .layer import FFNTensors, LayerTensors, Weight


def layer_tensors(
    layer: LayerTensors, layout: LayerLayout, family: Family, prefix: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """A layer by tensor name.

    Arguments:
        layer: with quantised projections and experts.
        layout: names of the source's tensors.
        prefix: of the layer's names, with the dot at its end.
        dtype: of what is not quantised.
    """
    plain: list[tuple[str, torch.Tensor | None]] = [
        (layout.attention_norm, layer.attention_norm_D),
        (layout.ffn_norm, layer.ffn_norm_D),
        (layout.router, layer.router_ED),
        (layout.shared_gate, layer.shared_gate_1D),
        *((layout.attention.tensors[field].name, tensor) for field, tensor in layer.tensors.items()),
    ]
    weights: list[tuple[str, Weight]] = []
    for field, part in layer.linears.items():
        linear = layout.attention.linears[field]
        weights += zip(linear.weights, part.weights, strict=True)
        plain += zip(linear.biases, part.biases, strict=True)
    for part, ffn in ((layout.ffn, layer.ffn), (layout.shared, layer.shared)):
        if part is not None and ffn is not None:
            weights += _ffn_weights(ffn, part, family, prefix)
            plain += [(name, bias.view(-1)) for name, bias in zip(part.biases, ffn.biases, strict=True)]
    out = {name: tensor.to(dtype).contiguous() for name, tensor in plain if name and tensor is not None}
    for name, weight in weights:
        assert not isinstance(weight, torch.Tensor)
        out |= compressed(name, weight)
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
