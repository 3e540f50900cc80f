"""No request ever receives a page that holds something else than the full model computes.

Random lives of an engine, with prompts that repeat what others wrote, against a record of what was projected where, and
of which rows went without experts, that is kept without the engine's own tags.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.block_pool import BlockPool
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.request import Sequence
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.engine.schedule import Entry
from dynamoe.dynamic.model.kv_cache import bytes_per_page
from dynamoe.dynamic.model.loaded import LoadedModel
from dynamoe.kernels.api.types import ExpertBudget
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PAGE = 4
EXITS = (1, 2)
LAYERS = 3


class Watch:
    """Follows an engine's pages by the slots that rows which leave, or lack experts, write to, and by what attends to
    them later."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tainted: set[int] = set()  # slots
        self.shared = 0  # pages that got another holder
        pool, scheduler, exits = engine.scheduler.pool, engine.scheduler, engine.runner.exits
        exits.decoder = copy.copy(exits.decoder)  # watched in this engine alone
        run_with_exits = exits.decoder.run_with_exits
        budgets = engine.runner.budgets
        record = budgets.record
        allocate, retain, computed, propagate = (
            pool.allocate,
            pool.retain,
            scheduler.computed,
            exits.decoder.propagate_kv,
        )

        def watched_allocate(kv_shard: int = 0) -> int:
            page = allocate(kv_shard)
            self.tainted -= set(self.slots(page))
            return page

        def watched_retain(page: int) -> None:
            assert self.tainted.isdisjoint(self.slots(page)), "an approximate page is handed out"
            self.shared += 1
            retain(page)

        def watched_propagate(exit: Any, x_RD: torch.Tensor, kv: Any, batch: Any) -> None:
            self.tainted |= set(batch.slots_T.tolist())
            propagate(exit, x_RD, kv, batch)

        def watched_run(x_TD: torch.Tensor, kv: Any, batch: Any, thresholds_NT: torch.Tensor, budget: Any) -> Any:
            result = run_with_exits(x_TD, kv, batch, thresholds_NT, budget)
            self.tainted |= set(batch.slots_T[result.depths_T < LAYERS].tolist())
            return result

        def watched_record(entries: list[Entry], budget: ExpertBudget | None) -> None:
            rows = [(entry.sequence, entry.start + n) for entry in entries for n in range(entry.count)]
            skipped = [] if budget is None else budget.skipped_T.tolist()
            for (sequence, position), experts in zip(rows, skipped, strict=budget is not None):
                if experts:
                    self.tainted.add(sequence.pages[position // PAGE] * PAGE + position % PAGE)
            record(entries, budget)

        def watched_computed(entry: Entry) -> None:
            computed(entry)
            self.spread(entry.sequence, pool)

        pool.allocate, pool.retain = watched_allocate, watched_retain  # type: ignore[method-assign]
        budgets.record = watched_record  # type: ignore[method-assign]
        scheduler.computed = watched_computed  # type: ignore[method-assign]
        exits.decoder.propagate_kv = watched_propagate  # type: ignore[method-assign]
        exits.decoder.run_with_exits = watched_run  # type: ignore[method-assign]

    @staticmethod
    def slots(page: int) -> range:
        return range(page * PAGE, (page + 1) * PAGE)

    def spread(self, sequence: Sequence, pool: BlockPool) -> None:
        """What comes after an approximate position attends to it; the engine's tags must say the same."""
        slots = [sequence.pages[p // PAGE] * PAGE + p % PAGE for p in range(sequence.num_computed)]
        first = next((position for position, slot in enumerate(slots) if slot in self.tainted), len(slots))
        self.tainted |= set(slots[first:])
        for number, page in enumerate(sequence.pages[: -(-len(slots) // PAGE)]):
            assert pool.is_exact(page) == ((number + 1) * PAGE <= first or first == len(slots))


@pytest.fixture(scope="module")
def model(make_exits: Callable[..., Path]) -> LoadedModel:
    path = make_exits("qwen3_moe", dict.fromkeys(EXITS, 0.3), num_hidden_layers=LAYERS)
    return load_model(path, dtype="float32", backend="cpu", progress=False)


probabilities = st.sampled_from((0.0, 0.4, 0.5, 0.6, 1.0))
requests = st.fixed_dictionaries(
    {
        "follows": st.integers(0, 7),  # begins with what this earlier request has so far
        "cut": st.integers(0, 6),  # without its last tokens
        "suffix": st.lists(st.integers(3, 5), min_size=1, max_size=6),
        "thresholds": st.none() | st.dictionaries(st.sampled_from(EXITS), probabilities, min_size=1),
        "experts": st.sampled_from((None, None, 1, 2, 3)),  # of 3 that the routers choose
        "max_tokens": st.integers(1, 24),
        "n": st.sampled_from((1, 1, 1, 3)),
        "priority": st.integers(0, 1),
        "steps": st.integers(0, 6),  # before the next one comes
    }
)


def parameters(wish: dict[str, Any]) -> SamplingParams:
    thresholds, experts = wish["thresholds"], wish["experts"]
    return SamplingParams(
        temperature=0.0 if wish["n"] == 1 else 1.0,
        seed=3,
        n=wish["n"],
        max_tokens=wish["max_tokens"],
        ignore_eos=True,
        detokenize=False,
        quality="exact" if thresholds is None and experts is None else None,
        exit_thresholds=thresholds or {},
        experts_per_token=experts,
    )


def collect(engine: Engine, tokens: dict[str, dict[int, list[int]]], steps: int | None = None) -> None:
    for _ in itertools.count() if steps is None else range(steps):
        if not engine.has_unfinished():
            return
        for delta in engine.step():
            for completion in delta.completions:
                tokens[delta.request_id].setdefault(completion.index, []).extend(completion.token_ids)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    wishes=st.lists(requests, min_size=2, max_size=8),
    pages=st.sampled_from((12, 18, 60)),
    rows=st.sampled_from((3, 9, 64)),
    at_once=st.booleans(),  # a step in one call of the backend, or segment by segment
)
def test_approximate_pages_are_never_shared(
    model: LoadedModel, wishes: list[dict[str, Any]], pages: int, rows: int, at_once: bool
) -> None:
    config = EngineConfig(
        block_size=PAGE,
        kv_memory=pages * bytes_per_page(model.spec, torch.float32, PAGE),
        max_num_batched_tokens=rows,
        max_num_seqs=4,
    )
    decoder = copy.copy(model.decoder)
    decoder.stack = decoder.stack if at_once else None
    engine = Engine(replace(model, decoder=decoder), config)
    Watch(engine)
    tokens: dict[str, dict[int, list[int]]] = {}
    prompts: list[list[int]] = []
    for number, wish in enumerate(wishes):
        begin: list[int] = [9] * 6
        if wish["follows"] < number:
            begin = prompts[wish["follows"]] + tokens[str(wish["follows"])].get(0, [])
            begin = begin[: len(begin) - wish["cut"]]
        prompts.append(begin[: PAGE * 12 - 32] + wish["suffix"])
        tokens[str(number)] = {}
        engine.add_request(str(number), prompts[-1], parameters(wish), priority=wish["priority"])
        collect(engine, tokens, wish["steps"])
    collect(engine, tokens)
    assert engine.stats().free_pages == pages
    for number, wish in enumerate(wishes):
        single = Engine(model, EngineConfig(enable_prefix_caching=False))
        alone: dict[str, dict[int, list[int]]] = {"r": {}}
        single.add_request("r", prompts[number], parameters(wish))
        collect(single, alone)
        assert tokens[str(number)] == alone["r"], "a request's tokens depend on its neighbours"


def test_the_watch_sees_pages_being_shared(model: LoadedModel) -> None:
    """The property above would hold of an engine that never shares a page."""
    engine = Engine(model, EngineConfig(block_size=PAGE))
    watch = Watch(engine)
    params = SamplingParams(
        temperature=0.0, max_tokens=20, ignore_eos=True, quality=None, exit_thresholds=dict.fromkeys(EXITS, 0.5)
    )
    tokens: dict[str, dict[int, list[int]]] = {"a": {}, "b": {}}
    engine.add_request("a", [9] * 10, params)
    collect(engine, tokens)
    assert watch.tainted, "nobody left early"
    engine.add_request("b", [9] * 10 + tokens["a"][0], params)
    collect(engine, tokens)
    assert 2 <= watch.shared < 5, "the pages of the prompt are shared, those of the output are not"
