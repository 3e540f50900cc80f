"""Layers of one block, FFNs without gates, experts of latents, and decays by channel, against transformers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.checkpoint.config_reader import CheckpointError
from dynamoe.dynamic.checkpoint.weights import read_json
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.model.families import model_spec
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.train.expert_scales import measure_scales
from family_parity import Variant, check_engine, check_logits
from parallel_jobs import shard_of
from safetensors.torch import load_file, save_file
from test_decoder import PagedSequences, error, random_prompts
from test_families_parity_states import logprobs

STATES, FULL = "linear_attention", "full_attention"
NEMOTRON = {
    **{"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "routed_scaling_factor": 1.7},
    **{"moe_shared_expert_intermediate_size": 56, "moe_latent_size": 48, "head_dim": 24, "mamba_num_heads": 8},
    **{"mamba_head_dim": 16, "ssm_state_size": 24, "n_groups": 2, "intermediate_size": 72, "mlp_hidden_act": "relu2"},
    "layers_block_type": [STATES, "moe", FULL, "mlp", STATES],
    "num_hidden_layers": None,
}
KIMI = {
    **{"num_local_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "n_shared_experts": 1},
    **{"linear_head_dim": 16, "linear_num_heads": 3, "kv_lora_rank": 32, "qk_nope_head_dim": 24, "v_head_dim": 20},
    **{"qk_rope_head_dim": 16, "num_key_value_heads": 4, "layer_types": [STATES, FULL, STATES]},
}
JAMBA = {
    **{"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 40, "mamba_d_state": 8, "mamba_dt_rank": 5},
    **{"attn_layer_period": 3, "attn_layer_offset": 1},
}
BAMBA = {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_state": 24, "mamba_n_groups": 2}


def as_published(path: Path) -> None:
    """Letters for types of layers, and names of tensors, as NVIDIA's files have them."""
    config, weights = read_json(path / "config.json"), load_file(path / "model.safetensors")
    letters = {STATES: "M", "moe": "E", FULL: "*", "mlp": "-"}
    kinds = config.pop("layers_block_type", None) or config.pop("layer_types")
    config |= {"hybrid_override_pattern": "".join(letters[kind] for kind in kinds), "num_hidden_layers": len(kinds)}
    (path / "config.json").write_text(json.dumps(config))
    renamed = {re.sub(r"^model\.", "backbone.", name): tensor for name, tensor in weights.items()}
    save_file(renamed, path / "model.safetensors")


def kimi_as_published(path: Path) -> None:
    """Kinds of layers counted from 1, in a part of their own."""
    config = read_json(path / "config.json")
    kinds = config.pop("layer_types")
    config["linear_attn_config"] = {
        **{"head_dim": config.pop("linear_head_dim"), "num_heads": config.pop("linear_num_heads")},
        "short_conv_kernel_size": config.pop("linear_conv_kernel_dim"),
        "kda_layers": [number + 1 for number, kind in enumerate(kinds) if kind == STATES],
        "full_attn_layers": [number + 1 for number, kind in enumerate(kinds) if kind == FULL],
    }
    config |= {"moe_router_activation_func": "sigmoid", "mla_use_nope": True, "use_grouped_topk": True, "head_dim": 72}
    (path / "config.json").write_text(json.dumps(config))


