"""Early exits in the engine: what leaves where depends on nothing but the row, and ``exact`` never notices."""

from __future__ import annotations

import copy
import random
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

LAYERS = 5
EXITS = {1: 0.4, 3: 0.4}
EXACT = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
PROBES: dict[str, dict[str, Any]] = {
    "mlp": {},
    "linear": {"kind": "linear"},
    "all features": {"previous": True, "router_entropy": True},
}
FORMATS = ("int8", "int4", "int8 cache")


def loading(case: str) -> dict[str, Any]:
    """How weights, keys and values are kept: float32, or quantised and bfloat16, where rows become integers too."""
    if case == "int8 cache":
        return {"dtype": "bfloat16", "kv_cache_dtype": "int8"}
    return {"dtype": "bfloat16", "quantization": case} if case in FORMATS else {"dtype": "float32"}


def early(**params: Any) -> SamplingParams:
    """Settings of a request whose tokens may leave, at every exit unless said otherwise."""
    settings = {**vars(EXACT), "quality": None, "exit_thresholds": dict.fromkeys(EXITS, 0.5), **params}
    return SamplingParams(**settings)


EARLY = early()


def prompts(count: int = 8, seed: int = 0) -> list[list[int]]:
    lengths = random.Random(seed).choices(range(1, 60), k=count)
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 320, (n,), generator=generator).tolist() for n in lengths]


def run(
    engine: Engine, requests: list[list[int]], params: SamplingParams | list[SamplingParams]
) -> list[RequestOutput]:
    every = params if isinstance(params, list) else [params] * len(requests)
    outputs = {}
    for number, (prompt, settings) in enumerate(zip(requests, every, strict=True)):
        engine.add_request(str(number), prompt, settings)
        outputs[str(number)] = RequestOutput(
            str(number), None, prompt, [CompletionOutput(i) for i in range(settings.n)]
        )
    while engine.has_unfinished():
        for delta in engine.step():
            outputs[delta.request_id].add(delta)
    assert engine.stats().free_pages == engine.stats().total_pages
    return list(outputs.values())


def choices(outputs: list[RequestOutput]) -> list[list[tuple[list[int], list[int]]]]:
    """Tokens, and the layers behind each."""
    return [[(c.token_ids, c.layers) for c in output.outputs] for output in outputs]


@pytest.fixture(scope="module", params=[*PROBES, "int4", pytest.param("int8", marks=pytest.mark.slow)])
def case(request: pytest.FixtureRequest) -> str:
    """A kind of probe, or a format of the weights."""
    return request.param


@pytest.fixture(scope="module")
def model(case: str, make_exits: Callable[..., Path]) -> LoadedModel:
    path = make_exits("qwen3_moe", EXITS, probe=PROBES.get(case, {}), num_hidden_layers=LAYERS)
    return load_model(path, backend="cpu", progress=False, **loading(case))


@pytest.fixture(scope="module")
def plain(case: str, make_checkpoint: Callable[..., Path]) -> LoadedModel:
    path = make_checkpoint("qwen3_moe", num_hidden_layers=LAYERS)
    return load_model(path, backend="cpu", progress=False, **loading(case))


@pytest.fixture(scope="module")
def alone(model: LoadedModel) -> list[list[tuple[list[int], list[int]]]]:
    """What every prompt gives when nobody is beside it, with exits."""
    return [choices(run(Engine(model, EngineConfig(enable_prefix_caching=False)), [p], EARLY))[0] for p in prompts()]


def test_rows_leave_at_every_exit(alone: list[list[tuple[list[int], list[int]]]]) -> None:
    layers = [depth for output in alone for _, depths in output for depth in depths[1:]]
    for depth in (*EXITS, LAYERS):
        assert layers.count(depth) > len(layers) / 20
    assert all(depths[0] == LAYERS for output in alone for _, depths in output), "the prompt runs all layers"


