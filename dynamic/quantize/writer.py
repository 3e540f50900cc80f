"""Quantised layers written the way compressed-tensors lays them out: ``pack-quantized`` int4, ``int-quantized`` int8.

Experts are written one by one, whichever way the source stored them: groups of inputs then begin with each expert.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ...kernels.api.formats import Int4Weight, Int8Weight, QuantizedWeight, pack_int4
from ..model.family import Family, one_each
from ..model.layout import FFNLayout, LayerLayout
from .layer import FFNTensors, LayerTensors, Weight
from .methods import CalibratedMethod


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


def compressed(name: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """The tensors that stand for a linear layer's weight.

    Arguments:
        name: of the weight, with ``.weight`` at its end.
        weight: (O, I), int8 or int4. Offsets (GGUF's Q4_1) are ours: the library knows zero points only.
    """
    if isinstance(weight, Int8Weight):
        return {name: weight.data.contiguous(), f"{name}_scale": weight.grouped_scale().contiguous()}
    assert isinstance(weight, Int4Weight)
    out = {
        f"{name}_packed": _words(weight.data),
        f"{name}_scale": weight.scale.contiguous(),
        f"{name}_shape": torch.tensor(weight.shape),
    }
    if weight.offset is not None:
        out[f"{name}_offset"] = weight.offset.contiguous()
    if weight.zero is not None:
        out[f"{name}_zero_point"] = _words(pack_int4(weight.zero.T)).T.contiguous()
    return out


def _words(data: torch.Tensor) -> torch.Tensor:
    """Bytes of every row as whole little-endian 32-bit words, zeros at the end."""
    return F.pad(data, (0, -data.shape[-1] % 4)).contiguous().view(torch.int32)


def quantization_config(method: CalibratedMethod, unquantized: list[str]) -> dict[str, Any]:
    """What ``config.json`` says about the weights.

    Arguments:
        unquantized: names of linear modules that stay as they are.
    """
    weights: dict[str, Any] = {"type": "int", "symmetric": True, "dynamic": False}
    activations: dict[str, Any] | None = None
    if method.name == "smoothquant":
        form = "int-quantized"
        weights |= {"num_bits": 8, "strategy": "channel"}
        activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    else:
        form = "pack-quantized"
        weights |= {"num_bits": 4, "strategy": "group", "group_size": method.group, "symmetric": method.symmetric}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": unquantized,
        "kv_cache_scheme": None,
    }


def kept_codes_config() -> dict[str, Any]:
    """What ``config.json`` says about codes that were kept from a GGUF file: the same layout, but for offsets."""
    weights = {"type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    groups = {f"gguf{bits}": {"weights": {**weights, "num_bits": bits}} for bits in (4, 8)}
    return {"quant_method": "dynamoe", "config_groups": groups}


def save_whole(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write a safetensors file that is there as a whole or not at all."""
    from safetensors.torch import save_file

    unfinished = file.with_suffix(".unfinished")
    save_file(tensors, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, file)
