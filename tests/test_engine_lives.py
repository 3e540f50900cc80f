"""Random lives of many requests on a real model: arrivals, aborts, preemptions, completions, shared beginnings."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.model.loaded import LoadedModel

PAGE_BYTES = 2 * 2 * 2 * 4 * 16 * 4  # 2 layers, 2 heads of 16 channels, 4 tokens


@pytest.fixture(scope="module")
def model(make_checkpoint: Callable[..., Path]) -> LoadedModel:
    return load_model(make_checkpoint("mixtral", num_hidden_layers=2), dtype="float32", progress=False)


def collect(engine: Engine, tokens: dict[str, dict[int, list[int]]], finished: set[str]) -> None:
    for delta in engine.step():
        assert delta.request_id not in finished
        completions = tokens.setdefault(delta.request_id, {})
        for completion in delta.completions:
            completions.setdefault(completion.index, []).extend(completion.token_ids)
        if delta.finished:
            finished.add(delta.request_id)


@pytest.mark.parametrize("seed", range(6))
def test_no_request_is_lost_and_none_changes_another(model: LoadedModel, seed: int) -> None:
    rng = random.Random(seed)
    config = EngineConfig(
        block_size=4,
        kv_memory=17 * PAGE_BYTES,
        max_num_seqs=rng.choice((4, 5, 9)),
        max_num_batched_tokens=rng.choice((5, 30, 200)),
        enable_prefix_caching=seed != 0,
    )
    engine = Engine(model, config)
    shared = [rng.randrange(3, 320) for _ in range(30)]
    asked: dict[str, tuple[list[int], SamplingParams]] = {}
    tokens: dict[str, dict[int, list[int]]] = {}
    finished: set[str] = set()
    aborted: set[str] = set()
    for step in range(120):
        if rng.random() < 0.35:
            prompt = shared[: rng.randrange(25)] + [rng.randrange(3, 320) for _ in range(rng.randrange(1, 9))]
            params = SamplingParams(
                temperature=rng.choice((0.0, 0.8)),
                seed=rng.randrange(9),
                n=rng.choice((1, 1, 3)),
                max_tokens=rng.randrange(1, 30),
                presence_penalty=rng.choice((0.0, 0.5)),
                logprobs=rng.choice((None, 1)),
            )
            asked[str(step)] = prompt, params
            engine.add_request(str(step), prompt, params, priority=rng.randrange(2))
        if rng.random() < 0.05 and (alive := [r for r in asked if r not in finished | aborted]):
            victim = rng.choice(alive)
            engine.abort([victim])
            aborted.add(victim)
        collect(engine, tokens, finished)
    while engine.has_unfinished():
        collect(engine, tokens, finished)
    stats = engine.stats()
    assert stats.free_pages == stats.total_pages == 17
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert finished == set(asked) - aborted
    assert stats.preemptions > 0
    assert stats.generation_tokens == sum(len(t) for completions in tokens.values() for t in completions.values())
    for request_id in rng.sample(sorted(finished), 8):
        alone: dict[str, dict[int, list[int]]] = {}
        solo = Engine(model)
        solo.add_request(request_id, *asked[request_id])
        while solo.has_unfinished():
            collect(solo, alone, set())
        assert alone[request_id] == tokens[request_id]
