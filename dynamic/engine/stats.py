"""Numbers about an engine, for metrics and logs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

from ..model.counters import Compute, Exchange, ExpertTraffic


class GroupBytes(NamedTuple):
    """Of the cache of layers with one window, in the number of positions that a token sees; None sees all."""

    window: int | None
    held: int  # by sequences
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats(Compute):
    """A snapshot. Counters count from the engine's start, those of :class:`Compute` for all requests together.

    Arguments:
        num_running, num_waiting: sequences.
        free_pages, total_pages: of the cache; free ones may still hold findable prefixes.
        kv_usage: share of the pages that sequences hold, 0 to 1.
        prefix_cache_queries, prefix_cache_hits: tokens looked up and found.
        prompt_tokens: prompt tokens of the requests whose prompt has been run.
        generation_tokens: tokens sampled.
        preemptions: sequences that lost their pages and were computed again.
        exchange: between the processes that share the model; None where there is one.
        evicted_pages: that a cache policy gave up.
        state_bytes: memory of the recurrent states of as many sequences as run at a time, and of the copies of states
            that are kept for prefixes.
        cache_groups: memory of the pages of each group of layers. Those of the first are the pages counted above.
        expert_traffic: between the disk and the memory of experts; None where all are in memory.
    """

    num_running: int
    num_waiting: int
    free_pages: int
    total_pages: int
    kv_usage: float
    prefix_cache_queries: int
    prefix_cache_hits: int
    prompt_tokens: int
    generation_tokens: int
    preemptions: int
    exchange: Exchange | None = None
    evicted_pages: int = 0
    state_bytes: int = 0
    cache_groups: tuple[GroupBytes, ...] = ()
    expert_traffic: ExpertTraffic | None = None

    @property
    def compute(self) -> Compute:
        """What was executed."""
        return self


class Pace:
    """How fast requests finish while there are any, as a moving average."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._interval = 1.0

    def resume(self) -> None:
        """A request begins where there was none: the idle time before it does not count."""
        self._last = time.monotonic()

    def finished(self) -> None:
        """A request is done."""
        now = time.monotonic()
        self._interval += 0.1 * (now - self._last - self._interval)
        self._last = now

    @property
    def seconds_per_request(self) -> float:
        """At least one second, at most a minute."""
        return min(max(self._interval, 1.0), 60.0)
