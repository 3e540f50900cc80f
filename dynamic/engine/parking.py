"""When rows that go on behind an exit should wait for company, by the measured cost of running them now or later.

A segment's launch costs about as much for one row as for a few: weights are read once, and so are the experts that
several rows share. Against that, a row that waits is missing from the steps in between, which get dearer per row. With
N sequences that decode and are not parked elsewhere, a share q of which goes on at a boundary, a token costs

    now:            shallow(N) / N           + q · deep(q N) / (q N)
    with m at once: shallow(f) / f           + q · deep(m) / m           where f = N - m / 2 sequences run on average

where ``shallow`` includes what every step costs whatever it runs,

and the m with the lowest cost is waited for (the comparison is that of DREX, arXiv 2512.15705, per token). Nothing here
decides whether a row leaves.
"""

from __future__ import annotations

import itertools
import operator
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...kernels.api.types import AttentionBatch

if TYPE_CHECKING:
    from ..model.decoder import Decoder

PATIENCE = 16  # steps after which a row has waited long enough, whatever it costs
LEAST_GAIN = 0.15  # waiting must promise this much, for it never yet brought what it promised
_REPEATS = 3
_TICK = 2e-4  # resolution of what a step costs, in seconds
_SHARE_STEPS = 16  # resolution of the shares of rows that go on
_COMPANIES = sorted({*(1 << i for i in range(1, 12)), *(3 << i for i in range(11))})  # numbers of rows to wait for
_MEMORY = 256  # rows that their moving averages look back
_GROWTH = 1.01  # of the least time between two steps that was seen: it may become longer, slowly


@dataclass(frozen=True, kw_only=True)
class SegmentTimes:
    """Seconds of one launch by number of rows.

    Arguments:
        sizes: numbers of rows, rising, from 1.
        segments: per segment, one time per size.
        head: of the final norm and LM head, one time per size.
    """

    sizes: tuple[int, ...]
    segments: tuple[tuple[float, ...], ...]
    head: tuple[float, ...]


def measure_times(decoder: Decoder, page_size: int, max_rows: int) -> SegmentTimes:
    """Time the segments on random tokens, whose rows choose experts as differently as those of separate requests do."""
    sizes = [1 << i for i in range(max(max_rows - 1, 0).bit_length() + 1)]
    kv = decoder.allocate_cache(sizes[-1], page_size)
    generator = torch.Generator().manual_seed(0)
    segments: list[list[float]] = [[] for _ in decoder.segments]
    head: list[float] = []
    for size in sizes:
        tokens_R = torch.randint(decoder.spec.vocab_size, (size,), generator=generator).to(decoder.device)
        batch = last_slots(size, page_size, torch.device(decoder.device))
        best = [float("inf")] * (len(segments) + 1)
        for _ in range(_REPEATS):
            x_RD = decoder.embed(tokens_R)
            for number, segment in enumerate(decoder.segments):
                started = _now(decoder)
                x_RD = decoder.run_segment(segment, x_RD, kv, batch)
                best[number] = min(best[number], _now(decoder) - started)
            started = _now(decoder)
            decoder.logits(x_RD)
            best[-1] = min(best[-1], _now(decoder) - started)
        for times, seconds in zip((*segments, head), best, strict=True):
            times.append(seconds)
    return SegmentTimes(sizes=tuple(sizes), segments=tuple(map(tuple, segments)), head=tuple(head))


def _now(decoder: Decoder) -> float:
    if torch.device(decoder.device).type == "cuda":
        torch.cuda.synchronize(decoder.device)
    return time.perf_counter()


def last_slots(size: int, page_size: int, device: torch.device) -> AttentionBatch:
    """One row per sequence, each at the end of a page of its own."""
    pages = torch.arange(size, device=device)
    return AttentionBatch(
        positions_T=torch.full((size,), page_size - 1, device=device),
        slots_T=pages * page_size + page_size - 1,
        query_start_S1=torch.arange(size + 1, dtype=torch.int32, device=device),
        context_len_S=torch.full((size,), page_size, dtype=torch.int32, device=device),
        block_table_SM=pages.int()[:, None],
        max_query_len=1,
        max_context_len=page_size,
    )


