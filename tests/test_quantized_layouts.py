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
from stored_layouts import LAYOUTS, SIZES, Tensors, compressed_settings, store, store_all, write

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


def test_a_weight_without_its_zero_points(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = make_checkpoint("llama", **SIZES["llama"])
    store_all(source, tmp_path / "whole", LAYOUTS["ct-int4-asym"])
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    del tensors["model.layers.0.self_attn.k_proj.weight_zero_point"]
    with pytest.raises(CheckpointError, match=r"lacks its tensor .*k_proj.weight_zero_point"):
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


def test_an_order_of_inputs_that_is_asked_for_but_not_stored(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_checkpoint("llama", **SIZES["llama"])
    store_all(source, tmp_path / "whole", LAYOUTS["gptq-asym"])
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    del tensors[f"{ANY}.g_idx"]
    with pytest.raises(CheckpointError, match=rf"'{ANY}' lacks its tensor '{ANY}.g_idx'"):
        load_decoder(write(tmp_path / "whole", tmp_path / "odd", tensors, None))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quant_method": "bitsandbytes"}, "gptq, awq, fp8, mxfp4, not 'bitsandbytes'"),
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


def without(tensors: Tensors, module: str) -> Tensors:
    return {name: t for name, t in tensors.items() if not name.startswith(f"{module}.")}


def check_logits(path: Path, plain: Path) -> None:
    """Those of the dequantised weights, on both backends; and on CPUs a row's bits whatever rows are beside it."""
    expected = logits_of(plain)
    for backend in ("torch", "cpu"):
        assert error(logits_of(path, backend=backend), expected) <= 2e-5
    decoder = load_decoder(path, dtype="bfloat16", backend="cpu")
    kv, batch = fresh_cache(decoder, [1])
    whole = Segment(index=0, layers=range(decoder.spec.num_layers))
    alone = decoder.logits(decoder.run_segment(whole, decoder.embed(IDS[:1]), kv, batch))
    assert torch.equal(alone[0], logits_of(path, backend="cpu", dtype="bfloat16")[0])


PARTS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"]
EXPERTS = ["mlp.experts.3.down_proj", "mlp.shared_expert.up_proj"]


@pytest.mark.parametrize("part", [*PARTS, *EXPERTS])
def test_one_part_of_a_layer_that_is_stored_otherwise(
    make_checkpoint: Callable[..., Path], tmp_path: Path, part: str
) -> None:
    """Not quantised, or in a format of its own; all other weights keep theirs."""
    family = "qwen2_moe" if "expert" in part else "llama"
    source = (
        make_checkpoint(family, **SIZES[family], qkv_bias=True)
        if family == "qwen2_moe"
        else make_checkpoint(family, **SIZES[family], attention_bias=True, mlp_bias=True)
    )
    plain = store_all(source, tmp_path / "whole", LAYOUTS["ct-int4"])
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    module = f"model.layers.1.{part}"
    biases = {f"{module}.bias": plain[f"{module}.bias"]} if f"{module}.bias" in plain else {}
    rest = without(tensors, module) | biases
    write(source, tmp_path / "plain", plain, None)
    half = write(tmp_path / "whole", tmp_path / "half", rest | {f"{module}.weight": plain[f"{module}.weight"]}, None)
    check_logits(half, tmp_path / "plain")
    sizes = [load_decoder(p, dtype="bfloat16", backend="cpu").weight_bytes for p in (half, tmp_path / "whole", source)]
    assert sizes[0] - sizes[1] <= 2 * plain[f"{module}.weight"].numel() < (sizes[2] - sizes[1]) / 2

    codes = quantize_int8(plain[f"{module}.weight"])
    groups = compressed_settings("mixed-precision", {"num_bits": 4, "strategy": "group", "group_size": 64})
    other = compressed_settings("int-quantized", {"num_bits": 8, "strategy": "channel"})["config_groups"]["group_0"]
    groups["config_groups"]["group_1"] = {**other, "targets": [module]}
    mixed = rest | compressed(f"{module}.weight", codes)
    write(source, tmp_path / "dequantised", plain | {f"{module}.weight": codes.dequantize()}, None)
    check_logits(write(source, tmp_path / "mixed", mixed, groups), tmp_path / "dequantised")


@pytest.mark.parametrize(
    ("layout", "family", "sizes"),
    [
        ("gptq", "qwen3_moe", {"moe_intermediate_size": 64, "head_dim": 32}),
        ("ct-int8", "qwen2_moe", {"num_experts": 8}),
    ],
)
def test_a_router_that_is_quantised(
    make_checkpoint: Callable[..., Path], tmp_path: Path, layout: str, family: str, sizes: dict[str, int]
) -> None:
    """Where a layer runs in the stack of the C++ kernels, and where it does not: its shared expert has a gate."""
    source = make_checkpoint(family, **{**SIZES.get(family, {}), **sizes})
    settings = LAYOUTS[layout]
    plain = store_all(source, tmp_path / "whole", settings)
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    for layer in range(3):
        names = ["gate"] if layout == "gptq" else ["gate", "shared_expert_gate"]
        for module in (f"model.layers.{layer}.mlp.{name}" for name in names):
            parts, plain[f"{module}.weight"] = store(module, plain[f"{module}.weight"], settings)
            tensors = without(tensors, module) | parts
    write(source, tmp_path / "plain", plain, None)
    check_logits(write(tmp_path / "whole", tmp_path / "routers", tensors, None), tmp_path / "plain")


def test_settings_of_some_modules_by_pattern(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """GPTQModel's ``dynamic``: other groups here, no quantisation there."""
    source = make_checkpoint("llama", **SIZES["llama"])
    plain = store_all(source, tmp_path / "whole", LAYOUTS["gptq"])
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    for module in (f"model.layers.{layer}.mlp.down_proj" for layer in range(3)):
        weight = load_file(source / "model.safetensors")[f"{module}.weight"]
        parts, plain[f"{module}.weight"] = store(module, weight, {**LAYOUTS["gptq"], "group_size": 64, "sym": False})
        tensors = without(tensors, module) | parts
    tensors = without(tensors, ANY) | {f"{ANY}.weight": plain[f"{ANY}.weight"]}
    dynamic = {r"-:.*layers\.1\..*k_proj": {}, r"+:.*\.down_proj": {"group_size": 64, "sym": False}}
    write(source, tmp_path / "plain", plain, None)
    check_logits(write(source, tmp_path / "a", tensors, {**LAYOUTS["gptq"], "dynamic": dynamic}), tmp_path / "plain")
    for number, (entry, reason) in enumerate(
        [
            (
                {r".*q_proj": {"bits": 8}},
                "q_proj' cannot be loaded: config.json .dynamic, '.*q_proj'. says that it has",
            ),
            ({r".*q_proj": {"rotation": "hadamard"}}, "rotation=hadamard is not supported"),
            ({r"(.+)+q_proj": {}}, "must be a simple regular expression"),
            ({"m?" * 30 + "m" * 30: {}}, "must be a simple regular expression"),
        ]
    ):
        path = write(source, tmp_path / str(number), tensors, {**LAYOUTS["gptq"], "dynamic": {**dynamic, **entry}})
        with pytest.raises(CheckpointError, match=reason):
            load_decoder(path)


def test_inputs_are_rounded_where_the_checkpoint_asks_for_it(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Two groups of layers, one of them with rounded inputs."""
    source = make_checkpoint("llama", **SIZES["llama"])
    stored = {}
    for name, weight in load_file(source / "model.safetensors").items():
        stored |= compressed(name, quantize_int8(weight)) if name.endswith("_proj.weight") else {name: weight}
    tokens = {"type": "int", "num_bits": 8, "strategy": "token", "dynamic": True}
    settings = compressed_settings("int-quantized", {"num_bits": 8, "strategy": "channel"})
    groups = settings["config_groups"]
    groups["group_1"] = {**groups["group_0"], "input_activations": tokens, "targets": ["re:.*self_attn.*"]}
    decoder = load_decoder(write(source, tmp_path / "a", stored, settings), dtype="float32", backend="torch")
    layer = decoder.layers[1]
    kinds = [part.data.scheme.kind for part in (layer.attention.qkv, layer.attention.o, layer.ffn)]  # type: ignore[attr-defined]
    assert kinds == ["int8", "int8", "none"]


INT4 = LAYOUTS["ct-int4"]["config_groups"]["group_0"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {**LAYOUTS["ct-int4"], "transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
            "transform_config=",
        ),
        ({**LAYOUTS["ct-int4"], "made_up": 1}, "quantisation: made_up=1 is not supported"),
        ({**LAYOUTS["ct-int4"], "format": "marlin-24"}, "format must be one of dense, float-quantized"),
        ({**LAYOUTS["ct-int4"], "sparsity_config": "2:4"}, "sparsity_config must be dense"),
        ({**LAYOUTS["ct-int4"], "config_groups": {"a": {**INT4, "made_up": 1}}}, "config_groups: made_up=1"),
        (
            {**LAYOUTS["ct-int4"], "config_groups": {"a": {**INT4, "output_activations": {"num_bits": 8}}}},
            "output_activ",
        ),
        (
            {**LAYOUTS["ct-int4"], "config_groups": {"a": {**INT4, "weights": {**INT4["weights"], "made_up": 1}}}},
            "weights: made_up=1",
        ),
        (
            {
                **LAYOUTS["ct-int4"],
                "config_groups": {"a": {**INT4, "weights": {**INT4["weights"], "actorder": "group"}}},
            },
            "lacks its tensor .*weight_g_idx",
        ),
        ({**LAYOUTS["gptq"], "made_up": 1}, "made_up=1 is not supported"),
        ({**LAYOUTS["gptq"], "rotation": "hadamard"}, "rotation=hadamard is not supported"),
        ({**LAYOUTS["gptq"], "adapter": {"name": "lora"}}, "adapter="),
        ({**LAYOUTS["gptq"], "checkpoint_format": "marlin"}, "checkpoint_format must be one of gptq, gptq_v2"),
        ({**LAYOUTS["gptq"], "is_marlin_format": True}, "is_marlin_format=True"),
        ({**LAYOUTS["gptq"], "desc_act": 3}, "desc_act must be true or false"),
        ({**LAYOUTS["gptq"], "group_size": -2}, "group_size must be a positive whole number"),
        ({**LAYOUTS["awq"], "made_up": 1}, "made_up=1 is not supported"),
        ({**LAYOUTS["awq"], "format": "gemv_fast"}, "format must be gemm"),
        ({**LAYOUTS["fp8-block"], "made_up": 1}, "made_up=1 is not supported"),
        ({**LAYOUTS["fp8-block"], "scale_fmt": "ue8m0"}, "scale_fmt=ue8m0 is not supported"),
        (
            {**LAYOUTS["fp8-block"], "activation_scheme": "blockwise"},
            "activation_scheme must be one of dynamic, static",
        ),
    ],
)
def test_settings_are_used_or_refused_by_name(
    make_checkpoint: Callable[..., Path], tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    source = make_checkpoint("llama", **SIZES["llama"])
    known = next(layout for layout in LAYOUTS.values() if layout["quant_method"] == settings["quant_method"])
    store_all(source, tmp_path / "whole", LAYOUTS["ct-int4"] if "config_groups" in known else known)
    path = write(source, tmp_path / "odd", load_file(tmp_path / "whole" / "model.safetensors"), settings)
    with pytest.raises(CheckpointError, match=reason) as raised:
        load_decoder(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "harmless",
    [
        {**LAYOUTS["ct-int4"], "transform_config": {}, "version": "0.12.2", "kv_cache_scheme": None},
        {**LAYOUTS["gptq"], "damp_percent": 0.1, "lm_head": False, "meta": {"quantizer": ["gptqmodel:7.7"]}},
    ],
)
def test_settings_without_effect_are_accepted(
    make_checkpoint: Callable[..., Path], tmp_path: Path, harmless: dict[str, Any]
) -> None:
    source = make_checkpoint("llama", **SIZES["llama"])
    store_all(source, tmp_path / "whole", harmless)
    assert load_decoder(tmp_path / "whole", backend="torch").quantization
