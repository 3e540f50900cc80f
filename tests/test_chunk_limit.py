"""Prompts beside running streams: how many of their tokens a step takes, told from planted times, by counts alone."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.chunk_limit import FAIR, LEAST, ChunkLimit, for_streams
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.engine.schedule import Schedule
from dynamoe.dynamic.engine.step_times import StepTime, StepTimes, measure_step_times
from dynamoe.dynamic.llm import LLM
from test_scheduler import World


def limit(slowdown: float | str, per_position: float = 0.0) -> ChunkLimit:
    """Steps of 9 seconds and one more for every row."""
    points = tuple(StepTime(rows=rows, experts=0, layers=9.0 + rows, head=0.0) for rows in (1, 64))
    return ChunkLimit.of(slowdown, StepTimes(points, per_position))


@pytest.mark.parametrize(
    ("slowdown", "decodes", "rows"),
    # 9 + decodes + rows ≤ slowdown · (9 + decodes)
    [(3.0, 1, 20), (3.0, 11, 40), (5.0, 1, 40), (3.0, 91, 200), (1.5, 1, LEAST)],
)
def test_a_step_takes_what_the_table_says(slowdown: float, decodes: int, rows: int) -> None:
    chunks = limit(slowdown).step(decodes, 1)
    assert chunks.room(0, 10_000) == chunks.room(500, 10_000) == rows
    assert chunks.room(0, 7) == 7
    chunks.take(0, 5)
    assert chunks.room(0, 10_000) == rows - 5
    chunks.take(0, rows - 5)
    assert chunks.room(0, 10_000) == 0


def test_every_prompt_that_waits_has_a_fair_share() -> None:
    fair, bound = limit("fair"), limit(FAIR)
    assert fair.step(1, 1).room(0, 10_000) == bound.step(1, 9).room(0, 10_000) == 10
    assert fair.step(1, 3).room(0, 10_000) == 30
    assert fair.step(6, 16).room(0, 10_000) == 240


def test_positions_in_front_of_a_chunk_count() -> None:
    chunks = limit(5.0, per_position=1e-3).step(1, 1)  # a row behind 1000 positions takes 2 seconds instead of 1
    assert chunks.room(1000, 10_000) == 19  # 19 · (1 + 1.0095) < 40 < 20 · (1 + 1.01)
    chunks.take(1000, 10)
    assert chunks.room(0, 10_000) == 19  # 10 · 2.005 + 19 · 1.0095 < 40
    assert limit(5.0, per_position=9.0).step(1, 1).room(1000, 10_000) == LEAST


def counts(schedule: Schedule) -> list[int]:
    return [entry.count for entry in schedule.entries]


def test_prompts_are_cut_only_beside_streams() -> None:
    world = World(400, max_num_seqs=4, max_num_batched_tokens=100)
    world.scheduler.chunk_limit = limit(3.0)
    world.add([7] * 230, max_tokens=20)
    assert [counts(world.step()) for _ in range(3)] == [[100], [100], [30]]  # nobody waits
    second, third = world.add([8] * 50, max_tokens=2), world.add([9] * 30, max_tokens=2)
    # 9 + decodes + chunks are at most 30, then 33: the first prompt goes on, and the next is admitted behind it.
    assert [counts(world.step()) for _ in range(3)] == [[1, 20], [1, 20], [1, 10, 10]]
    assert (len(second.sequences[0].token_ids), third.sequences[0].num_computed) == (51, 10)
    assert counts(world.step()) == [1, 1, 20]


def test_a_prompt_waits_for_a_step_with_room_and_always_goes_on() -> None:
    world = World(400, max_num_seqs=4, max_num_batched_tokens=100)
    world.scheduler.chunk_limit = limit(1.1)
    world.add([7] * 10, max_tokens=20)
    world.step()
    first, second = world.add([8] * 40), world.add([9] * 40)
    assert [counts(world.step()) for _ in range(3)] == [[1, LEAST]] * 3
    assert second.sequences[0] in world.scheduler.waiting
    assert [counts(world.step()) for _ in range(2)] == [[1, LEAST]] * 2  # 40 are five times 8
    assert first.sequences[0].num_uncomputed == 1
    assert counts(world.step()) == [1, 1, LEAST]


@pytest.mark.parametrize("seed", range(3))
def test_random_lives_of_requests_beside_streams(seed: int) -> None:
    """The bound holds in every step, and everybody is served."""
    draws, bound = random.Random(seed), limit(2.0)
    world = World(60, max_num_seqs=6, max_num_batched_tokens=64, snapshots=4 if seed == 2 else None)
    world.scheduler.chunk_limit = bound
    requests = [world.add([draws.randrange(9) for _ in range(draws.randrange(1, 90))], n=1) for _ in range(30)]
    while not all(request.finished for request in requests):
        entries = world.step(draws.randrange(9)).entries
        decodes = sum(entry.sequence.num_output > 0 and entry.count == 1 for entry in entries)
        prompts = sum(entry.count for entry in entries) - decodes
        if decodes and prompts > LEAST + 1:  # an admitted prompt that lacks one token has room for one
            assert 9 + decodes + prompts <= 2.0 * (9 + decodes) + 1


def test_tokens_are_the_same_with_any_bound(make_checkpoint: Callable[..., Path]) -> None:
    model, found = load_model(make_checkpoint("qwen3_moe"), dtype="float32", progress=False), []
    for slowdown in (None, 1.4, 6.0):
        engine = Engine(model, EngineConfig(max_num_batched_tokens=128, enable_prefix_caching=False))
        assert engine.scheduler.chunk_limit is None
        engine.scheduler.chunk_limit = None if slowdown is None else limit(slowdown)
        tokens: dict[str, list[int]] = {"0": [], "1": [], "2": []}
        beside = 0  # steps in which the first decodes and the last has no token yet
        for number in (0, 1, 2):
            params = SamplingParams(temperature=0, max_tokens=30 - 10 * number, ignore_eos=True)
            prompt = [3 + (number + 7 * i) % 200 for i in range(120 if number else 5)]
            engine.add_request(str(number), prompt, params)
            while engine.has_unfinished() if number == 2 else not tokens["0"]:
                beside += not tokens["2"]
                for delta in engine.step():
                    tokens[delta.request_id] += delta.completions[0].token_ids
        found.append((tokens, beside))
    (plain, fewest), (small, most), (large, between) = found
    assert plain == small == large
    assert [len(plain[name]) for name in plain] == [30, 20, 10]
    assert fewest < between < most


@pytest.mark.parametrize("value", [1.0, 0.5, -3, float("nan"), "fast", True])
def test_a_bound_is_a_number_above_1(value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape("engine.prefill_slowdown must be")):
        EngineConfig(prefill_slowdown=value)


def test_auto_is_a_bound_where_streams_are_watched() -> None:
    assert for_streams(EngineConfig(), alone=True).prefill_slowdown == "fair"
    assert for_streams(EngineConfig(), alone=False).prefill_slowdown is None
    assert for_streams(EngineConfig(prefill_slowdown=7.0), alone=False).prefill_slowdown == 7.0
    assert for_streams(EngineConfig(prefill_slowdown=None), alone=True).prefill_slowdown is None


def test_an_engine_with_a_bound_times_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LLM("tiny", progress=False).model
    engine = Engine(model, EngineConfig(prefill_slowdown=2.0, max_num_seqs=8))
    assert engine.step_times is not None
    assert engine.scheduler.chunk_limit == ChunkLimit(times=engine.step_times, slowdown=2.0)
    assert Engine(model, EngineConfig(prefill_slowdown="auto")).scheduler.chunk_limit is None
    sizes = [point.rows for point in engine.step_times.points]
    assert sizes[:4] == [1, 2, 4, 8]
    assert len(set(sizes)) == len(sizes)  # unrelated tokens only
    planted = iter([(0.002 * size, 0.0) for size in (1, 2, 4, 8, 16, 32)] + [(0.5, 0.0), (0.3, 0.0)])
    monkeypatch.setattr("dynamoe.dynamic.engine.step_times._time", lambda *given: next(planted))
    times = measure_step_times(model.decoder, engine.runner.kv, 2048, (8, 3.0))
    assert [point.rows for point in times.points] == [1, 2, 4, 8, 16, 32]  # 32 rows take 4 times as long as 8
    assert times.per_position == pytest.approx(0.2 / (32 * (min(2048, model.spec.max_position) - 32)))
