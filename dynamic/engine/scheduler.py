"""Which sequences run in a step, how many of their tokens, and on which pages."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter

from .block_pool import BlockPool
from .chunk_limit import ChunkLimit
from .config import EngineConfig
from .eviction import Eviction
from .prefix_cache import PrefixCache
from .request import Sequence, State
from .schedule import Entry, Schedule
from .state_slots import NO_SLOT, StateSlots
from .stats import GroupBytes

_rank = attrgetter("rank")


@dataclass(frozen=True, slots=True)
class _Place:
    """Room for a sequence: pages that hold its beginning, how many it needs beside, how many are free now.

    ``found`` pages are there that hold its beginning; without states behind them not all can be shared.
    """

    kv_shard: int
    shared: list[int]
    found: int
    new: int
    free: int


class Scheduler:
    """Continuous batching: every step takes decodes first, then prefill chunks, then waiting sequences.

    A waiting sequence is admitted when the free pages hold all of its known tokens, so only decodes ask for pages
    later. When none is left, the running sequence of the lowest rank gives its pages up and is computed again later,
    keeping the tokens it has; rank is priority with ageing (see ``age_rank``), then number of the completion.

    Where the pool has several KV shards, a waiting sequence goes to the one that has most of its beginning, among
    equals to the one with the most free pages, and stays there. A sequence that needs a page takes it from one of the
    same KV shard.

    Arguments:
        config: limits of a step.
        pool: pages; each KV shard must hold any one sequence alone.
        cache: finds shared pages, and knows the pages of layers that see less than others.
        window: how many positions a token sees at most, itself included; None: all. Pages behind it are given back.
        eviction: gives up pages as a cache policy wants it; None keeps all.
        states: a slot for each running sequence's recurrent states; None: the model has none. They are lost with the
            sequence's pages, and computed again with them, from where the cache has kept some.
    """

    def __init__(
        self,
        config: EngineConfig,
        pool: BlockPool,
        cache: PrefixCache,
        window: int | None = None,
        eviction: Eviction | None = None,
        states: StateSlots | None = None,
    ) -> None:
        self.chunk_limit: ChunkLimit | None = None  # for chunks of prompts beside decodes
        self.max_num_seqs = config.max_num_seqs
        self.max_rows = config.max_num_batched_tokens
        self.pool = pool
        self.cache = cache
        self.window = window
        self.eviction = eviction
        self.states = states
        self.windows = cache.windows
        self.page_size = cache.page_size
        self.running: list[Sequence] = []  # by rank
        self._changes = 0  # of which sequences these are
        self.waiting: list[Sequence] = []  # by rank
        self.preemptions = 0  # sequences, since the start
        self.prefix_cache_queries = self.prefix_cache_hits = 0  # tokens, since the start

    @property
    def evicted_pages(self) -> int:
        """Pages that a cache policy gave up so far."""
        return 0 if self.eviction is None else self.eviction.evicted_pages

    def cache_groups(self, page_bytes: Iterable[int]) -> tuple[GroupBytes, ...]:
        """How much of the memory of each group of layers sequences hold, by the bytes of its pages."""
        pool, groups = self.pool, self.windows
        held = pool.num_pages - pool.num_free, *(group.num_seen for group in groups)
        total = pool.num_pages, *(group.num_pages for group in groups)
        windows = self.window, *(group.window for group in groups)
        parts = zip(windows, held, total, page_bytes, strict=True)
        return tuple(GroupBytes(window, size * some, size * whole) for window, some, whole, size in parts)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        sequence.state = State.WAITING
        insort(self.waiting, sequence, key=_rank)

    def schedule(self) -> Schedule:
        """The next step's work; takes pages and moves sequences between the queues."""
        counts: dict[Sequence, int] = {}
        copies: dict[int, int] = {}  # to page → from page
        rows = self.max_rows
        preempted_before = self.preemptions
        for sequence in self.running.copy():
            if not rows:
                break
            is_decode = sequence.state is State.RUNNING and sequence.num_uncomputed == 1
            if is_decode and self._take_page(sequence, copies):
                counts[sequence] = 1
                rows -= 1
        only_decodes, changes = len(counts) == len(self.running), self._changes
        chunks = None
        if self.chunk_limit is not None and counts:
            prompts = len(self.running) - len(counts) + len(self.waiting)
            chunks = self.chunk_limit.step(len(counts), prompts)

        def fit(sequence: Sequence) -> int:
            """Put a chunk of a sequence into the step; gives its rows."""
            count, start = min(rows, self._chunk(sequence)), sequence.num_computed
            if chunks is not None:
                count = chunks.room(start, count)
                chunks.take(start, count)
            if count:
                counts[sequence] = count
            return count

        for sequence in self.running:
            if rows and sequence.num_uncomputed > 1:
                rows -= fit(sequence)
        while rows and (chunks is None or chunks.room(0, 1)) and self.preemptions == preempted_before:
            if (sequence := self._admit()) is None:
                break
            rows -= fit(sequence)
        entries = [Entry(s, s.num_computed, count) for s, count in counts.items()]
        for entry in entries:
            for window in self.windows:
                window.see(entry.sequence, entry.start, -(-(entry.start + entry.count) // self.page_size))
            if self.states is not None:
                self.cache.keep_states(entry)
        decoding = changes if only_decodes and changes == self._changes else None
        state_copies = [] if self.states is None else self.states.copies()
        page_copies = [(source, target) for target, source in copies.items()]
        window_copies = [window.copies() for window in self.windows]
        return Schedule(entries, page_copies, state_copies, window_copies, decoding)

    def _chunk(self, sequence: Sequence) -> int:
        """How many of its tokens a sequence may compute in one step."""
        if self.states is not None:
            return sequence.num_together
        return sequence.num_uncomputed if self.eviction is None else self.eviction.chunk(sequence)

    def _take_page(self, sequence: Sequence, copies: dict[int, int]) -> bool:
        """Make the next slot writable, whatever it costs others of lower rank. False if the sequence lost its own."""
        while True:
            block = (sequence.num_computed - sequence.num_evicted) // self.page_size
            is_new = block == len(sequence.pages)
            if not is_new and self.pool.references(sequence.pages[block]) == 1:
                return True
            if self.pool.free_in(sequence.kv_shard):
                page = self.pool.allocate(sequence.kv_shard)
                if is_new:
                    sequence.pages.append(page)
                else:  # shared with another completion: write to a copy
                    copies[page] = sequence.pages[block]
                    for window in self.windows:
                        window.copy(sequence.pages[block], page)
                    self.pool.release([sequence.pages[block]])
                    sequence.pages[block] = page
                return True
            # Not yet in this step's work, because sequences take pages by rank.
            victim = next(other for other in reversed(self.running) if other.kv_shard == sequence.kv_shard)
            self._preempt(victim)
            if victim is sequence:
                return False

    def _preempt(self, sequence: Sequence) -> None:
        self._drop_pages(sequence)
        self.running.pop(self._position(self.running, sequence))
        self._changes += 1
        if not sequence.request.prompt_logprobs_complete:
            sequence.request.prompt_logprobs = [None]
        self.preemptions += 1
        self.add(sequence)

    def go_exact(self, sequence: Sequence) -> None:
        """Let a running sequence go on exactly; where pages are approximate, all its tokens are computed again."""
        approximate = sequence.first_approximate < sequence.num_computed
        sequence.go_exact()
        self._changes += 1
        if approximate:
            self._drop_pages(sequence)
            self.running.pop(self._position(self.running, sequence))
            self.add(sequence)

    def _admit(self) -> Sequence | None:
        """Move the first waiting sequence to the running ones, if there is room for it."""
        if not self.waiting or len(self.running) >= self.max_num_seqs:
            return None
        sequence = self.waiting[0]
        places = [self._place(sequence, kv_shard) for kv_shard in range(self.pool.kv_shards)]
        place = max(
            filter(None, places), key=lambda place: (len(place.shared), place.free, -place.kv_shard), default=None
        )
        if place is None:
            return None
        shared, sequence.kv_shard = place.shared, place.kv_shard
        for page in shared:
            self.pool.retain(page)
        sequence.pages.extend(shared)
        sequence.pages.extend(self.pool.allocate(place.kv_shard) for _ in range(place.new))
        sequence.num_computed = len(shared) * self.page_size
        sequence.num_shared = place.found * self.page_size
        for window in self.windows:
            window.see(sequence, sequence.num_computed, len(shared))
        if self.states is not None:
            kept = self.cache.states_behind(sequence, len(shared))
            sequence.state_slot = self.states.take() if kept == NO_SLOT else self.states.take_copy(kept)
        if self.eviction is not None:
            self.eviction.computed(sequence)
        if self.cache.enabled:
            self.prefix_cache_queries += sequence.num_tokens
            self.prefix_cache_hits += sequence.num_computed
        self.waiting.pop(0)
        sequence.state = State.RUNNING
        insort(self.running, sequence, key=_rank)
        self._changes += 1
        return sequence

    def _place(self, sequence: Sequence, kv_shard: int) -> _Place | None:
        """What a waiting sequence would get in a KV shard; None if there is no room for it."""
        (shared, found), free = self.cache.lookup(sequence, kv_shard), self.pool.free_in(kv_shard)
        new = -(-sequence.num_tokens // self.page_size) - len(shared)
        taken = new + sum(self.pool.references(page) == 0 for page in shared)
        # One page in reserve for each running sequence: else an admission is soon followed by a preemption.
        reserve = self.running if self.pool.kv_shards == 1 else [s for s in self.running if s.kv_shard == kv_shard]
        return None if taken + len(reserve) > free else _Place(kv_shard, shared, found, new, free)

    def computed(self, entry: Entry) -> None:
        """Record that an entry has run."""
        sequence = entry.sequence
        sequence.num_computed += entry.count
        if sequence.first_approximate < sequence.num_computed:
            first = (max(entry.start, sequence.first_approximate) - sequence.num_evicted) // self.page_size
            for page in sequence.pages[first : -(-(sequence.num_computed - sequence.num_evicted) // self.page_size)]:
                self.pool.mark_approximate(page)
        self.cache.publish(sequence, entry.start // self.page_size)
        self.cache.publish_states(entry)
        for window in self.windows:
            window.see(sequence, sequence.num_computed, 0)
        if self.window is not None:
            first_seen = max(sequence.num_computed - self.window + 1, 0)  # by the token that comes next
            first_page = first_seen // self.page_size
            self.pool.release(sequence.pages[sequence.first_page : first_page])
            sequence.first_page = max(sequence.first_page, first_page)
        if self.eviction is not None:
            self.eviction.computed(sequence)

    def fork(self, sequence: Sequence) -> list[Sequence]:
        """The completions that a computed sequence stands for: all of its request's after the prompt, later itself.

        Further completions share its pages; those that find no place among the running ones wait, without pages.
        """
        request = sequence.request
        if len(request.sequences) == request.params.n:
            return [sequence]
        for index in range(len(request.sequences), request.params.n):
            sibling = sequence.fork(index)
            request.sequences.append(sibling)
            if len(self.running) >= self.max_num_seqs:
                self.add(sibling)
                continue
            for page in sequence.pages[sequence.first_page :]:
                self.pool.retain(page)
            for window in self.windows:
                window.share(sequence)
            sibling.seen = dict(sequence.seen)
            sibling.kv_shard = sequence.kv_shard
            sibling.pages.extend(sequence.pages)
            if self.states is not None:
                sibling.state_slot = self.states.take_copy(sequence.state_slot)
            sibling.first_page = sequence.first_page
            sibling.num_computed = sequence.num_computed
            sibling.num_evicted, sibling.kept_blocks = sequence.num_evicted, list(sequence.kept_blocks)
            sibling.first_approximate = sequence.first_approximate
            sibling.block_digests = list(sequence.block_digests)
            sibling.state = State.RUNNING
            insort(self.running, sibling, key=_rank)
            self._changes += 1
        return request.sequences

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its pages."""
        if sequence.state is State.FINISHED:
            return
        queue = self.running if sequence.state is State.RUNNING else self.waiting
        queue.pop(self._position(queue, sequence))
        self._changes += 1
        self._drop_pages(sequence)
        sequence.state = State.FINISHED

    def _drop_pages(self, sequence: Sequence) -> None:
        for window in self.windows:
            window.drop(sequence)
        # Backwards: of a freed sequence, the end is forgotten first, the beginning is what others may share.
        self.pool.release(reversed(sequence.pages[sequence.first_page :]))
        del sequence.pages[:]
        if self.states is not None and sequence.state_slot != NO_SLOT:
            self.states.release(sequence.state_slot)
            sequence.state_slot = NO_SLOT
        sequence.first_page = 0
        sequence.output_digest = None
        sequence.num_computed = sequence.num_evicted = 0
        sequence.kept_blocks.clear()
        sequence.skipped_experts = 0

    @staticmethod
    def _position(queue: list[Sequence], sequence: Sequence) -> int:
        position = bisect_left(queue, sequence.rank, key=_rank)
        assert queue[position] is sequence
        return position
