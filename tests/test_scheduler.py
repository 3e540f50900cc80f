"""The scheduler without a model: random lives of requests against a memory that remembers what was written where."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from dynamoe.dynamic.engine.block_pool import BlockPool
from dynamoe.dynamic.engine.cache_size import most_seen
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.prefix_cache import PrefixCache
from dynamoe.dynamic.engine.request import Request, Sequence, State
from dynamoe.dynamic.engine.schedule import Schedule
from dynamoe.dynamic.engine.scheduler import Scheduler
from dynamoe.dynamic.engine.state_slots import StateSlots
from dynamoe.dynamic.engine.state_snapshots import StateSnapshots
from dynamoe.dynamic.engine.window_pages import WindowPages
from request_maker import make_request


class World:
    """A scheduler, and in place of the cache's tensors the history behind every slot.

    Arguments:
        snapshots: of recurrent states; None: the model has none.
        windows: of groups of layers that see less.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int = 4,
        window: int | None = None,
        kv_shards: int = 1,
        snapshots: int | None = None,
        windows: tuple[int, ...] = (),
        **config: object,
    ) -> None:
        self.config = EngineConfig(block_size=page_size, **config)  # type: ignore[arg-type]
        self.pool = BlockPool(num_pages, kv_shards)
        running = self.config.max_num_seqs
        kept = None if snapshots is None else StateSnapshots(range(running, running + snapshots), page_size, 64)
        self.windows = [
            WindowPages(self.pool, min(num_pages, most_seen(self.config, seen, kv_shards)), seen, page_size)
            for seen in windows
        ]
        cache = PrefixCache(self.pool, page_size, self.config.enable_prefix_caching, kept, self.windows)
        slots = None if snapshots is None else StateSlots(running)
        self.scheduler = Scheduler(self.config, self.pool, cache, window, states=slots)
        self.states: dict[int, int] = {}
        self.window = window or 1 << 30
        self.page_size = page_size
        self.memory: dict[tuple[int, int], int] = {}
        self.seen_memory: list[dict[tuple[int, int], int]] = [{} for _ in windows]
        self.arrivals = 0

    def add(self, prompt: list[int], priority: int = 0, salt: str | None = None, **params: Any) -> Request:
        request = make_request(
            prompt,
            str(self.arrivals),
            priority=priority,
            salt=salt,
            arrival=self.arrivals,
            max_total_tokens=self.pool.shard_pages * self.page_size,
            **{"max_tokens": 8, **params},
        )
        self.arrivals += 1
        self.scheduler.add(request.sequences[0])
        return request

    def step(self, next_token: int = 7) -> Schedule:
        schedule = self.scheduler.schedule()
        self.check_limits(schedule)
        old = dict(self.memory)
        for source, target in schedule.copies:
            assert source // self.pool.shard_pages == target // self.pool.shard_pages, "a page left its KV shard"
            self.memory |= {(target, i): old[source, i] for i in range(self.page_size) if (source, i) in old}
        for memory, copies in zip(self.seen_memory, schedule.window_copies, strict=True):
            was = dict(memory)
            for source, target in copies:
                memory |= {(target, i): was[source, i] for i in range(self.page_size) if (source, i) in was}
        if self.scheduler.states is not None:
            self.run_states(schedule)
        for entry in schedule.entries:
            sequence = entry.sequence
            for position in range(entry.start, entry.start + entry.count):
                page = sequence.pages[position // self.page_size]
                assert self.pool.references(page) == 1, "a shared page is written to"
                self.memory[page, position % self.page_size] = history(sequence, position)
                for memory, group in zip(self.seen_memory, self.windows, strict=True):
                    memory[own_page(group, page), position % self.page_size] = history(sequence, position)
        for entry in schedule.entries:
            self.scheduler.computed(entry)
        self.check_pages()
        for entry in schedule.entries:
            if entry.sequence.num_uncomputed == 0:
                for sequence in self.scheduler.fork(entry.sequence):
                    sequence.append(next_token + sequence.index)
                    if sequence.num_output >= sequence.request.max_output_tokens:
                        self.scheduler.finish(sequence)
        return schedule

    def run_states(self, schedule: Schedule) -> None:
        """What is in a sequence's slot is what its tokens up to now leave there."""
        self.states |= {target: self.states[source] for source, target in schedule.state_copies}
        own = [entry.sequence.state_slot for entry in schedule.entries]
        kept = [slot for entry in schedule.entries for _, slot in entry.kept]
        assert len({*own, *kept}) == len(own) + len(kept), "a slot is written twice"
        assert all(slot < self.config.max_num_seqs for slot in own)
        assert all(slot >= self.config.max_num_seqs for slot in kept)
        for entry in schedule.entries:
            sequence, end = entry.sequence, entry.start + entry.count
            if entry.start:
                assert self.states[sequence.state_slot] == history(sequence, entry.start - 1)
            self.states[sequence.state_slot] = history(sequence, end - 1)
            for at, slot in entry.kept:
                assert entry.start < at <= end
                self.states[slot] = history(sequence, at - 1)

    def check_limits(self, schedule: Schedule) -> None:
        assert sum(e.count for e in schedule.entries) <= self.config.max_num_batched_tokens
        assert len(self.scheduler.running) <= self.config.max_num_seqs
        assert len({e.sequence for e in schedule.entries}) == len(schedule.entries)
        for queue in (self.scheduler.running, self.scheduler.waiting):
            assert [s.rank for s in queue] == sorted(s.rank for s in queue)

    def check_pages(self) -> None:
        held: dict[int, int] = {}
        for sequence in self.scheduler.running:
            for page in sequence.pages[sequence.first_page :]:
                held[page] = held.get(page, 0) + 1
                assert page // self.pool.shard_pages == sequence.kv_shard
            for position in range(max(sequence.num_computed - self.window + 1, 0), sequence.num_computed):
                slot = sequence.pages[position // self.page_size], position % self.page_size
                assert self.memory[slot] == history(sequence, position), "somebody else wrote to this slot"
            for memory, group in zip(self.seen_memory, self.windows, strict=True):
                for position in range(max(sequence.num_computed - group.window + 1, 0), sequence.num_computed):
                    page, offset = sequence.pages[position // self.page_size], position % self.page_size
                    assert memory[own_page(group, page), offset] == history(sequence, position), "its page was reused"
        assert all(self.pool.references(page) == held.get(page, 0) for page in range(self.pool.num_pages))
        assert self.pool.num_free == self.pool.num_pages - len(held)
        assert all(not s.pages and s.num_computed == 0 for s in self.scheduler.waiting)


def own_page(group: WindowPages, page: int) -> int:
    assert group.holds(page), "a page that somebody sees is lost"
    return int(group.own(np.array([page]))[0])


def history(sequence: Sequence, position: int) -> int:
    return hash((sequence.request.cache_salt, *sequence.token_ids[: position + 1]))


@pytest.mark.parametrize("seed", range(110))
def test_random_lives_keep_every_page_accounted_for(seed: int) -> None:
    live(random.Random(seed), seed)


@pytest.mark.parametrize("seed", range(110, 180))
def test_random_lives_with_pages_of_layers_that_see_a_window(seed: int) -> None:
    rng = random.Random(seed)
    world = live(rng, seed * 11 % 110, windows=rng.sample(range(1, 18), rng.choice((1, 1, 2))))
    for group in world.windows:
        assert group.num_seen == 0
    if not world.config.enable_prefix_caching:
        assert not any(group.holds(page) for group in world.windows for page in range(world.pool.num_pages))


def live(rng: random.Random, seed: int, windows: Iterable[int] = ()) -> World:
    """Requests come, run, fork, are preempted and aborted; what kind of world that is depends on ``seed``."""
    kv_shards = rng.choice((2, 3)) if seed >= 60 else 1
    window = rng.choice((1, 4, 5, 9)) if 40 <= seed < 70 else None
    world = World(
        num_pages=kv_shards * rng.choice((8, 14, 40)),
        kv_shards=kv_shards,
        snapshots=rng.choice((0, 1, 3, 12)) if seed >= 80 else None,
        window=window,
        max_num_seqs=rng.choice((1, 3, 6)),
        max_num_batched_tokens=rng.choice((2, 7, 64)),
        enable_prefix_caching=rng.random() < 0.8,
        windows=tuple(seen for seen in windows if window is None or seen < window),
    )
    shared = [rng.randrange(4) for _ in range(20)]
    requests, aborted = [], set()
    for _ in range(250):
        if rng.random() < 0.25:
            prompt = shared[: rng.randrange(12)] + [rng.randrange(3) for _ in range(rng.randrange(1, 8))]
            params = {"n": rng.choice((1, 1, 2, 5)), "max_tokens": rng.randrange(1, 13)}
            salt = rng.choice((None, None, "x"))
            requests.append(world.add(prompt, rng.choice((0, 0, 1)), salt, **params))
        if requests and rng.random() < 0.05:
            victim = rng.choice(requests)
            aborted.add(victim.request_id)
            for sequence in victim.sequences:
                world.scheduler.finish(sequence)
            world.check_pages()
        world.step(next_token=rng.randrange(3))
    for _ in range(3000):
        if not (world.scheduler.running or world.scheduler.waiting):
            break
        assert world.step(next_token=rng.randrange(3)).entries, "requests wait although nothing runs"
    assert world.pool.num_free == world.pool.num_pages
    for request in requests:
        if request.request_id not in aborted:
            assert request.finished
            assert all(s.num_output == request.max_output_tokens for s in request.sequences)
        assert all(s.state is State.FINISHED for s in request.sequences)
    return world


@pytest.mark.parametrize("window", [1, 4, 5, 6, 16])
def test_pages_that_no_later_token_sees_are_given_back(window: int) -> None:
    world = World(num_pages=20, window=window)
    sequence = world.add([1] * 10, max_tokens=40).sequences[0]
    while sequence.state is not State.FINISHED:
        world.step()
        if sequence.state is State.RUNNING:
            seen = range(max(sequence.num_computed - window + 1, 0), sequence.num_computed + 1)
            assert world.pool.num_pages - world.pool.num_free <= seen[-1] // 4 - seen[0] // 4 + 1
    assert world.pool.num_free == world.pool.num_pages


def test_a_window_holds_its_bound_however_long_the_context_and_prefixes_need_what_it_sees() -> None:
    world = World(200, windows=(9,), max_num_seqs=2, max_num_batched_tokens=8, page_size=4)
    (group,) = world.windows
    prompt = list(range(40))
    sequence = world.add(prompt, max_tokens=130).sequences[0]
    while sequence.state is not State.FINISHED:
        world.step()
        assert group.num_seen <= (9 + 8) // 4 + 1
    assert group.num_pages == 2 * (2 * (3 + 2) + 2)
    hits = []
    for tokens in (
        [*sequence.token_ids[:-1], 1],  # goes on where the answer ended
        [*prompt, 99, 98],  # where the prompt ended
        *([100 + n] * 9 for n in range(12)),
        [*prompt[:20], 99, 98, 97],  # what its window saw there was given up for the ends of other prompts
        [*prompt[:20], 96, 95, 94],  # but the second one that goes on there keeps it
    ):
        before = world.scheduler.prefix_cache_hits
        request = world.add(tokens, max_tokens=1)
        while not request.finished:
            world.step()
        hits.append(world.scheduler.prefix_cache_hits - before)
    assert hits == [168, 40, *[0] * 12, 0, 20]


def test_decodes_go_before_prefill_and_long_prompts_come_in_chunks() -> None:
    world = World(100, max_num_batched_tokens=10)
    first = world.add([1] * 5).sequences[0]
    world.step()
    second = world.add([2] * 23).sequences[0]
    counts = [{e.sequence: e.count for e in world.step().entries} for _ in range(4)]
    assert counts == [{first: 1, second: 9}, {first: 1, second: 9}, {first: 1, second: 5}, {first: 1, second: 1}]


def test_lower_priority_numbers_go_first_then_arrival() -> None:
    world = World(100, max_num_seqs=1)
    late, early, urgent = world.add([1], 5), world.add([2], 5), world.add([3], 0)
    order = []
    while world.scheduler.running or world.scheduler.waiting:
        for entry in world.step().entries:
            if entry.sequence.request not in order:
                order.append(entry.sequence.request)
    assert order == [urgent, late, early]


def test_a_full_pool_takes_the_pages_of_the_lowest_rank_and_keeps_its_tokens() -> None:
    world = World(num_pages=6, page_size=2, enable_prefix_caching=False)
    low = world.add([1, 1], priority=1, max_tokens=8).sequences[0]
    high = world.add([2, 2], priority=0, max_tokens=8).sequences[0]
    while world.scheduler.preemptions == 0:
        world.step()
    assert high.state is State.RUNNING
    assert low.state is State.WAITING
    tokens = list(low.token_ids)
    assert len(tokens) > 2
    schedule = world.step()
    while low.state is State.WAITING:
        schedule = world.step()
    entry = next(e for e in schedule.entries if e.sequence is low)
    assert (entry.start, entry.count) == (0, len(tokens))
    assert low.token_ids[: len(tokens)] == tokens


def test_a_prefix_hit_shares_pages_with_a_running_sequence() -> None:
    world = World(100)
    first = world.add([5] * 10, max_tokens=30).sequences[0]
    world.step()
    second = world.add([5] * 9 + [6], max_tokens=30).sequences[0]
    entries = {e.sequence: e for e in world.step().entries}
    assert (entries[second].start, entries[second].count) == (8, 2)
    assert second.pages[:2] == first.pages[:2]
    assert world.scheduler.prefix_cache_hits == 8


def test_a_sequence_goes_where_its_beginning_is_else_where_there_is_most_room() -> None:
    world = World(num_pages=20, kv_shards=2)
    first, second, third = (world.add([token] * 10, max_tokens=20).sequences[0] for token in (1, 2, 3))
    world.step()
    assert [first.kv_shard, second.kv_shard, third.kv_shard] == [0, 1, 0]
    follower = world.add([3] * 10, max_tokens=20).sequences[0]
    world.step()
    assert follower.kv_shard == 0, "its beginning is there, although the other KV shard has more room"
    assert follower.pages[:2] == third.pages[:2]
    elsewhere = world.add([3] * 9 + [4] * 8, max_tokens=20).sequences[0]
    world.step()
    assert elsewhere.kv_shard == 1, "there is no room where its beginning is"
    assert not set(elsewhere.pages) & set(third.pages)
    assert not world.scheduler.preemptions


def test_a_full_home_takes_pages_from_its_own_sequences() -> None:
    world = World(num_pages=12, page_size=2, kv_shards=2, enable_prefix_caching=False)
    requests = [world.add([n, n], priority=n, max_tokens=tokens) for n, tokens in enumerate((8, 1, 8, 8))]
    first, _, third, last = (request.sequences[0] for request in requests)
    world.step()
    assert [first.kv_shard, third.kv_shard, last.kv_shard] == [0, 0, 1]
    while world.scheduler.preemptions == 0:
        world.step()
    assert third.state is State.WAITING
    assert last.state is State.RUNNING, "its pages are of no use to the other KV shard"


def test_a_prefix_hit_of_a_model_with_states_begins_where_states_were_kept() -> None:
    world = World(100, snapshots=12)
    common = [5] * 10
    starts = []
    for tail in ([1, 2, 3], [6, 7], [8, 9], [8, 9]):
        sequence = world.add(common + tail, max_tokens=1).sequences[0]
        starts += [entry.start for entry in world.step().entries if entry.sequence is sequence]
    assert starts == [0, 0, 8, 8], "the second prompt shows where it stops being like the first"
    assert world.scheduler.prefix_cache_hits == 16


def test_generated_tokens_are_found_as_a_prefix_too() -> None:
    world = World(100)
    sequence = world.add([5] * 3, max_tokens=10).sequences[0]
    while sequence.state is not State.FINISHED:
        world.step()
    again = world.add([*sequence.token_ids, 1]).sequences[0]
    assert next(e for e in world.step().entries if e.sequence is again).start == 12


def test_completions_share_the_prompt_and_copy_the_last_page_when_they_write() -> None:
    world = World(100, page_size=4)
    request = world.add([5] * 6, n=3)
    world.step()
    assert len({tuple(s.pages) for s in request.sequences}) == 1
    assert 100 - world.pool.num_free == 2  # three completions, two pages
    schedule = world.step()
    assert len(schedule.copies) == 2  # the last holder writes in place
    assert len({s.pages[0] for s in request.sequences}) == 1
    assert len({s.pages[1] for s in request.sequences}) == 3


def test_more_completions_than_places_wait_and_finish() -> None:
    world = World(100, max_num_seqs=2)
    request = world.add([5] * 6, n=5, max_tokens=3)
    for _ in range(30):
        world.step()
    assert request.finished
    assert world.pool.num_free == 100


@pytest.mark.parametrize(("priority", "passing"), [(1, 64), (3, 128), (2**31 - 1, 64 * 31)])
def test_a_stream_of_others_passes_a_waiting_request_a_bounded_number_of_times(priority: int, passing: int) -> None:
    """Somebody new with priority 0 comes whenever somebody finishes; the one who waits has its turn all the same."""
    world = World(100, max_num_seqs=1)
    world.add([1], max_tokens=1)
    waiting = world.add([2], priority, max_tokens=1)
    for _ in range(passing + 2):
        world.add([3], max_tokens=1)
        world.step()
        if waiting.finished:
            break
    assert waiting.finished
    assert world.arrivals - 2 >= passing  # and no earlier than its priority says


def test_a_raised_priority_is_worth_a_number_of_arrivals() -> None:
    world = World(100, max_num_seqs=1)
    waiting = world.add([1], max_tokens=1)
    for number in range(63):
        urgent = world.add([2], -1, max_tokens=1)
        world.step()
        assert urgent.finished, number
    world.add([2], -1, max_tokens=1)
    world.add([2], -1, max_tokens=1)
    world.step()
    world.step()
    assert waiting.finished
