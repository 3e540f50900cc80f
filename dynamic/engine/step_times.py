"""How long a step takes, by its rows and the experts that they touch: one table for whatever plans steps.

A step's weights are read once for all its rows, those of the experts once for all rows that use them. So the rows alone
do not say what a step costs: rows that share experts are cheaper than rows that do not.
"""

from __future__ import annotations

import copy
import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from ...exits.segments import Segment
from ...kernels.api.types import AttentionBatch, ExpertWeights, KVLayer, Routing, StateLayer
from ...moe.dispatch import UNUSED, used_ids

if TYPE_CHECKING:
    from ...kernels.torch.backend import TorchBackend
    from ..model.decoder import Decoder

logger = logging.getLogger(__name__)

_REPEATS = 3
_CHUNK, _FAR = 32, 2048  # rows and positions of the chunk that is timed with a context


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One measured step.

    Arguments:
        rows: how many ran, each of a sequence of its own with a short context.
        experts: different experts that they used, mean over the mixtures; 0 where the model has none.
        layers, head: seconds of all layers; of final norm and LM head on every row.
    """

    rows: int
    experts: float
    layers: float
    head: float


@dataclass(frozen=True)
class StepTimes:
    """What steps take.

    Arguments:
        points: at least one; those of equal rows differ in their experts.
        per_position: seconds that a prompt's row takes longer for every position in front of it.
    """

    points: tuple[StepTime, ...]
    per_position: float = 0.0

    def seconds(self, rows: int, experts: float | None = None, sampled: int | None = None) -> float:
        """The time of a step: its layers, and the LM head on the rows that need logits (None: all of them)."""
        return self.layers(rows, experts) + self.head(rows if sampled is None else sampled)

    def layers(self, rows: int, experts: float | None = None) -> float:
        """Seconds of the layers.

        Arguments:
            rows: at least 1.
            experts: different experts that they use, mean over the mixtures; None takes as many as rows of unrelated
                tokens use. Held at the least and the most that were measured.
        """
        return self._between(rows, lambda size: self._layers_at(size, experts))

    def head(self, rows: int) -> float:
        """Seconds of final norm and LM head on so many rows; none for none."""
        return self._between(rows, lambda size: self._by_rows[size][-1].head) if rows else 0.0

    @cached_property
    def _by_rows(self) -> dict[int, list[StepTime]]:
        """Points by rows, both rising, those of equal rows by their experts."""
        found: dict[int, list[StepTime]] = {}
        for point in sorted(self.points, key=lambda point: (point.rows, point.experts)):
            found.setdefault(point.rows, []).append(point)
        return found

    def _between(self, rows: int, seconds: Callable[[int], float]) -> float:
        """Between two measured numbers of rows the line through both; behind the last, the line goes on if it rises."""
        if rows < 1:
            raise ValueError(f"a step has at least 1 row, not {rows}")
        sizes = list(self._by_rows)
        above = min(max(bisect_left(sizes, rows), 1), len(sizes) - 1)
        low, high = sizes[max(above - 1, 0)], sizes[above]
        first, last = seconds(low), seconds(high)
        if rows <= low or low == high:
            return first
        line = first + (last - first) * (rows - low) / (high - low)
        return line if rows <= high else max(line, last)

    def _layers_at(self, size: int, experts: float | None) -> float:
        points = self._by_rows[size]
        if experts is None:
            return points[-1].layers
        return float(np.interp(experts, [point.experts for point in points], [point.layers for point in points]))


def measure_step_times(
    decoder: Decoder, kv: list[KVLayer], max_rows: int, beyond: tuple[int, float] | None = None
) -> StepTimes:
    """Time steps of 1, 2, 4 … rows, whose tokens are all different, all equal, or in between; and a prompt's chunk with
    many and with few positions in front of it.

    Arguments:
        kv: a cache whose pages are free, one for each row; they are overwritten.
        max_rows: the most rows to time.
        beyond: (rows, factor): nothing is timed behind the first step that takes so many times as long as one of so
            many rows, and no tokens that are equal.

    Raises:
        ValueError: for a model that is shared by several processes.
    """
    if decoder.processes is not None:
        raise ValueError(f"step times are measured in one process; this model is shared ({decoder.processes})")
    mixtures = sum(layer.moe is not None and not layer.moe.is_dense for layer in decoder.spec.layers)
    generator = torch.Generator().manual_seed(0)
    points = []
    paged = [layer for layer in kv if layer.tensors]
    states = [len(layer.states[0]) for layer in kv if isinstance(layer, StateLayer) and layer.states]
    most = min(max_rows, *(len(layer.keys_BGPC) for layer in paged), *states)
    if most < min(max_rows, len(paged[0].keys_BGPC)):
        logger.info("step times are measured up to %d rows: layers with windows have no more pages", most)
    for size in (1 << i for i in range(most.bit_length())):
        batch = last_slots(size, paged[0].page_size, torch.device(decoder.device))
        for different in sorted({1, round(size**0.5), size} if mixtures and beyond is None else {size}):
            kinds = torch.randint(decoder.spec.vocab_size, (different,), generator=generator)
            tokens_R = kinds[torch.arange(size) % different].to(decoder.device)
            experts = _count_experts(decoder, tokens_R, kv, batch) / mixtures if mixtures else 0.0
            layers, head = _time(decoder, tokens_R, kv, batch)
            points.append(StepTime(rows=size, experts=experts, layers=layers, head=head))
        if beyond is not None and size >= beyond[0]:
            found = StepTimes(tuple(points))
            if found.seconds(size) > beyond[1] * found.seconds(beyond[0]):
                break
    pages = min(len(layer.keys_BGPC) for layer in paged)
    return StepTimes(tuple(points), _seconds_per_position(decoder, kv, paged[0].page_size, pages))


def _seconds_per_position(decoder: Decoder, kv: list[KVLayer], page_size: int, pages: int) -> float:
    """What a chunk's row takes longer for a position in front of it, told from chunks far from and at the beginning."""
    longest = min(pages * page_size, decoder.spec.max_position, _FAR)
    chunk = max(min(_CHUNK, longest // 2), 1)
    tokens_R = torch.arange(chunk, device=decoder.device) % decoder.spec.vocab_size
    far, near = (
        _time(decoder, tokens_R, kv, one_chunk(length - chunk, chunk, page_size, torch.device(decoder.device)))[0]
        for length in (longest, chunk)
    )
    return max(far - near, 0.0) / (chunk * max(longest - chunk, 1))


def one_chunk(start: int, count: int, page_size: int, device: torch.device) -> AttentionBatch:
    """Rows ``start : start + count`` of one sequence, which has the first pages."""
    positions = torch.arange(start, start + count, device=device)
    return AttentionBatch(
        positions_T=positions,
        slots_T=positions,
        query_start_S1=torch.tensor([0, count], dtype=torch.int32, device=device),
        context_len_S=torch.tensor([start + count], dtype=torch.int32, device=device),
        block_table_SM=torch.arange(-(-(start + count) // page_size), device=device).int()[None],
        max_query_len=count,
        max_context_len=start + count,
        state_slots_S=torch.zeros(1, dtype=torch.int64, device=device),
    )


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
        state_slots_S=torch.arange(size, device=device),
    )


def _time(decoder: Decoder, tokens_R: torch.Tensor, kv: list[KVLayer], batch: AttentionBatch) -> tuple[float, float]:
    """Seconds of the layers and of the LM head, the least of some tries."""
    whole = Segment(index=0, layers=range(decoder.spec.num_layers))
    layers, head = float("inf"), float("inf")
    for _ in range(_REPEATS):
        x_RD = decoder.embed(tokens_R)
        times = [_now(decoder)]
        x_RD = decoder.run_segment(whole, x_RD, kv, batch)
        times.append(_now(decoder))
        decoder.logits(x_RD)
        times.append(_now(decoder))
        layers, head = min(layers, times[1] - times[0]), min(head, times[2] - times[1])
    return layers, head


def _now(decoder: Decoder) -> float:
    if torch.device(decoder.device).type == "cuda":
        torch.cuda.synchronize(decoder.device)
    return time.perf_counter()


def _count_experts(decoder: Decoder, tokens_R: torch.Tensor, kv: list[KVLayer], batch: AttentionBatch) -> int:
    """Different experts that some rows use, sum of all mixtures."""
    counter = _ExpertCounter(decoder.backend)
    watched = copy.copy(decoder)
    watched.backend = cast("TorchBackend", counter)
    watched.stack = None  # which would run the layers without asking the backend
    whole = Segment(index=0, layers=range(decoder.spec.num_layers))
    watched.run_segment(whole, watched.embed(tokens_R), kv, batch)
    return counter.used


class _ExpertCounter:
    """A backend that counts the experts that are used."""

    def __init__(self, backend: TorchBackend) -> None:
        self._backend = backend
        self.used = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def experts(self, x_TD: torch.Tensor, weights: ExpertWeights, routing: Routing) -> torch.Tensor:
        ids_TK = used_ids(routing)
        self.used += len(ids_TK[ids_TK != UNUSED].unique())
        return self._backend.experts(x_TD, weights, routing)
