"""Writes quantised checkpoints as others lay them out, for tests.

They are made by compressed-tensors where that library writes them, else code by code as the layouts are defined.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
# Every projection's inputs are whole groups, and its outputs whole words, as the layouts of others want them.
SIZES = {
    "llama": {"intermediate_size": 128},
    "mixtral": {"intermediate_size": 64},
    "qwen2_moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 128},
}


@dataclass(frozen=True)
class Grouped:
    """A weight rounded to groups, without a format: codes 0 … 15 (O, I); scales and zero points (O, G)."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    group: int

    def weight(self) -> torch.Tensor:
        spread = (t.repeat_interleave(self.group, -1)[:, : self.codes.shape[1]] for t in (self.scale, self.zero))
        scale, zero = spread
        return (self.codes - zero) * scale


def round_in_groups(weight: torch.Tensor, group: int, symmetric: bool) -> Grouped:
    parts = weight.float().unflatten(1, (-1, min(group, weight.shape[1])))
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    if symmetric:
        scale, zero = (torch.maximum(high, -low) / 7).half().float(), torch.full_like(high, 8)
    else:
        scale = ((high - low) / 15).half().float()
        zero = (-low / scale).round().clamp(0, 15)
    codes = ((parts / scale[..., None]).round() + zero[..., None]).clamp(0, 15)
    return Grouped(codes.flatten(1), scale, zero, group)


def words(nibbles: torch.Tensor, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> torch.Tensor:
    """(X, 8 W) codes to (X, W) words: the code at ``order[n]`` of every eight becomes nibble n."""
    eights = nibbles.long().unflatten(1, (-1, 8))
    total = sum(eights[..., source] << (4 * nibble) for nibble, source in enumerate(order))
    assert isinstance(total, torch.Tensor)
    return (((total + 2**31) % 2**32) - 2**31).int()


def gptq(module: str, g: Grouped, *, shift: int = 1, order: bool = True) -> Tensors:
    out = {
        "qweight": words(g.codes.to(torch.int64)).T.contiguous(),
        "qzeros": words((g.zero.T - shift) % 16),
        "scales": g.scale.T.half().contiguous(),
    }
    if order:
        out["g_idx"] = (torch.arange(g.codes.shape[1]) // g.group).int()
    return {f"{module}.{part}": t.contiguous() for part, t in out.items()}


def awq(module: str, g: Grouped) -> Tensors:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    parts = {"qweight": words(g.codes.T, order), "qzeros": words(g.zero.T, order), "scales": g.scale.T.half()}
    return {f"{module}.{part}": t.contiguous() for part, t in parts.items()}


def block_fp8(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    rows, columns = (math.ceil(n / 128) for n in weight.shape)
    scale = torch.empty(rows, columns)
    codes, plain = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(weight.shape)
    for i in range(rows):
        for j in range(columns):
            at = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            scale[i, j] = weight[at].abs().max() / 448
            codes[at] = (weight[at] / scale[i, j]).to(torch.float8_e4m3fn)
            plain[at] = codes[at].float() * scale[i, j]
    return {f"{module}.weight": codes, f"{module}.weight_scale_inv": scale}, plain


def with_compressed_tensors(module: str, weight: torch.Tensor, settings: dict) -> tuple[Tensors, torch.Tensor]:
    """Quantised and dequantised by the library."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationConfig.model_validate(settings).config_groups["group_0"]
    arguments = scheme.weights
    if arguments.strategy == "group":
        parts = weight.unflatten(1, (-1, arguments.group_size))
        low, high = parts.amin(-1), parts.amax(-1)
    elif arguments.strategy == "channel":
        low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    else:
        low, high = weight.amin()[None], weight.amax()[None]
    scale, zero = calculate_qparams(low, high, arguments)
    parts = {"weight": weight.clone(), "weight_scale": scale, "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(settings["format"])
    stored = compressor.compress(parts, scheme)
    plain = compressor.decompress(dict(stored), scheme)["weight"].float()
    if arguments.symmetric:
        stored.pop("weight_zero_point", None)
    return {f"{module}.{part}": t.contiguous() for part, t in stored.items()}, plain


def compressed_settings(form: str, weights: dict, inputs: dict | None = None) -> dict:
    weights = {"type": "int", "symmetric": True, **weights}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


FP8_TOKENS = {"type": "float", "num_bits": 8, "strategy": "token", "dynamic": True}
LAYOUTS: dict[str, dict] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
    "gptq-asym": {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True, "sym": False},
    "gptq-v2": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"},
    "gptq-all": {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
    "fp8-block": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"},
    "ct-int4": compressed_settings("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 64}),
    "ct-int4-asym": compressed_settings(
        "pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}
    ),
    "ct-int4-channel": compressed_settings("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
    "ct-int8-packed": compressed_settings("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "ct-int8-packed-groups": compressed_settings(
        "pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 64}
    ),
    "ct-int8-groups": compressed_settings("int-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32}),
    "ct-int8": compressed_settings("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "ct-fp8": compressed_settings(
        "float-quantized", {"type": "float", "num_bits": 8, "strategy": "channel"}, FP8_TOKENS
    ),
    "ct-fp8-tensor": compressed_settings("float-quantized", {"type": "float", "num_bits": 8, "strategy": "tensor"}),
}


def store(module: str, weight: torch.Tensor, settings: dict) -> tuple[Tensors, torch.Tensor]:
    """A linear layer's weight as a layout stores it, and what that stands for."""
    method = settings["quant_method"]
    if method == "compressed-tensors":
        return with_compressed_tensors(module, weight, settings)
    if method == "fp8":
        return block_fp8(module, weight)
    group = settings["group_size"] if settings["group_size"] > 0 else weight.shape[1]
    g = round_in_groups(weight, group, settings.get("sym", not settings.get("zero_point")))
    if method == "awq":
        return awq(module, g), g.weight()
    return gptq(module, g, shift=0 if settings.get("checkpoint_format") else 1), g.weight()


def store_all(source: Path, target: Path, settings: dict) -> Tensors:
    """Write a quantised copy of a checkpoint; what its weights stand for."""
    plain, stored = {}, {}
    for name, weight in unfused(load_file(source / "model.safetensors")).items():
        linear = name.endswith("_proj.weight") or ".experts." in name
        if linear:
            parts, plain[name] = store(name.removesuffix(".weight"), weight.float(), settings)
            stored |= parts
        else:
            plain[name] = stored[name] = weight
    write(source, target, stored, settings)
    return plain


def unfused(weights: Tensors) -> Tensors:
    """Experts one by one, whichever way transformers stored them."""
    out = {}
    for name, weight in weights.items():
        prefix = name.rpartition(".")[0]
        for expert in range(len(weight) if weight.dim() == 3 else 0):
            if name.endswith("gate_up_proj"):
                gate, up = weight[expert].chunk(2)
                out |= {f"{prefix}.{expert}.gate_proj.weight": gate, f"{prefix}.{expert}.up_proj.weight": up}
            else:
                out[f"{prefix}.{expert}.down_proj.weight"] = weight[expert]
        if weight.dim() != 3:
            out[name] = weight
    return {name: t.contiguous().clone() for name, t in out.items()}


def write(source: Path, target: Path, tensors: Tensors, settings: dict | None) -> Path:
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, target)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    if settings is not None:
        config = json.loads((source / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return target