def test_exact_is_bit_identical_with_exits_or_without(model: LoadedModel, plain: LoadedModel) -> None:
    exact = SamplingParams(**{**vars(EXACT), "logprobs": 3})
    with_exits = run(Engine(model), prompts(), exact)
    mixed = run(Engine(model), prompts() * 2, [exact] * 8 + [EARLY] * 8)[:8]
    without = run(Engine(plain), prompts(), exact)
    for outputs in (with_exits, mixed):
        assert [o.outputs[0].logprobs for o in outputs] == [o.outputs[0].logprobs for o in without]
        assert choices(outputs) == choices(without)


def test_neighbours_and_their_thresholds_change_nothing(
    model: LoadedModel, alone: list[list[tuple[list[int], list[int]]]]
) -> None:
    assert choices(run(Engine(model), prompts(), EARLY)) == alone
    others = [early(exit_thresholds={1: 0.2 * (i % 5), 3: 1.0}) for i in range(7)]
    mixed = run(Engine(model), [*prompts(), *prompts(7, seed=3)], [EARLY] * 8 + others)
    assert choices(mixed[:8]) == alone
    chunked = Engine(model, EngineConfig(max_num_batched_tokens=7, max_num_seqs=4))
    assert choices(run(chunked, prompts(), EARLY)) == alone


def test_one_call_per_step_or_one_per_operation_is_the_same(
    model: LoadedModel, alone: list[list[tuple[list[int], list[int]]]]
) -> None:
    assert model.decoder.stack is not None
    decoder = copy.copy(model.decoder)
    decoder.stack = None
    assert choices(run(Engine(replace(model, decoder=decoder)), prompts(), EARLY)) == alone


@pytest.mark.parametrize("caching", [True, False])
def test_a_preempted_sequence_leaves_again_where_it_left(
    model: LoadedModel, alone: list[list[tuple[list[int], list[int]]]], caching: bool
) -> None:
    page_bytes = bytes_per_page(model.spec, model.decoder.dtype, 4)
    engine = Engine(
        model,
        EngineConfig(block_size=4, kv_memory=44 * page_bytes, max_num_batched_tokens=24, enable_prefix_caching=caching),
    )
    assert choices(run(engine, prompts(), EARLY)) == alone
    assert engine.stats().preemptions > 1


def test_completions_of_one_prompt_are_independent(model: LoadedModel) -> None:
    several = early(n=4, temperature=1.0, seed=5)
    together = run(Engine(model, EngineConfig(block_size=4)), prompts(3), several)
    crowded = run(Engine(model, EngineConfig(block_size=4, max_num_seqs=2)), prompts(3), several)
    assert choices(together) == choices(crowded)
    assert len({tuple(tokens) for tokens, _ in choices(together)[0]}) > 1


def test_prompt_logprobs_are_exact(model: LoadedModel) -> None:
    exact = run(Engine(model), prompts(), SamplingParams(**{**vars(EXACT), "prompt_logprobs": 2}))
    left = run(Engine(model), prompts(), early(prompt_logprobs=2))
    assert [o.prompt_logprobs for o in left] == [o.prompt_logprobs for o in exact]


def test_an_aborted_request_leaves_nothing_behind(model: LoadedModel) -> None:
    engine = Engine(model)
    for number, prompt in enumerate(prompts()):
        engine.add_request(str(number), prompt, EARLY)
    for _ in range(6):
        engine.step()
    engine.abort(map(str, range(8)))
    assert engine.stats().free_pages == engine.stats().total_pages
    assert engine.step() == []


