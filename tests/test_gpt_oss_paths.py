"""gpt_oss through the rest of the house: quantisation, codes in the cache, budgets, exits, and several processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import add_exits
from dynamoe.dynamic.checkpoint.weights import CheckpointError
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.model.loaded import LoadedModel
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.model.model_files import open_files
from dynamoe.dynamic.model.prompt_pass import fresh_cache
from dynamoe.dynamic.quantize.driver import quantize_checkpoint
from dynamoe.dynamic.quantize.methods import CalibratedMethod
from dynamoe.exits.segments import Segment
from parallel_jobs import compare, shard_of
from test_decoder import error, random_prompts
from test_exits_engine import choices, run
from test_families_parity_gpt_oss import saved as saved
from test_families_parity_gpt_oss import to_mxfp4, variant

PROMPTS = random_prompts([33, 5, 18])
Saved = Callable[..., Path]


def logits(path: Path, backend: str = "cpu", **options: Any) -> torch.Tensor:
    """Of all prompts together, (T, V)."""
    decoder = load_decoder(path, **{"dtype": "float32", "device": "cpu", "backend": backend, **options})
    kv, batch = fresh_cache(decoder, [len(prompt) for prompt in PROMPTS])
    whole = Segment(index=0, layers=range(decoder.spec.num_layers))
    x_TD = decoder.embed(torch.tensor([token for prompt in PROMPTS for token in prompt]))
    return decoder.logits(decoder.run_segment(whole, x_TD, kv, batch))


@pytest.mark.parametrize(("method", "near"), [("int8", 2e-5), ("int8-g32", 2e-5), ("int4", 2e-5), ("w4a8", 5e-3)])
def test_quantised_at_load(method: str, near: float, saved: Saved) -> None:
    found = logits(saved("plain"), quantization=method, quantize_lm_head=False)
    assert error(found, logits(saved("plain"), "torch", quantization=method, quantize_lm_head=False)) < near
    assert error(found, logits(saved("plain"))) > 1e-3
    with pytest.raises(ValueError, match=f"quantised already: leave quantization={method} away"):
        load_decoder(saved("mxfp4"), device="cpu", quantization=method)


@pytest.mark.parametrize(("name", "far"), [("gptq", 0.5), ("awq", 0.5), ("smoothquant", 0.15)])
def test_quantised_by_calibration(name: str, far: float, saved: Saved, tmp_path: Path) -> None:
    """Scales are folded only where that leaves the layer as it is: its error is that of rounding."""
    windows_NL = torch.tensor([random_prompts([48], seed=seed)[0] for seed in range(4)])
    method, made = CalibratedMethod(name=name, group=32, fewest_tokens=1), tmp_path / "made"
    report = quantize_checkpoint(saved("plain"), made, windows_NL, method, progress=False, say=lambda line: None)
    assert all(layer["relative_error"] < far for layer in report["layers"])
    assert error(logits(made), logits(made, "torch")) < 5e-3


@pytest.mark.parametrize("kind", ["mxfp4", "plain"])
def test_codes_in_the_cache(kind: str, saved: Saved) -> None:
    coded = logits(saved(kind), kv_cache_dtype="int8")
    assert error(coded, logits(saved(kind), "torch", kv_cache_dtype="int8")) < 5e-3
    assert error(coded, logits(saved(kind))) > 1e-3


def generated(model: LoadedModel, **settings: Any) -> list[list[tuple[list[int], list[int]]]]:
    """Tokens of prompts that run together, and the layers behind each."""
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, **settings)
    return choices(run(Engine(model), PROMPTS, params))


def test_budgets_of_experts(saved: Saved) -> None:
    model = load_model(saved("mxfp4"), dtype="float32", device="cpu", progress=False)
    whole = generated(model)
    limited = generated(model, quality=None, experts_per_token=1)
    assert limited != whole
    model.decoder.stack = None  # operation by operation
    assert generated(model, quality=None, experts_per_token=1) == limited


def test_exits(saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved("mxfp4"), path := tmp_path / "exits")
    add_exits(path, {1: 0.4, 3: 0.5})
    model = load_model(path, dtype="float32", device="cpu", progress=False)
    settings = {"quality": None, "exit_thresholds": {1: 0.5, 3: 0.5}}
    early = generated(model, **settings)
    assert {depth for [(_, depths)] in early for depth in depths} == {1, 3, 4}
    plain = load_model(saved("mxfp4"), dtype="float32", device="cpu", progress=False)
    assert generated(model) == generated(plain)
    model.decoder.stack = None
    assert generated(model, **settings) == early


WIDE = {"intermediate_size": 128}  # halves are whole groups of 32
AXES = {"tensor": {"tensor": 2}, "expert": {"expert": 2}, "pipeline": {"pipeline": 2}}


@pytest.mark.parametrize("kind", ["mxfp4", pytest.param("plain", marks=pytest.mark.slow)])
@pytest.mark.parametrize("axis", ["tensor", "expert", pytest.param("pipeline", marks=pytest.mark.slow)])
def test_tokens_of_several_processes(kind: str, axis: str, tmp_path: Path) -> None:
    path = variant(to_mxfp4 if kind == "mxfp4" else None, **WIDE).save(tmp_path / "model")
    compare(tmp_path, str(path), AXES[axis])


def test_a_group_that_would_belong_to_two_ranks_is_refused(saved: Saved) -> None:
    files = open_files(saved("mxfp4"))
    shard = shard_of(files.spec, 2, 1, 1)
    shard.layout(files.layout)
    with pytest.raises(CheckpointError, match=r"down_proj.weight' has scales .* at input 48, .* no multiple of 32"):
        shard.checkpoint(files.checkpoint)
