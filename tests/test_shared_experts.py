"""Shared experts, dense layers in front and selection biases on the paths of the engine that are not the plain one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.train.expert_scales import ExpertsConfig, make_expert_scales
from dynamoe.dynamic.train.frozen import FrozenConfig, make_frozen_exits
from dynamoe.exits.training.exit_heads import ExitHeadsConfig
from dynamoe.exits.training.heads import HeadTraining
from dynamoe.kernels.api.tolerance import error
from family_parity import check_logits
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


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_exits_are_trained_for_frozen_models(make_checkpoint: Callable[..., Path], tmp_path: Path, family: str) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text(f"The router of an expert is a layer, and it reads {number}. " * 30)
    training = HeadTraining(steps=20, batch_rows=64, learning_rate=1e-2)
    config = FrozenConfig(
        model=str(make_checkpoint(family, num_hidden_layers=4)),
        **{"text_folder": str(texts), "output": str(tmp_path / "run"), "exit_layers": (1, 3), "adapter_rank": 8},
        **{"served_prompts": 8, "prompt_tokens": 12, "new_tokens": 12, "exit_rows": 1200, "backend": "cpu"},
        heads=ExitHeadsConfig(training=training),
    )
    make_frozen_exits(config, progress=False, say=lambda _: None)
    model = load_model(tmp_path / "run" / "model", dtype="float32", device="cpu", progress=False)
    settings = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, "quality": None}
    leaving = SamplingParams(**settings, exit_thresholds={1: 0.0, 3: 0.0})
    engine = Engine(model, EngineConfig())
    engine.add_request("0", [5, 6, 7], leaving)
    depths: list[int] = []
    while engine.has_unfinished():
        for delta in engine.step():
            depths += delta.completions[0].layers
    assert depths == [4, *[1] * 7]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "grouped_mm", "triton"])
@pytest.mark.parametrize("family", MODELS)
def test_logits_on_other_backends(
    make_checkpoint: Callable[..., Path], reference_model: Callable[[Path], Any], family: str, backend: str
) -> None:
    path = make_checkpoint(family)
    check_logits(path, reference_model(path), backend)
