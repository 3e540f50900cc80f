"""When rows that go on behind an exit should wait for company, by the measured cost of running them now or later.

A segment's launch costs about as much for one row as for a few: weights are read once, and so are the experts that
several rows share. Against that, a row that waits is missing from the steps in between, which get dearer per row. With
N sequences decoding, a share q of which goes on at a boundary, a token costs

    now:            shallow(N) / N           + q · deep(q N) / (q N)
    with m at once: shallow(f) / f           + q · deep(m) / m           where f = N - m / 2 sequences run on average

and the m with the lowest cost is waited for (the comparison is that of DREX, arXiv 2512.15705, per token). Nothing here
decides whether a row leaves.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...kernels.types import AttentionBatch
from .kv_cache import allocate_layers

if TYPE_CHECKING:
    from ..decoder import Decoder

PATIENCE = 16  # steps after which a row has waited long enough, whatever it costs
LEAST_GAIN = 0.02  # waiting must promise this much: the times are measured, and so uncertain
_REPEATS = 3
_SHARE_STEPS = 32  # resolution of the shares of rows that go on
_SHARE_WEIGHT = 0.05  # of a new observation in their moving averages


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
    kv = allocate_layers(decoder.spec, sizes[-1], page_size, decoder.dtype, torch.device(decoder.device))
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
        self._times = times
        # Of the rows that reach the exit in front of a segment, how many go on; index 0 is no exit.
        self._going_on = [1.0] * len(times.segments)
        self._best = lru_cache(maxsize=4096)(self._find_best)

    def observe(self, segment: int, reached: int, going: int) -> None:
        """Take in what happened at the exit in front of a segment."""
        share = self._going_on[segment]
        self._going_on[segment] = share + _SHARE_WEIGHT * (going / reached - share)

    def should_wait(self, segment: int, rows: int, running: int, waited: int) -> bool:
        """Whether the rows in front of a segment should wait.

        Arguments:
            rows: how many there are, parked ones included; running: sequences that decode, these rows included.
            waited: steps that one of them has waited already.
        """
        if not rows or waited >= PATIENCE:
            return False
        shares = tuple(max(1, round(share * _SHARE_STEPS)) for share in self._going_on)
        return rows < self._best(segment, running, shares)

    def _find_best(self, segment: int, running: int, shares: tuple[int, ...]) -> int:
        """The number of rows to wait for; 0 where none should wait."""
        reach = np.cumprod([share / _SHARE_STEPS for share in shares])  # share of all rows that run each segment
        going = float(reach[segment])

        def cost(rows: float, steady: float) -> float:
            shallow = sum(self._seconds(number, steady * reach[number]) for number in range(segment)) / steady
            deep = [self._seconds(n, rows * reach[n] / going) for n in range(segment, len(shares))]
            return shallow + self._interpolate(self._times.head, steady) / steady + going * sum(deep) / rows

        best = 0, cost(going * running, running) * (1 - LEAST_GAIN)
        for rows in range(2, running + 1):
            if rows > going * running and (seconds := cost(rows, running - rows / 2)) < best[1]:
                best = rows, seconds
        return best[0]

    def _seconds(self, segment: int, rows: float) -> float:
        return self._interpolate(self._times.segments[segment], rows)

    def _interpolate(self, seconds: tuple[float, ...], rows: float) -> float:
        # Less than one row per step: a launch with one row, in some of the steps.
        return rows * seconds[0] if rows < 1 else float(np.interp(rows, self._times.sizes, seconds))