VARIANTS = [
    Variant(family="nemotron_h", config=NEMOTRON),
    Variant(family="kimi_linear", config=KIMI),
    Variant(family="bamba", config=BAMBA),
    Variant(family="jamba", config=JAMBA),
]
MORE = [
    Variant(family="nemotron_h", config={**NEMOTRON, "moe_latent_size": None, "use_bias": True}, edit=as_published),
    Variant(family="nemotron_h", config={**NEMOTRON, "mlp_bias": True, "use_conv_bias": False, "n_group": 2}),
    Variant(family="nemotron_h", config={**NEMOTRON, "layers_block_type": [FULL, "mlp", "mlp", FULL]}),
    Variant(family="kimi_linear", config={**KIMI, "q_lora_rank": 24, "linear_conv_kernel_dim": 2}),
    Variant(family="kimi_linear", config={**KIMI, "mlp_layer_types": ["sparse", "dense", "sparse"]}),
    Variant(family="kimi_linear", config={**KIMI, "routed_scaling_factor": 1.0}, edit=kimi_as_published),
    Variant(
        family="jamba", config={**JAMBA, "mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_dt_rank": "auto"}
    ),
    Variant(family="jamba", config={**JAMBA, "num_experts": 1, "mamba_d_conv": 2, "mamba_expand": 3}),
    Variant(family="bamba", config={**BAMBA, "mamba_proj_bias": True, "attention_bias": True, "mlp_bias": True}),
]
CASES = [*VARIANTS, *(pytest.param(variant, marks=pytest.mark.slow) for variant in MORE)]
Saved = Callable[[Variant], tuple[Path, Any]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A variant's checkpoint, and transformers' model of it."""
    made: dict[str, tuple[Path, Any]] = {}

    def save(variant: Variant) -> tuple[Path, Any]:
        from dataclasses import replace

        from transformers import AutoModelForCausalLM

        if repr(variant) not in made:
            directory = variant.save(tmp_path_factory.mktemp(variant.family))
            plain = directory
            if variant.edit is not None:  # transformers may not know what that made of it
                plain = replace(variant, edit=None).save(tmp_path_factory.mktemp(variant.family))
            made[repr(variant)] = directory, AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
        return made[repr(variant)]

    return save


@pytest.mark.parametrize("variant", CASES, ids=str)
def test_logits_are_those_of_transformers(saved: Saved, variant: Variant) -> None:
    check_logits(*saved(variant))


@pytest.mark.parametrize("variant", CASES, ids=str)
def test_tokens_are_those_of_transformers(saved: Saved, variant: Variant) -> None:
    check_engine(*saved(variant), paths=("chunked", "preempted"))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_row_does_not_see_its_neighbours(saved: Saved, variant: Variant) -> None:
    model = load_model(saved(variant)[0], dtype="bfloat16", device="cpu", progress=False)
    prompts = random_prompts([1, 7, 33], seed=1)
    alone = [logprobs(model, [prompt], {})[0] for prompt in prompts]
    assert logprobs(model, prompts, {}) == alone
    assert logprobs(model, prompts, {"max_num_batched_tokens": 5, "max_num_seqs": 2}) == alone


@pytest.mark.parametrize("variant", VARIANTS[:2], ids=str)
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantised_weights_and_caches(saved: Saved, variant: Variant, quantization: str) -> None:
    """On both backends alike, and near to the unquantised."""
    directory, prompt = saved(variant)[0], random_prompts([30])
    options = {"quantization": quantization, "kv_cache_dtype": "int8"}
    exact, *found = (
        PagedSequences(load_decoder(directory, dtype="float32", device="cpu", backend=backend, **more), 1).run(prompt)
        for backend, more in (("cpu", {}), ("cpu", options), ("torch", options))
    )
    least = {"int8": 0.97, "int4": 0.6}[quantization]
    assert torch.cosine_similarity(found[0], exact, dim=-1).median() > least
    assert error(*found) < 1e-3
    assert error(found[0], exact) > 1e-4


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_tensor_matters(saved: Saved, variant: Variant, tmp_path: Path) -> None:
    directory = saved(variant)[0]
    prompt, tensors = random_prompts([12]), load_file(directory / "model.safetensors")
    for file in directory.iterdir():
        shutil.copy(file, tmp_path)
    expected = PagedSequences(load_decoder(directory, dtype="float32", device="cpu"), 1).run(prompt)
    first = {re.sub(r"\.(\d+)\.", ".N.", name): name for name in reversed(tensors) if ".layers." in name}
    for name in first.values():
        alike = [n for n in tensors if n == name or (".experts." in n and ".experts." in name)]
        # Not by one factor: norms would undo it.
        other = {n: tensors[n] * torch.linspace(0.3, 1.3, tensors[n].shape[-1]) for n in alike}
        save_file({**tensors, **other}, tmp_path / "model.safetensors")
        changed = PagedSequences(load_decoder(tmp_path, dtype="float32", device="cpu"), 1).run(prompt)
        assert error(changed, expected) > 1e-4, name


@pytest.mark.parametrize(
    ("variant", "key", "value"),
    [
        (0, "mlp_hidden_act", "silu"),
        (0, "mamba_hidden_act", "gelu"),
        (0, "layers_block_type", [STATES, "made_up"]),
        (0, "layers_block_type", ["moe", "mlp"]),
        (0, "layer_types", ["moe", FULL]),
        (0, "hybrid_override_pattern", "ME*-"),
        (0, "hybrid_override_pattern", "MX"),
        (0, "num_hidden_layers", 3),
        (0, "n_shared_experts", 2),
        (0, "attention_bias", True),
        (0, "time_step_limit", [0.0, 0.1]),
        (0, "n_groups", 3),
        (1, "mla_use_nope", False),
        (1, "linear_attn_config", {"kda_layers": [1], "full_attn_layers": [2]}),
        (1, "linear_attn_config", {"gate_lower_bound": -5.0}),
        (1, "moe_router_activation_func", "softmax"),
        (1, "layer_types", [STATES, "sliding_attention", FULL]),
        (1, "num_experts_per_token", 3),
        (1, "hidden_act", "situ"),
        (2, "layer_types", [FULL] * 3),
        (2, "partial_rotary_factor", 0.25),
        (3, "attn_layer_offset", 3),
        (3, "layers_block_type", ["mamba"] * 3),
        (3, "hidden_act", "gelu"),
    ],
)
def test_what_cannot_be_is_refused(saved: Saved, variant: int, key: str, value: object) -> None:
    config = read_json(saved(VARIANTS[variant])[0] / "config.json")
    assert model_spec(config).has_states
    if key == "num_experts_per_token":
        config["num_experts_per_tok"] = 2
    with pytest.raises(CheckpointError, match=f"{key}|layer|groups|{value}"):
        model_spec({**config, key: value})


def test_more_ranks_than_heads_are_refused(saved: Saved) -> None:
    for variant, ranks in ((VARIANTS[1], 4), (VARIANTS[3], 129)):
        spec = model_spec(read_json(saved(variant)[0] / "config.json"))
        with pytest.raises(ValueError, match=f"parallel.tensor={ranks} does not go with"):
            shard_of(spec, ranks, 1, 0)


def test_what_experts_of_latents_add_is_not_measured(saved: Saved) -> None:
    decoder = load_decoder(saved(VARIANTS[0])[0], dtype="float32", device="cpu")
    with pytest.raises(ValueError, match="experts of latents add is not measured; this nemotron_h model"):
        measure_scales(decoder, torch.tensor(random_prompts([20])))


@pytest.mark.slow
@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[1], VARIANTS[3]], ids=str)
def test_on_triton(saved: Saved, variant: Variant, caplog: pytest.LogCaptureFixture) -> None:
    check_logits(*saved(variant), backend="triton", tolerance=1e-3)
    assert "no kernel for attention" not in caplog.text


def test_work_is_counted_by_what_layers_have(saved: Saved) -> None:
    spec = model_spec(read_json(saved(VARIANTS[0])[0] / "config.json"))
    mixture, ffn = (spec.layer_flops(spec.layers[number]) for number in (1, 3))
    assert ffn == 2 * 64 * 2 * 72
    assert mixture == 2 * (2 * 2 * 40 * 48 + 64 * (2 * 56 + 6 + 2 * 48))
    assert [layer.attention.kind for layer in spec.layers] == ["mamba2", "none", "gqa", "none", "mamba2"]
