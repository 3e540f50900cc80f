"""Expert budgets in the engine: what a token uses depends on nothing but its row, and ``exact`` never notices."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.outputs import CompletionOutput, RequestOutput
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.model.kv_cache import bytes_per_page
from dynamoe.dynamic.model.loaded import LoadedModel
from dynamoe.dynamic.train.expert_scales import ExpertsConfig, make_expert_scales
from dynamoe.kernels.api.types import ExpertWeights, Routing

LAYERS, TOP_K, PAGE = 4, 3, 4
EXACT = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=2)
FEWER = replace(EXACT, quality=None, expert_keep=0.7)
CAPPED = replace(EXACT, quality=None, experts_per_token=1)
ALL = replace(EXACT, quality=None, expert_keep=1.0, experts_per_token=TOP_K)
PAGES = 32


@pytest.fixture(scope="module")
def directory(make_exits: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with calibrated experts, and exits."""
    source = make_exits("qwen3_moe", {1: 0.4, 3: 0.4}, num_hidden_layers=LAYERS)
    path = tmp_path_factory.mktemp("budget") / "model"
    shutil.copytree(source, path)
    make_expert_scales(ExpertsConfig(model=str(path), windows=4, window_tokens=64), progress=False, say=lambda _: None)
    return path


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int8", pytest.param("int4", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest, directory: Path) -> LoadedModel:
    kind = request.param
    settings = {"dtype": kind} if "float" in kind else {"dtype": "bfloat16", "quantization": kind}
    return load_model(directory, backend="cpu", progress=False, **settings)


@pytest.fixture(scope="module", params=["at once", "one by one", "int8", pytest.param("int4", marks=pytest.mark.slow)])
def plain(request: pytest.FixtureRequest, directory: Path) -> LoadedModel:
    """In float32, with the layers as one operation of the backend or not; or in bfloat16 with quantised weights."""
    if request.param.startswith("int"):
        return load_model(directory, dtype="bfloat16", quantization=request.param, backend="cpu", progress=False)
    model = load_model(directory, dtype="float32", backend="cpu", progress=False)
    if request.param == "one by one":
        model.decoder.stack = None
    return model


