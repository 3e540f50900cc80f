"""Families whose layers keep recurrent states, against transformers: logits, tokens, forks, and what is refused."""

from __future__ import annotations

import json
import logging
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
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.model.families import model_spec
from dynamoe.dynamic.model.kv_cache import bytes_per_page, bytes_per_sequence
from dynamoe.dynamic.model.loaded import LoadedModel
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.model.text_part import text_config
from engine_answers import answers, completions
from family_parity import Variant, check_engine, check_logits, expected_tokens, generate
from safetensors.torch import load_file, save_file
from test_decoder import PagedSequences, error, random_prompts

LINEAR = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 24},
    "head_dim": 32,
}
EXPERTS = {
    **{"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 72},
}
NEXT = {**LINEAR, **EXPERTS, "full_attention_interval": 2}
GRANITE = {
    **{"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 40, "shared_intermediate_size": 56},
    **{"embedding_multiplier": 3.0, "attention_multiplier": 0.35, "residual_multiplier": 0.6, "logits_scaling": 1.7},
    **{"mamba_n_heads": 8, "mamba_d_state": 24, "layer_types": ["linear_attention", "full_attention"] * 2},
    "num_hidden_layers": 4,
}
LFM2_MOE = {
    **{"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "num_dense_layers": 1},
    "layer_types": ["conv", "full_attention", "conv"],
}
VARIANTS = [
    Variant(family="qwen3_next", config=NEXT),
    Variant(family="qwen3_5_moe_text", config={**NEXT, "tie_word_embeddings": True}),
    Variant(family="granitemoehybrid", config=GRANITE),
    Variant(family="lfm2_moe", config=LFM2_MOE),
]
MORE = [
    Variant(family="qwen3_next", config={**NEXT, "mlp_only_layers": [1], "norm_topk_prob": False}),
    Variant(family="qwen3_next", config={**NEXT, "attention_bias": True, "linear_conv_kernel_dim": 2}),
    Variant(family="qwen3_next", config={**NEXT, "partial_rotary_factor": 0.5, "linear_num_value_heads": 2}),
    Variant(family="qwen3_5_text", config={**LINEAR, "full_attention_interval": 3}),
    Variant(family="granitemoehybrid", config={**GRANITE, "mamba_n_groups": 2, "position_embedding_type": "rope"}),
    Variant(family="granitemoehybrid", config={**GRANITE, "num_local_experts": 0, "mamba_conv_bias": False}),
    Variant(family="granitemoehybrid", config={**GRANITE, "mamba_proj_bias": True, "attention_bias": True}),
    Variant(family="lfm2_moe", config={**LFM2_MOE, "conv_bias": True, "use_expert_bias": False, "conv_L_cache": 4}),
    Variant(family="lfm2", config={"layer_types": LFM2_MOE["layer_types"], "block_multiple_of": 16}),
    Variant(family="lfm2", config={"full_attn_idxs": [0], "block_auto_adjust_ff_dim": False, "norm_eps": 1e-3}),
]
CASES = [*VARIANTS, *(pytest.param(variant, marks=pytest.mark.slow) for variant in MORE)]
EngineOf = Callable[..., Engine]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Variant], tuple[Path, Any]]:
    """A variant's checkpoint, and transformers' model of it."""
    made: dict[str, tuple[Path, Any]] = {}

    def save(variant: Variant) -> tuple[Path, Any]:
        from transformers import AutoModelForCausalLM

        if repr(variant) not in made:
            directory = variant.save(tmp_path_factory.mktemp(variant.family))
            made[repr(variant)] = directory, AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        return made[repr(variant)]

    return save


@pytest.mark.parametrize("variant", CASES, ids=str)
def test_logits_are_those_of_transformers(saved: Callable[..., tuple[Path, Any]], variant: Variant) -> None:
    decoder = check_logits(*saved(variant))
    assert decoder.stack is not None


@pytest.mark.parametrize("variant", CASES, ids=str)
def test_tokens_are_those_of_transformers(saved: Callable[..., tuple[Path, Any]], variant: Variant) -> None:
    check_engine(*saved(variant), paths=("together", "chunked", "preempted", "prefix"))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_forks_go_on_from_copies_of_the_state(saved: Callable[..., tuple[Path, Any]], variant: Variant) -> None:
    directory, reference = saved(variant)
    prompts = random_prompts([9, 20, 33], seed=0)
    expected = expected_tokens(reference, prompts, 12)
    model = load_model(directory, dtype="float32", device="cpu", progress=False)
    engine = Engine(model, EngineConfig(max_num_seqs=5, max_num_batched_tokens=16))
    params = SamplingParams(temperature=0.0, n=2, max_tokens=12, ignore_eos=True)
    found = completions(engine, prompts, params)
    assert [{n: answer.tokens for n, answer in each.items()} for each in found] == [{0: e, 1: e} for e in expected]


def logprobs(
    model: LoadedModel, together: list[list[int]], limits: dict[str, int], **settings: Any
) -> list[list[float]]:
    """Of the greedy tokens of prompts that run together."""
    engine = Engine(model, EngineConfig(**limits))
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0, **settings)
    return [answer.logprobs for answer in answers(engine, together, params)]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_row_does_not_see_its_neighbours(saved: Callable[..., tuple[Path, Any]], variant: Variant) -> None:
    model = load_model(saved(variant)[0], dtype="bfloat16", device="cpu", progress=False)
    prompts = random_prompts([1, 7, 16, 33], seed=1)
    alone = [logprobs(model, [prompt], {})[0] for prompt in prompts]
    assert logprobs(model, prompts, {}) == alone
    assert logprobs(model, prompts, {"max_num_batched_tokens": 5, "max_num_seqs": 3}) == alone