@pytest.mark.parametrize("at_once", [True, False])
def test_executed_layers_are_counted_where_they_are_launched(
    model: LoadedModel, monkeypatch: Any, at_once: bool
) -> None:
    engine = Engine(model)
    if not at_once:
        monkeypatch.setattr(model.decoder, "stack", None)
    launched = [0] * LAYERS
    run_segment, run_with_exits = model.decoder.run_segment, model.decoder.run_with_exits

    def counted(segment: Any, x_TD: torch.Tensor, *rest: Any) -> torch.Tensor:
        for layer in segment.layers:
            launched[layer] += x_TD.shape[0]
        return run_segment(segment, x_TD, *rest)

    def counted_at_once(*arguments: Any) -> Any:
        result = run_with_exits(*arguments)
        launched_S = result.counts[len(result.out_TD) + 2 * len(result.decisions_N2) :]
        for segment, rows in zip(model.decoder.segments, launched_S.tolist(), strict=True):
            for layer in segment.layers:
                launched[layer] += rows
        return result

    monkeypatch.setattr(model.decoder, "run_segment", counted)
    monkeypatch.setattr(model.decoder, "run_with_exits", counted_at_once)
    outputs = run(engine, prompts(), [EARLY, EXACT] * 4)
    stats = engine.stats()
    assert stats.segment_layers == (1, 2, 2)
    assert [
        rows for n, rows in zip(stats.segment_layers, stats.segment_rows, strict=True) for _ in range(n)
    ] == launched
    totals = [0] * 3
    for output in outputs:
        assert output.compute is not None
        totals = [a + b for a, b in zip(totals, output.compute.segment_rows, strict=True)]
        skipped = sum(LAYERS - depth for depth in output.outputs[0].layers[1:])
        assert output.compute.projected_rows == skipped
        full = LAYERS * (len(output.prompt_token_ids) + len(output.outputs[0].layers) - 1)
        assert output.compute.layer_rows == full - skipped
    assert tuple(totals) == stats.segment_rows
    assert stats.projected_rows == sum(o.compute.projected_rows for o in outputs if o.compute)
    assert stats.projected_rows > 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about lanes that are masked out
def test_the_gpu_backend_runs_exits(make_exits: Callable[..., Path]) -> None:
    path = make_exits("qwen3_moe", {1: 0.5}, probe=PROBES["all features"], num_hidden_layers=2)
    outputs = {}
    for backend in ("cpu", "triton"):
        model = load_model(path, dtype="float32", backend=backend, device="cpu", progress=False)
        engine = Engine(model)
        outputs[backend] = choices(run(engine, [[5, 6, 7], [8]], early(max_tokens=5, exit_thresholds={1: 0.5})))
    assert outputs["cpu"] == outputs["triton"]
    assert {depth for output in outputs["cpu"] for _, depths in output for depth in depths} == {1, 2}


@pytest.mark.parametrize("family", ["olmoe", "qwen2", "granitemoe"])
def test_families_with_biases_full_norms_and_scales(family: str, make_exits: Callable[..., Path]) -> None:
    path = make_exits(family, EXITS, num_hidden_layers=LAYERS, **({"clip_qkv": 1.5} if family == "olmoe" else {}))
    outputs = {}
    for backend in ("cpu", "torch"):
        model = load_model(path, dtype="float32", backend=backend, progress=False)
        outputs[backend] = choices(run(Engine(model), prompts(4), early(max_tokens=8)))
    assert outputs["cpu"] == outputs["torch"]
    assert any(depth < LAYERS for output in outputs["cpu"] for _, depths in output for depth in depths)


def test_settings_that_make_no_sense_are_refused(model: LoadedModel, plain: LoadedModel) -> None:
    with pytest.raises(ValueError, match="exit after 2 layers; this model has exits after 1, 3"):
        Engine(model).add_request("r", [5], early(exit_thresholds={2: 0.5}))
    with pytest.raises(ValueError, match="exit after 1 layers; this model has none"):
        Engine(plain).check([5], EARLY)
    with pytest.raises(ValueError, match="exit_thresholds contradict quality='exact'"):
        SamplingParams(exit_thresholds={1: 0.5})
    with pytest.raises(ValueError, match=r"exit_thresholds must be between 0 and 1, not \(1.5,\)"):
        SamplingParams(quality=None, exit_thresholds={1: 1.5})
    with pytest.raises(ValueError, match=r"quality must be 'exact', or hold alpha .* and require, not 'lossless'"):
        SamplingParams(quality="lossless")