def prompts(count: int = 6, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
    return [torch.randint(3, 320, (n,), generator=generator).tolist() for n in lengths]


def run(engine: Engine, requests: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
    outputs = {}
    for number, (prompt, settings) in enumerate(zip(requests, params, strict=True)):
        engine.add_request(str(number), prompt, settings)
        completions = [CompletionOutput(i) for i in range(settings.n)]
        outputs[str(number)] = RequestOutput(str(number), None, prompt, completions)
    while engine.has_unfinished():
        for delta in engine.step():
            outputs[delta.request_id].add(delta)
    assert engine.stats().free_pages == engine.stats().total_pages
    return list(outputs.values())


def choices(outputs: list[RequestOutput]) -> list[Any]:
    return [[(c.token_ids, c.logprobs, c.layers, c.experts) for c in output.outputs] for output in outputs]


def alone(model: LoadedModel, params: list[SamplingParams]) -> list[Any]:
    config = EngineConfig(enable_prefix_caching=False)
    return [choices(run(Engine(model, config), [p], [s]))[0] for p, s in zip(prompts(), params, strict=True)]


def test_a_budget_of_all_experts_is_no_budget_to_the_bit(model: LoadedModel) -> None:
    exact = choices(run(Engine(model), prompts(), [EXACT] * 6))
    assert choices(run(Engine(model), prompts(), [ALL] * 6)) == exact
    engine = Engine(model)
    beside = run(engine, [*prompts(), *prompts(seed=1)], [EXACT, ALL] * 3 + [FEWER, CAPPED] * 3)
    assert choices(beside[:6]) == exact
    assert engine.stats().skipped_experts > 0
    assert choices(beside[6:]) != choices(run(Engine(model), prompts(seed=1), [EXACT] * 6)), "budgets change nothing"
    for output in beside[:6]:
        assert output.compute is not None
        assert output.compute.expert_rows == output.compute.full_expert_rows


MIXED = [FEWER, CAPPED, replace(FEWER, expert_keep=0.4), EXACT, replace(CAPPED, expert_keep=0.9, experts_per_token=2)]


@pytest.mark.parametrize("exits", [False, True])
def test_neighbours_chunks_and_preemption_change_nothing(plain: LoadedModel, exits: bool) -> None:
    params = [*MIXED, FEWER]
    if exits:
        thresholds = {1: 0.5, 3: 0.5}
        params = [replace(p, exit_thresholds=thresholds) if p.quality is None else p for p in params]
    expected = alone(plain, params)
    assert choices(run(Engine(plain), prompts(), params)) == expected
    others = [replace(CAPPED, exit_thresholds={1: 0.3}), EXACT, FEWER]
    mixed = run(Engine(plain), [*prompts(), *prompts(3, seed=4)], [*params, *others])
    assert choices(mixed[:6]) == expected
    page_bytes = bytes_per_page(plain.spec, plain.decoder.dtype, PAGE)
    for caching in (True, False):
        config = EngineConfig(
            block_size=PAGE,
            kv_memory=PAGES * page_bytes,
            max_num_batched_tokens=11,
            enable_prefix_caching=caching,
        )
        engine = Engine(plain, config)
        assert choices(run(engine, prompts(), params)) == expected
        assert engine.stats().preemptions > 1


def test_rows_keep_their_budget_segment_by_segment(plain: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [replace(p, exit_thresholds={1: 0.5, 3: 0.5}) for p in (FEWER, CAPPED)] * 3
    expected = run(Engine(plain), prompts(), params)
    monkeypatch.setattr(plain.decoder, "stack", None)
    found = run(Engine(plain), prompts(), params)
    assert choices(found) == choices(expected)
    assert [o.compute for o in found] == [o.compute for o in expected]


def test_completions_of_one_prompt_are_independent(plain: LoadedModel) -> None:
    several = replace(FEWER, n=3, temperature=1.0, seed=5, logprobs=None)
    together = run(Engine(plain, EngineConfig(block_size=PAGE)), prompts(3), [several] * 3)
    crowded = run(Engine(plain, EngineConfig(block_size=PAGE, max_num_seqs=2)), prompts(3), [several] * 3)
    assert choices(together) == choices(crowded)


def test_experts_are_counted_where_they_are_launched(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(directory, dtype="float32", backend="cpu", progress=False)
    engine = Engine(model)
    backend, launched = model.decoder.backend, 0
    experts = backend.experts

    def counted(x_TD: torch.Tensor, weights: ExpertWeights, routing: Routing) -> torch.Tensor:
        nonlocal launched
        launched += routing.expert_ids_TK.numel() if routing.counts_T is None else int(routing.counts_T.sum())
        return experts(x_TD, weights, routing)

    leaving = replace(FEWER, exit_thresholds={1: 0.5, 3: 0.5})
    params = [FEWER, CAPPED, EXACT, leaving, replace(leaving, expert_keep=None), ALL]
    at_once = run(engine, prompts(), params)
    monkeypatch.setattr(model.decoder, "stack", None)
    monkeypatch.setattr(backend, "experts", counted)
    watched = Engine(model)
    launched = 0
    one_by_one = run(watched, prompts(), params)
    assert [o.compute for o in one_by_one] == [o.compute for o in at_once]
    computes = [o.compute for o in one_by_one if o.compute is not None]
    assert sum(c.expert_rows for c in computes) == launched
    stats = watched.stats()
    full = sum(rows * experts for rows, experts in zip(stats.segment_rows, stats.segment_experts, strict=True))
    assert full - stats.skipped_experts == launched
    assert stats.segment_experts == (TOP_K, 2 * TOP_K, TOP_K)
    prompt, decoded = len(one_by_one[1].prompt_token_ids), EXACT.max_tokens or 0
    assert computes[1].expert_rows == LAYERS * (TOP_K * prompt + decoded - 1), "one expert each, behind the prompt"
    assert computes[1].full_expert_rows == LAYERS * TOP_K * (prompt + decoded - 1)


def test_layers_may_have_budgets_of_their_own(plain: LoadedModel) -> None:
    first = replace(CAPPED, experts_per_token={0: 1, 2: 2})
    output = run(Engine(plain), prompts(1), [first])[0]
    assert output.compute is not None
    assert output.compute.skipped_experts == (2 + 1) * ((EXACT.max_tokens or 0) - 1)
    kept = run(Engine(plain), prompts(1), [replace(FEWER, expert_keep={3: 0.01})])[0]
    assert kept.compute is not None
    assert kept.compute.skipped_experts == 2 * ((EXACT.max_tokens or 0) - 1)


@pytest.mark.parametrize("params", [CAPPED, ALL])
def test_pages_behind_a_position_that_went_without_experts_are_approximate(
    plain: LoadedModel, params: SamplingParams
) -> None:
    engine = Engine(plain, EngineConfig(block_size=PAGE))
    pool, prompt = engine.scheduler.pool, prompts(1)[0][:6]
    engine.add_request("first", prompt, params)
    for _ in range(8):
        engine.step()
    sequence = engine.scheduler.running[0]
    exact_pages = len(prompt) // PAGE if params is CAPPED else len(sequence.pages)
    assert [pool.is_exact(page) for page in sequence.pages] == [n < exact_pages for n in range(len(sequence.pages))]
    while engine.has_unfinished():
        engine.step()
    engine.add_request("second", [*sequence.token_ids, 5], EXACT)
    second = engine.scheduler.waiting[0].request
    engine.step()
    if params is CAPPED:
        assert second.num_cached_tokens == len(prompt) // PAGE * PAGE
    else:
        assert second.num_cached_tokens >= len(sequence.token_ids) - PAGE, "what lost nothing is shared"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expert_keep": 0.0}, "expert_keep must be above 0 and at most 1, not 0.0"),
        ({"expert_keep": 1.5}, "expert_keep must be above 0 and at most 1, not 1.5"),
        ({"expert_keep": float("nan")}, "expert_keep must be above 0 and at most 1, not nan"),
        ({"expert_keep": {0: 0.5, 1: 2}}, r"expert_keep must be above 0 and at most 1, not \(0.5, 2\)"),
        ({"experts_per_token": 0}, "experts_per_token must be at least 1 and below 2147483648, not 0"),
        (
            {"experts_per_token": 1.5},
            "experts_per_token must be a whole number, at least 1 and below 2.*, not 1.5",
        ),
        ({"expert_keep": True}, "expert_keep must be a number, above 0 and at most 1, not True"),
        ({"expert_keep": [0.5, 0.5]}, "expert_keep must be a number, above 0 and at most 1, not"),
        ({"expert_keep": {0: "0.5"}}, r"expert_keep must be a number, above 0 and at most 1, not \('0.5',\)"),
        ({"experts_per_token": 2, "quality": "exact"}, "experts_per_token=2 contradicts quality='exact'"),
        ({"expert_keep": 0.5, "quality": "exact"}, "expert_keep=0.5 contradicts quality='exact'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**{"quality": None, **settings})


def test_models_that_cannot_keep_a_budget_refuse_it(plain: LoadedModel, make_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"expert_keep names layer 9; layers with experts are 0 … 3"):
        Engine(plain).add_request("r", [5], replace(FEWER, expert_keep={9: 0.5}))
    dense = Engine(load_model(make_checkpoint("llama"), dtype="float32", progress=False))
    with pytest.raises(ValueError, match="needs experts; this llama model has none"):
        dense.add_request("r", [5], CAPPED)
    bare = Engine(load_model(make_checkpoint("mixtral"), dtype="float32", progress=False))
    with pytest.raises(ValueError, match=r"expert_keep=0.7 needs calibrated contributions"):
        bare.check([5], FEWER)
    assert run(bare, [[5, 6]], [CAPPED])[0].compute is not None, "a cap goes by the router's weights"


def test_routers_without_weights_refuse_a_budget(default_model: Path) -> None:
    model = load_model(default_model, dtype="bfloat16", progress=False)
    with pytest.raises(ValueError, match="needs routers that weigh their experts; in layer 0"):
        Engine(model, EngineConfig(max_model_len=64)).add_request("r", [5], CAPPED)