def test_budgets_of_experts_beside_states(saved: Callable[..., tuple[Path, Any]]) -> None:
    model = load_model(saved(VARIANTS[0])[0], dtype="float32", device="cpu", progress=False)
    prompts, budget = random_prompts([3, 18], seed=1), {"quality": None, "experts_per_token": 1}
    alone = [logprobs(model, [prompt], {}, **budget)[0] for prompt in prompts]
    assert logprobs(model, prompts, {}, **budget) == alone != logprobs(model, prompts, {})


def test_states_come_out_of_the_memory_and_leave_a_part_of_it_to_copies(
    saved: Callable[..., tuple[Path, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(saved(VARIANTS[0])[0], dtype="float32", device="cpu", progress=False)
    state, page = bytes_per_sequence(model.spec), bytes_per_page(model.spec, torch.float32, 16)
    states, caching = 4 * state, {"max_num_seqs": 4, "max_model_len": 64}
    with pytest.raises(ValueError, match=f"holds no page beside {states} bytes of states for 4 sequences"):
        Engine(model, EngineConfig(max_num_seqs=4, kv_memory=states))
    with caplog.at_level(logging.INFO, "dynamoe"):
        engine = Engine(model, EngineConfig(**caching, kv_memory=states + 4 * page + 3 * state))
    assert "no prefixes are shared: there is no memory for copies of recurrent states" in caplog.text
    assert engine.stats().state_bytes == states
    prompt = random_prompts([40])[0]
    assert generate(engine, [prompt], 4) == generate(engine, [prompt], 4)
    assert engine.stats().prefix_cache_hits == 0
    for copies, memory in ((2, states + 4 * page + 8 * state), (16, 1 << 30)):
        engine = Engine(model, EngineConfig(**caching, kv_memory=memory))
        assert engine.stats().state_bytes == states + copies * state
        assert engine.stats().total_pages == (memory - states - copies * state) // page


def test_cache_policies_are_refused(saved: Callable[..., tuple[Path, Any]]) -> None:
    model = load_model(saved(VARIANTS[0])[0], dtype="float32", device="cpu", progress=False)
    with pytest.raises(ValueError, match=r"cache_policy=any\.py:Policy needs layers that keep all keys and values"):
        Engine(model, EngineConfig(cache_policy="any.py:Policy"))


def test_a_published_checkpoint_is_its_text_part(
    saved: Callable[..., tuple[Path, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Qwen3.5 is published with parts for images and further tokens, and with rotations in three dimensions."""
    plain = saved(VARIANTS[1])[0]
    for file in plain.iterdir():
        shutil.copy(file, tmp_path)
    text, tensors = read_json(plain / "config.json"), load_file(plain / "model.safetensors")
    text["rope_parameters"] |= {"mrope_interleaved": True, "mrope_section": [2, 1, 1]}
    text |= {"attn_output_gate": True, "mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 1}
    whole = {"model_type": "qwen3_5_moe", "text_config": text, "vision_config": {"depth": 2}, "image_token_id": 5}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    renamed = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    others = {"model.visual.patch_embed.proj.weight": torch.ones(3), "mtp.fc.weight": torch.ones(3)}
    save_file(renamed | others, tmp_path / "model.safetensors")
    with caplog.at_level(logging.INFO, "dynamoe"):
        decoder = load_decoder(tmp_path, dtype="float32", device="cpu")
    assert "1 tensors of layers that predict further tokens are left out" in caplog.text
    prompt = random_prompts([20])
    expected = PagedSequences(load_decoder(plain, dtype="float32", device="cpu"), 1).run(prompt)
    assert torch.equal(PagedSequences(decoder, 1).run(prompt), expected)


@pytest.mark.parametrize(
    ("variant", "key", "value"),
    [
        (0, "attn_output_gate", False),
        (0, "hidden_act", "gelu"),
        (0, "layer_types", ["linear_attention", "sliding_attention", "full_attention"]),
        (0, "layer_types", ["linear_attention"] * 3),
        (0, "linear_num_value_heads", 3),
        (0, "linear_conv_kernel_dim", 1),
        (2, "time_step_limit", [0.0, 0.1]),
        (2, "mamba_d_head", 7),
        (2, "position_embedding_type", "learned"),
        (2, "mamba_n_groups", 3),
        (3, "conv_L_cache", 1),
        (3, "layer_types", ["conv", "mamba", "full_attention"]),
    ],
)
def test_what_cannot_be_is_refused(
    saved: Callable[..., tuple[Path, Any]], variant: int, key: str, value: object
) -> None:
    config = read_json(saved(VARIANTS[variant])[0] / "config.json")
    text = text_config(config)
    assert model_spec(text).has_states
    with pytest.raises(CheckpointError, match=f"{key}|layer|taps|groups"):
        model_spec({**text, key: value})


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_tensor_of_a_layer_with_states_matters(
    saved: Callable[..., tuple[Path, Any]], variant: Variant, tmp_path: Path
) -> None:
    directory = saved(variant)[0]
    prompt, tensors = random_prompts([12]), load_file(directory / "model.safetensors")
    for file in directory.iterdir():
        shutil.copy(file, tmp_path)
    expected = PagedSequences(load_decoder(directory, dtype="float32", device="cpu"), 1).run(prompt)
    parts = [name for name in tensors if re.match(r"model\.layers\.0\.(linear_attn|mamba|conv)\.", name)]
    assert parts
    for name in parts:
        save_file({**tensors, name: tensors[name] * 0.5}, tmp_path / "model.safetensors")
        changed = PagedSequences(load_decoder(tmp_path, dtype="float32", device="cpu"), 1).run(prompt)
        assert error(changed, expected) > 1e-3, name