class Parking:
    """Decides how many rows a boundary between segments waits for.

    Arguments:
        times: what launches cost.
    """

    def __init__(self, times: SegmentTimes) -> None:
        # By number of rows; this is asked in every step, and looked up faster than interpolated.
        counts = range(times.sizes[-1] + 1)
        self._seconds_SR = [np.interp(counts, times.sizes, seconds).tolist() for seconds in times.segments]
        self._head_R = np.interp(counts, times.sizes, times.head).tolist()
        # Of the rows that reach the exit in front of a segment, how many go on; index 0 is no exit.
        self._reached = [32.0] * len(times.segments)
        self._went_on = [32.0] * len(times.segments)
        self._step_seconds = float("inf")
        self._best = lru_cache(maxsize=4096)(self._find_best)
        self._waits = lru_cache(maxsize=4096)(self._anybody_waits)

    def observe(self, segment: int, reached: int, going: int) -> None:
        """Take in what happened at the exit in front of a segment."""
        kept = (1 - 1 / _MEMORY) ** reached
        self._reached[segment] = self._reached[segment] * kept + reached
        self._went_on[segment] = self._went_on[segment] * kept + going

    def observe_step(self, seconds: float, rows: int) -> None:
        """Take in what a step of so many rows took beside its segments, perhaps with idle time."""
        fixed = max(0.0, seconds - self._head_R[min(rows, len(self._head_R) - 1)])
        self._step_seconds = min(self._step_seconds * _GROWTH, fixed)

    def should_wait(self, segment: int, rows: int, running: int, waited: int) -> bool:
        """Whether the rows in front of a segment should wait.

        Arguments:
            rows: how many there are, parked ones included; running: sequences that decode, these rows included, and
                those that are parked elsewhere not.
            waited: steps that one of them has waited already.
        """
        if not rows or running < 2 or waited >= PATIENCE:
            return False
        return rows < self._best(segment, running, *self._state())

    def may_wait(self, running: int) -> bool:
        """Whether a row, be it alone, might have to wait in front of any segment; as for :meth:`should_wait`."""
        if running < 2:
            return False
        return self._waits(running, *self._state())

    def _state(self) -> tuple[tuple[int, ...], int]:
        """What the best company depends on: the share of rows that goes on at each exit, and what a step costs."""
        pairs = zip(self._went_on, self._reached, strict=True)
        shares = tuple(max(1, round(went_on / reached * _SHARE_STEPS)) for went_on, reached in pairs)
        fixed = 0 if self._step_seconds == float("inf") else round(self._step_seconds / _TICK)
        return shares, fixed

    def _anybody_waits(self, running: int, shares: tuple[int, ...], fixed: int) -> bool:
        return any(self._best(segment, running, shares, fixed) > 1 for segment in range(1, len(shares)))

    def _find_best(self, segment: int, running: int, shares: tuple[int, ...], fixed: int) -> int:
        """The number of rows to wait for; 0 where none should wait."""
        # The share of all rows that runs each segment.
        reach = list(itertools.accumulate((share / _SHARE_STEPS for share in shares), operator.mul))
        going = reach[segment]

        def cost(rows: float, steady: float) -> float:
            shallow = sum(_between(self._seconds_SR[n], steady * reach[n]) for n in range(segment)) / steady
            deep = [_between(self._seconds_SR[n], rows * reach[n] / going) for n in range(segment, len(shares))]
            every_step = fixed * _TICK + _between(self._head_R, steady)
            return shallow + every_step / steady + going * sum(deep) / rows

        best = 0, cost(going * running, running) * (1 - LEAST_GAIN)
        for rows in (size for size in _COMPANIES if going * running < size <= running):
            if (seconds := cost(rows, running - rows / 2)) < best[1]:
                best = rows, seconds
        return best[0]


def _between(seconds_R: list[float], rows: float) -> float:
    """The time of a launch with a mean number of rows. Less than one is a launch with one row in some of the steps."""
    below = int(rows)
    if below < 1:
        return rows * seconds_R[1]
    if below >= len(seconds_R) - 1:
        return seconds_R[-1]
    return seconds_R[below] + (rows - below) * (seconds_R[below + 1] - seconds_R[below])
