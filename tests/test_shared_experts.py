"""Shared experts, dense layers in front and selection biases on the paths of the engine that are not the plain one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.train.expert_scales import ExpertsConfig, make_expert_scales
from dynamoe.kernels.api.tolerance import error
from parallel_jobs import compare
from test_decoder import random_prompts
from test_quant_model import logits_of, prompt_of

MODELS = ["glm4_moe", "granitemoeshared"]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("method", ["int8", "int4"])
def test_quantised_logits_are_those_of_the_oracle(
    make_checkpoint: Callable[..., Path], family: str, method: str
) -> None:
    path, ids = make_checkpoint(family), prompt_of(37)
    settings = {"dtype": "float32", "device": "cpu"}
    expected = logits_of(load_decoder(path, **settings, backend="torch", quantization=method), ids)
    decoder = load_decoder(path, **settings, backend="cpu", quantization=method)
    assert error(logits_of(decoder, ids), expected) <= 2e-5
    assert error(logits_of(load_decoder(path, **settings, backend="cpu"), ids), expected) > 1e-3


def run(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    tokens: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        tokens[str(number)] = []
        engine.add_request(str(number), prompt, params)
    while engine.has_unfinished():
        for delta in engine.step():
            tokens[delta.request_id] += delta.completions[0].token_ids
    return list(tokens.values())


@pytest.mark.parametrize("family", MODELS)
def test_exits_budgets_and_a_coded_cache_do_not_depend_on_the_rows_beside(
    make_exits: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    path = shutil.copytree(make_exits(family, {1: 0.4, 3: 0.4}, num_hidden_layers=4), tmp_path / "model")
    make_expert_scales(ExpertsConfig(model=str(path), windows=4, window_tokens=64), progress=False, say=lambda _: None)
    model = load_model(path, dtype="bfloat16", device="cpu", kv_cache_dtype="int8", progress=False)
    settings = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, "quality": None}
    params = SamplingParams(**settings, exit_thresholds={1: 0.5, 3: 0.5}, expert_keep=0.7)
    prompts = random_prompts([5, 17, 2, 40])
    config = EngineConfig(enable_prefix_caching=False)
    together = run(Engine(model, config), prompts, params)
    engine = Engine(model, config)
    assert [run(engine, [prompt], params)[0] for prompt in prompts] == together
    assert run(engine, prompts, SamplingParams(**settings, exit_thresholds={1: 0.5, 3: 0.5})) != together
    assert run(engine, prompts, SamplingParams(**settings, expert_keep=0.7)) != together


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"expert": 2}, {"pipeline": 2}, {"tensor": 2, "expert": 2}], ids=str)
@pytest.mark.parametrize("method", ["none", "int8"])
def test_tokens_of_several_processes(
    make_exits: Callable[..., Path], tmp_path: Path, family: str, sizes: dict[str, int], method: str
) -> None:
    model = make_exits(family, {1: 0.3, 2: 0.3})
    job = {"thresholds": {"1": 0.5, "2": 0.5}, "budget": {"experts_per_token": 1}}
    compare(tmp_path, str(model), sizes, {"quantization": method}, **job)
