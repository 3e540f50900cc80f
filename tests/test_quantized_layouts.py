"""Quantised checkpoints of others: compressed-tensors, GPTQ's and AWQ's layouts, DeepSeek's fp8; and damaged ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.checkpoint.compressed_writer import compressed
from dynamoe.dynamic.checkpoint.weights import CheckpointError
from dynamoe.dynamic.model.decoder import Decoder
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.model.prompt_pass import fresh_cache
from dynamoe.exits.segments import Segment
from dynamoe.kernels.api.rounding import quantize_int8
from dynamoe.kernels.api.tolerance import error
from safetensors.torch import load_file
from stored_layouts import LAYOUTS, SIZES, Tensors, compressed_settings, store_all, write

IDS = torch.randint(3, 320, (29,), generator=torch.Generator().manual_seed(5))


def logits_of(path: Path, **arguments: Any) -> torch.Tensor:
    """Of every position of a prompt, (T, V)."""
    arguments = {"dtype": "float32", "backend": "torch", "device": "cpu", **arguments}
    decoder: Decoder = load_decoder(path, **arguments)
    kv, batch = fresh_cache(decoder, [len(IDS)])
    whole = Segment(index=0, layers=range(decoder.spec.num_layers))
    return decoder.logits(decoder.run_segment(whole, decoder.embed(IDS), kv, batch))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_the_dequantised_weights(
    make_checkpoint: Callable[..., Path], tmp_path: Path, layout: str
) -> None:
    for family in ("llama", "qwen2_moe") if layout in ("gptq", "awq", "ct-int4", "fp8-block") else ("mixtral",):
        source, target = make_checkpoint(family, **SIZES[family]), tmp_path / family
        plain = store_all(source, target / "quantized", LAYOUTS[layout])
        expected = logits_of(write(source, target / "plain", plain, None))
        found = logits_of(target / "quantized")
        assert error(found, logits_of(source)) > 1e-4
        assert error(found, expected) <= 2e-5
        assert error(logits_of(target / "quantized", backend="cpu"), expected) <= 2e-5


def test_memory_stays_that_of_the_quantised_weights(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = make_checkpoint("mixtral", **SIZES["mixtral"])
    store_all(source, tmp_path / "quantized", LAYOUTS["ct-int4"])
    nbytes = [
        load_decoder(p, dtype="bfloat16", backend="cpu").layers[0].ffn.nbytes for p in (tmp_path / "quantized", source)
    ]
    assert nbytes[0] <= 0.3 * nbytes[1]


def test_activations_are_rounded_as_the_checkpoint_says(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = make_checkpoint("llama", **SIZES["llama"])
    stored = {}
    for name, weight in load_file(source / "model.safetensors").items():
        stored |= compressed(name, quantize_int8(weight)) if name.endswith("_proj.weight") else {name: weight}
    weights = {"num_bits": 8, "strategy": "channel"}
    tokens = {"type": "int", "num_bits": 8, "strategy": "token", "dynamic": True}
    for method, inputs in (("int8", None), ("w8a8", tokens)):
        settings = compressed_settings("int-quantized", weights, inputs)
        path = write(source, tmp_path / method, stored, settings)
        assert torch.equal(logits_of(path), logits_of(source, quantization=method, quantize_lm_head=False))


@pytest.mark.parametrize(
    ("part", "reason"), [("k_proj", "lacks its tensor .*k_proj.weight_zero_point"), ("q_proj", "q_proj.*one format")]
)
def test_weights_that_do_not_go_together(
    make_checkpoint: Callable[..., Path], tmp_path: Path, part: str, reason: str
) -> None:
    """Zero points that are missing; queries in a format of their own."""
    source = make_checkpoint("llama", **SIZES["llama"])
    store_all(source, tmp_path / "whole", LAYOUTS["ct-int4-asym"])
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    module = f"model.layers.0.self_attn.{part}"
    if part == "k_proj":
        del tensors[f"{module}.weight_zero_point"]
    else:
        weight = load_file(source / "model.safetensors")[f"{module}.weight"]
        tensors = {name: t for name, t in tensors.items() if not name.startswith(f"{module}.")}
        tensors |= compressed(f"{module}.weight", quantize_int8(weight))
    with pytest.raises(CheckpointError, match=reason):
        load_decoder(write(tmp_path / "whole", tmp_path / "odd", tensors, None))


ANY = "model.layers.1.self_attn.k_proj"


def damage(tensors: Tensors, how: str) -> None:
    """Spoil one weight."""
    part = {f"{ANY}.{p}": p for p in ("qweight", "qzeros", "scales", "g_idx")}
    name, _, value = how.partition("=")
    full = f"{ANY}.{name}"
    assert full in part
    if value == "gone":
        del tensors[full]
    elif value == "short":
        tensors[full] = tensors[full][:-1].clone()
    elif value == "float":
        tensors[full] = tensors[full].float()
    elif value == "nan":
        tensors[full][0, 0] = math.nan
    else:
        tensors[full] = tensors[full].flip(0).contiguous()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("scales=gone", rf"lacks its tensor '{ANY}.scales'"),
        ("qzeros=gone", rf"lacks its tensor '{ANY}.qzeros'"),
        ("qweight=gone", rf"'{ANY}' lacks its tensor '{ANY}.qweight'"),
        ("scales=short", rf"tensor '{ANY}.scales' in model.safetensors has shape .* implies"),
        ("qweight=short", rf"tensor '{ANY}.g_idx' in model.safetensors has shape"),
        ("qweight=float", rf"'{ANY}.qweight' in model.safetensors has dtype F32; its layout wants I32"),
        ("scales=nan", rf"'{ANY}' cannot be loaded: 1 of the .* values of scales are not finite"),
        ("g_idx=flip", rf"'{ANY}' cannot be loaded: its groups are scattered over the inputs \(g_idx\)"),
    ],
)
def test_damage_is_named(make_checkpoint: Callable[..., Path], tmp_path: Path, how: str, reason: str) -> None:
    source = make_checkpoint("llama", **SIZES["llama"])
    store_all(source, tmp_path / "whole", LAYOUTS["gptq"])
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    damage(tensors, how)
    with pytest.raises(CheckpointError, match=reason):
        load_decoder(write(tmp_path / "whole", tmp_path / "damaged", tensors, None))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method must be one of compressed-tensors, gptq, awq, fp8, not 'bits"),
        ({**LAYOUTS["gptq"], "bits": 3}, "bits must be 4, not '3'"),
        ({**LAYOUTS["gptq"], "group_size": 0}, "group_size must be a positive whole number"),
        ({**LAYOUTS["awq"], "version": "gemv"}, "version must be gemm"),
        ({**LAYOUTS["fp8-block"], "weight_block_size": [64, 64]}, "weight_block_size must be"),
        (compressed_settings("pack-quantized", {"num_bits": 2, "strategy": "channel"}), "not '2-bit int'"),
        ({"quant_method": "compressed-tensors"}, "config_groups must be an object"),
        ("int4", "quantization_config must be an object, not 'int4'"),
    ],
)
def test_settings_that_are_not_understood(
    make_checkpoint: Callable[..., Path], tmp_path: Path, settings: Any, reason: str
) -> None:
    source = make_checkpoint("llama", **SIZES["llama"])
    path = write(source, tmp_path / "odd", load_file(source / "model.safetensors"), settings)
    with pytest.raises(CheckpointError, match=reason):
        load_decoder(path)


def test_a_layer_that_is_half_quantised(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = make_checkpoint("llama", **SIZES["llama"])
    plain = store_all(source, tmp_path / "whole", LAYOUTS["gptq"])
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not name.startswith(f"{ANY}.")}
    kept[f"{ANY}.weight"] = plain[f"{ANY}.weight"]
    with pytest.raises(CheckpointError, match=rf"'{ANY}.weight' is not quantised, but .* is"):
        load_decoder(write(tmp_path / "whole", tmp_path / "half", kept, None))
