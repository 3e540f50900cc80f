"""Prefixes of models with recurrent states: what is taken from copies of states is bitwise what would be computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.block_pool import BlockPool
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.prefix_cache import PrefixCache
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.engine.schedule import Entry
from dynamoe.dynamic.engine.state_snapshots import StateSnapshots
from dynamoe.dynamic.model.kv_cache import bytes_per_sequence
from dynamoe.dynamic.model.loaded import LoadedModel
from engine_answers import Answer, completions
from family_parity import Variant
from request_maker import make_sequence
from test_decoder import random_prompts
from test_families_parity_states import VARIANTS

PAGE, OUTPUT = 8, 24
ModelOf = Callable[[Variant], LoadedModel]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> ModelOf:
    made: dict[str, LoadedModel] = {}

    def make(variant: Variant) -> LoadedModel:
        if repr(variant) not in made:
            directory = variant.save(tmp_path_factory.mktemp(variant.family))
            made[repr(variant)] = load_model(directory, dtype="bfloat16", device="cpu", progress=False)
        return made[repr(variant)]

    return make


def engine_of(model: LoadedModel, **settings: Any) -> Engine:
    return Engine(model, EngineConfig(**{"block_size": PAGE, "max_num_seqs": 4, **settings}))


def answers(engine: Engine, prompts: list[list[int]], **settings: Any) -> list[dict[int, Answer]]:
    """By completion, of prompts that run together."""
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=OUTPUT, ignore_eos=True, logprobs=0, **settings)
    return completions(engine, prompts, params)


def hits(engine: Engine, prompt: list[int], expected: list[dict[int, Answer]], **settings: Any) -> int:
    """Tokens that a prompt takes from the cache; its answers are the expected ones."""
    before = engine.stats().prefix_cache_hits
    assert answers(engine, [prompt], **settings) == expected
    return engine.stats().prefix_cache_hits - before


@pytest.mark.parametrize("chunk", [512, 13])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_prompt_goes_on_from_the_states_that_were_kept(model_of: ModelOf, variant: Variant, chunk: int) -> None:
    model = model_of(variant)
    engine = engine_of(model, max_num_batched_tokens=chunk)
    plain = engine_of(model, enable_prefix_caching=False)
    first, other, third = random_prompts([61, 30, 20], seed=3)
    again = answers(plain, [first])
    assert hits(engine, first, again) == 0
    assert hits(engine, first, again) == 56, "behind the last full page in front of the last token"
    follow_up = [*first, *again[0][0].tokens, *third]
    expected = answers(plain, [follow_up])
    assert hits(engine, follow_up, expected) == 80, "behind the last full page of output"
    branch = answers(plain, [first[:42] + other])
    assert hits(engine, first[:42] + other, branch) == 0, "pages are there, states are not"
    branch = answers(plain, [first[:42] + third])
    assert hits(engine, first[:42] + third, branch) == 40, "where the pages ended that were found before"
    assert plain.stats().prefix_cache_hits == 0


def test_completions_of_one_prompt(model_of: ModelOf) -> None:
    model = model_of(VARIANTS[0])
    prompts = random_prompts([40, 33], seed=4)
    plain = engine_of(model, enable_prefix_caching=False)
    expected = answers(plain, prompts, n=3)
    assert len({str(answer) for answer in expected[0].values()}) == 3
    engine = engine_of(model)
    assert answers(engine, prompts, n=3) == expected
    before = engine.stats().prefix_cache_hits
    assert answers(engine, prompts, n=3) == expected
    assert engine.stats().prefix_cache_hits - before >= 32 + 32


@pytest.mark.parametrize(("pages", "snapshots"), [(64, 1), (64, 3), (22, 2), (22, 16)])
@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[2]], ids=str)
def test_what_is_given_up_and_computed_again(
    model_of: ModelOf, monkeypatch: pytest.MonkeyPatch, variant: Variant, pages: int, snapshots: int
) -> None:
    """Few pages, so that sequences lose theirs; few snapshots, so that these are overwritten."""
    model = model_of(variant)
    common = random_prompts([50], seed=5)[0]
    tails = random_prompts([9, 30, 1, 14, 40])
    prompts = [common[:length] + tail for length, tail in zip((50, 24, 50, 33, 7), tails, strict=True)]
    plain = engine_of(model, enable_prefix_caching=False, max_num_seqs=1)
    expected = [answers(plain, [prompt])[0] for prompt in prompts]
    monkeypatch.setattr("dynamoe.dynamic.engine.engine.count_pages", lambda *_: (pages, snapshots))
    engine = engine_of(model, max_num_batched_tokens=29)
    for _ in range(3):
        assert answers(engine, prompts) == expected
    stats = engine.stats()
    assert stats.prefix_cache_hits > 0
    assert (stats.preemptions > 0) == (pages < 64)
    assert stats.state_bytes == (4 + snapshots) * bytes_per_sequence(model.spec)
    assert stats.free_pages == stats.total_pages


def test_rows_beside_a_restored_sequence_stay_what_they_are(model_of: ModelOf) -> None:
    """A prompt that is restored, one that is computed for the first time and one that goes on, in one step."""
    model = model_of(VARIANTS[1])
    prompts = random_prompts([49, 18, 33], seed=6)
    plain = engine_of(model, enable_prefix_caching=False)
    expected = [answers(plain, [prompt])[0] for prompt in prompts]
    engine = engine_of(model)
    answers(engine, prompts[:1])
    assert answers(engine, prompts) == expected
    assert engine.stats().prefix_cache_hits == 48


def test_states_behind_an_output_that_was_computed_again_stay(model_of: ModelOf) -> None:
    """A sequence loses its pages and its states behind its output, and keeps them behind the same page again."""
    model = model_of(VARIANTS[0])
    (prompt,) = random_prompts([20], seed=7)
    plain = engine_of(model, enable_prefix_caching=False)
    output = answers(plain, [prompt])[0][0].tokens
    engine = engine_of(model)
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=OUTPUT, ignore_eos=True)
    engine.add_request("it", prompt, params)
    scheduler = engine.scheduler
    while engine.has_unfinished():
        engine.step()
        if scheduler.running and scheduler.running[0].num_computed == 42:
            snapshots = scheduler.cache._snapshots
            assert snapshots is not None
            taken = [slot for slot in iter(snapshots.take, None) if slot is not None]
            for slot in taken:
                snapshots.release(slot)
            scheduler._preempt(scheduler.running[0])
    assert scheduler.preemptions == 1
    follow_up = [*prompt, *output, 5, 6]
    assert hits(engine, follow_up, answers(plain, [follow_up])) == 40


def test_states_that_are_not_exact_are_not_kept() -> None:
    pool = BlockPool(8)
    snapshots = StateSnapshots(range(2, 6), PAGE, longest=64)
    cache = PrefixCache(pool, PAGE, True, snapshots)
    sequence = make_sequence(list(range(40)))
    sequence.pages.extend(pool.allocate() for _ in range(5))
    entry = Entry(sequence, 0, 40)
    cache.keep_states(entry)
    assert [at for at, _ in entry.kept] == [32]
    sequence.num_computed = 40
    sequence.mark_approximate(31)
    cache.publish(sequence, 0)
    cache.publish_states(entry)
    assert pool.find(sequence.block_digests[2]) == sequence.pages[2]
    assert cache.lookup(make_sequence(list(range(40))))[0] == []
    assert {snapshots.take() for _ in range(4)} == set(range(2, 6))
