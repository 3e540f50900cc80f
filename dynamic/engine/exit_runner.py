"""Runs a step in which rows may leave early: segment after segment, a decision, a compaction and a debt in between.

Whether a row leaves depends on its own state and its own request's thresholds only. Prompts run all layers. Positions
behind the prompt that are computed again after a preemption leave where they left before. What depends on the load is
when a row goes on: in front of a segment it may be parked until others come (:mod:`parking`).

Shape suffixes as in ``kernels/api/types.py``; R some of a step's T rows, E exits of the model.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...exits.segments import Segment
from ...kernels.api.types import AttentionBatch, ExpertBudget, KVLayer
from .backfill import Backfill, Project
from .exit_plan import STAYS, Planner, StepPlan
from .parking import Parking, measure_times
from .request import ParkedRow

if TYPE_CHECKING:
    from ..model.decoder import Decoder
    from .schedule import Entry, Schedule
    from .step_rows import StepRows

_REVIEW = 8  # steps between looks at whether parking might pay; more while it does not
_RARELY = 64  # the most


@dataclass(slots=True)
class _Live:
    """Rows on their way through the model: their numbers in the step, rising, and their residual streams."""

    rows_R: np.ndarray
    x_RD: torch.Tensor
    batch: AttentionBatch


class ExitRunner:
    """Drives a decoder with exits.

    Arguments:
        decoder, kv, page_size: the model and its cache.
        max_num_seqs: sequences that may run in one step.
        park_rows: whether rows may wait for company.
    """

    def __init__(self, decoder: Decoder, kv: list[KVLayer], page_size: int, max_num_seqs: int, park_rows: bool) -> None:
        self.decoder = decoder
        self.kv = kv
        self.page_size = page_size
        self.max_num_seqs = max_num_seqs
        self.exits = list(decoder.exits.values())
        self.backfill: Backfill = Project(decoder, kv)
        self.planner = Planner(decoder)
        self.parking: Parking | None = None
        self.park_rows = park_rows
        # By segment: rows whose run through the model ended behind it, less rows that were parked there and went on.
        self.ended_rows = [0] * len(decoder.segments)
        self.projected_rows = 0  # rows times layers
        self.rows_parked = 0
        self._started: float | None = None  # when the step before a review began
        self._in_segments = 0.0  # seconds of it
        self._steps = 0  # with company
        self._review_at = 1
        self._unpaid = 0  # reviews in a row in which parking could not pay
        self._may_wait = False
        self._segments_in = {s.layers.stop: s.index + 1 for s in decoder.segments}  # so many layers

    def logit_thresholds(self, probabilities: dict[int, float]) -> np.ndarray | None:
        """The thresholds of a request as logits of the exits' probes, float32, (E,); None if there are none.

        Raises:
            ValueError: for an exit that the model does not have, or that has no probe.
        """
        if not probabilities:
            return None
        logits_E = np.full(len(self.exits), STAYS, dtype=np.float32)
        for layer, probability in probabilities.items():
            exit = self.decoder.exits.get(layer)
            if exit is None or exit.probe is None or exit.calibrator is None:
                usable = [str(e.after_layers) for e in self.exits if e.calibrator is not None and e.probe is not None]
                raise ValueError(
                    f"exit_thresholds names an exit after {layer} layers; this model has "
                    + (f"exits after {', '.join(usable)}" if usable else "none")
                )
            logits_E[self.exits.index(exit)] = exit.logit_threshold(probability)
        return logits_E

    def prepare(self) -> None:
        """Measure how long the segments take, where rows may leave between them."""
        if self.park_rows and any(exit.probe is not None for exit in self.exits):
            self.parking = Parking(measure_times(self.decoder, self.page_size, self.max_num_seqs))

    def run(self, schedule: Schedule, rows: StepRows, budget: ExpertBudget | None = None) -> torch.Tensor:
        """Run a step; see :meth:`Runner.run`."""
        entries = schedule.entries
        plan = self.planner.plan(schedule, len(rows), budget)
        review = self.parking is not None and len(plan.movable) > 1 and self._review_is_due(self.parking, plan)
        # Segments run one by one where rows may be stopped in front of one, or debts are paid in another way.
        waits = self._may_wait and len(plan.movable) > 1
        if self.decoder.stack is not None and not waits and not plan.parked and isinstance(self.backfill, Project):
            return self._run_at_once(entries, rows, plan, review)
        out_TD = torch.empty(len(rows), self.decoder.spec.hidden_size, device=self.decoder.device)
        depths_T = np.full(len(rows), self.decoder.spec.num_layers)
        live = self._start(rows, plan)
        fresh = len(live.rows_R) > 0
        for segment in self.decoder.segments:
            live = self._meet(segment, live, rows, plan, may_wait=fresh)
            if not len(live.rows_R):
                continue
            live = self._run_segment(segment, live, rows, plan, out_TD, depths_T)
        if len(live.rows_R) == len(rows):
            out_TD = live.x_RD
        elif len(live.rows_R):
            out_TD.index_copy_(0, self._move(live.rows_R), live.x_RD)
        self._record(
            entries, depths_T.tolist(), {row: number for number, waited in plan.parked.items() for row in waited}
        )
        return out_TD

    def _review_is_due(self, parking: Parking, plan: StepPlan) -> bool:
        """Whether this step tells the parking what rows do; before that, it learns what the step before took."""
        self._steps += 1
        if self._steps < self._review_at - 1:
            return False
        if self._steps < self._review_at:
            self._started, self._in_segments = time.perf_counter(), 0.0
            return False
        if self._started is not None:
            seconds = time.perf_counter() - self._started - self._in_segments
            parking.observe_step(seconds, len(plan.entries))
        self._may_wait = parking.may_wait(len(plan.movable))
        self._unpaid = 0 if self._may_wait else self._unpaid + 1
        self._review_at += min(_REVIEW * max(1, self._unpaid), _RARELY)
        return True

    def _run_at_once(self, entries: list[Entry], rows: StepRows, plan: StepPlan, review: bool) -> torch.Tensor:
        """The whole step in one call of the backend: same rows, same bits, nothing spent between segments."""
        x_TD = self.decoder.embed(rows.token_ids())
        started = time.perf_counter()
        result = self.decoder.run_with_exits(x_TD, self.kv, rows.batch(), plan.thresholds, plan.budget)
        self._in_segments += time.perf_counter() - started
        if review and self.parking is not None:
            for number, (deciding, going) in enumerate(result.decisions_N2.tolist(), 1):
                if deciding:
                    self.parking.observe(number, deciding, going)
        if plan.steady and result.out_TD is x_TD:
            self._record_full_depth(plan)
            return x_TD
        depths = result.counts.tolist()[: len(rows)]
        if plan.steady:
            self._record_tokens(entries, depths)
        else:
            self._record(entries, depths, {})
        return result.out_TD

    def _start(self, rows: StepRows, plan: StepPlan) -> _Live:
        """The rows that begin in this step, embedded."""
        token_ids_T = rows.token_ids()
        if not plan.parked:
            return _Live(np.arange(len(rows)), self.decoder.embed(token_ids_T), rows.batch())
        parked = [row for waiting in plan.parked.values() for row in waiting]
        rows_R = np.delete(np.arange(len(rows)), parked)
        return self._gather(rows, rows_R, self.decoder.embed(token_ids_T[self._move(rows_R)]))

    def _meet(self, segment: Segment, live: _Live, rows: StepRows, plan: StepPlan, may_wait: bool) -> _Live:
        """In front of a segment: the rows that run it now, those that were parked there included; or none."""
        parked = plan.parked.get(segment.index, [])
        arriving = live.rows_R.tolist()
        if not parked and (self.parking is None or segment.index == 0 or len(plan.movable) < 2):
            return live
        if may_wait and self.parking is not None and all(row in plan.movable for row in arriving):
            waited = max((_parked(plan.entry(row)).steps for row in parked), default=0)
            away = sum(
                number > segment.index or plan.entry(row).parked
                for number, others in plan.parked.items()
                if number != segment.index
                for row in others
            )
            running = len(plan.movable) - away
            if self.parking.should_wait(segment.index, len(arriving) + len(parked), running, waited):
                self._park(segment, live, plan)
                return self._nobody(live)
        if not parked:
            return live
        joining_RD = torch.stack([_parked(plan.entry(row)).x_D for row in parked])
        rows_R = np.concatenate((live.rows_R, np.array(parked, dtype=np.int64)))
        order = rows_R.argsort()
        return self._gather(rows, rows_R[order], torch.cat((live.x_RD, joining_RD)).index_select(0, self._move(order)))

    def _park(self, segment: Segment, live: _Live, plan: StepPlan) -> None:
        self.planner.forget()
        for row, x_D in zip(live.rows_R.tolist(), live.x_RD, strict=True):
            plan.entry(row).sequence.parked = ParkedRow(segment.index, x_D.clone())
            self.rows_parked += 1
        for row in (*plan.parked.get(segment.index, []), *live.rows_R.tolist()):
            entry = plan.entry(row)
            entry.parked = True
            _parked(entry).steps += 1

    def _run_segment(
        self, segment: Segment, live: _Live, rows: StepRows, plan: StepPlan, out_TD: torch.Tensor, depths_T: np.ndarray
    ) -> _Live:
        """Run a segment; rows that leave at the exit behind it get their results. Returns the rows that go on."""
        exit = self.decoder.exits.get(segment.layers.stop)
        asked = exit is not None and plan.thresholds_ET[segment.index].min() < STAYS
        probe = exit.probe if exit and asked else None
        previous_RD = live.x_RD.clone() if probe and probe.previous else None
        entropy_R = torch.zeros(len(live.rows_R), device=out_TD.device) if probe and probe.router_entropy else None
        started = time.perf_counter()
        budget = None if plan.budget is None else plan.budget.of_rows(self._move(live.rows_R))
        live.x_RD = self.decoder.run_segment(segment, live.x_RD, self.kv, live.batch, entropy_R, budget)
        if plan.budget is not None and budget is not None:
            plan.budget.skipped_T[self._move(live.rows_R)] += budget.skipped_T
        self._in_segments += time.perf_counter() - started
        if exit is None or probe is None:
            return live
        thresholds_R = plan.thresholds_ET[segment.index, live.rows_R]
        decision = self.decoder.decide(exit, live.x_RD, self._move(thresholds_R), previous_RD, entropy_R)
        staying = decision.num_staying
        if self.parking is not None and len(plan.movable) > 1:
            deciding_R = np.isfinite(thresholds_R)
            if deciding := int(deciding_R.sum()):
                going = deciding_R[decision.order_T[:staying].cpu().numpy()]
                self.parking.observe(segment.index + 1, deciding, int(going.sum()))
        if staying == len(thresholds_R):
            return live
        order = decision.order_T.cpu().numpy()
        going, left_R = order[:staying], live.rows_R[order[staying:]]
        x_RD = live.x_RD.index_select(0, decision.order_T[staying:])
        self.backfill.leave(exit, x_RD, rows.slots_of(left_R, live.batch))
        out_TD.index_copy_(0, self._move(left_R), self.decoder.read_out(exit, x_RD))
        depths_T[left_R] = exit.after_layers
        if not len(going):
            return self._nobody(live)
        return self._gather(rows, live.rows_R[going], live.x_RD.index_select(0, decision.order_T[:staying]))

    def _record(self, entries: list[Entry], depths: list[int], began: dict[int, int]) -> None:
        """Tell sequences and requests what was launched for them.

        Arguments:
            depths: layers that ran for each row in the end.
            began: segments in front of which rows began that were parked.
        """
        num_layers, row = self.decoder.spec.num_layers, 0
        for entry in entries:
            sequence, request, first = entry.sequence, entry.sequence.request, row
            row += entry.count
            ended = request.ended_rows
            if ended is None:
                ended = request.ended_rows = [0] * len(self.ended_rows)
            start = began.get(first, 0)
            if entry.parked:
                self._count(ended, start, _parked(entry).segment, 1)
                continue
            whole = entry.count  # prompts and requests without exits run all layers
            if request.exit_logits_E is not None:
                whole = min(whole, max(0, sequence.num_prompt - entry.start))
                sequence.parked = None
            if whole:
                self._count(ended, 0, len(ended), whole)
            if whole == entry.count:
                continue
            for position, depth in enumerate(depths[first + whole : row], entry.start + whole):
                self._count(ended, start, self._segments_in[depth], 1)
                sequence.record_depth(position, depth, num_layers)
                if depth < num_layers:
                    request.projected_rows += num_layers - depth
                    self.projected_rows += num_layers - depth

    def _record_tokens(self, entries: list[Entry], depths: list[int]) -> None:
        """As :meth:`_record`, where every row is a new token: what most steps are, and so it is quick."""
        num_layers, segments_in, total = self.decoder.spec.num_layers, self._segments_in, self.ended_rows
        for entry, depth in zip(entries, depths, strict=True):
            sequence = entry.sequence
            request = sequence.request
            assert request.ended_rows is not None
            last = segments_in[depth] - 1
            request.ended_rows[last] += 1
            total[last] += 1
            if request.exit_logits_E is None:
                continue
            sequence.depths.append(depth)
            if depth < num_layers:
                sequence.mark_approximate(entry.start)
                request.projected_rows += num_layers - depth
                self.projected_rows += num_layers - depth

    def _record_full_depth(self, plan: StepPlan) -> None:
        """As :meth:`_record`, where every row is a new token and nobody left."""
        self.ended_rows[-1] += len(plan.ended_rows)
        for ended in plan.ended_rows:
            ended[-1] += 1
        num_layers = self.decoder.spec.num_layers
        for depths in plan.new_depths:
            depths.append(num_layers)

    def _count(self, ended: list[int], start: int, stop: int, rows: int) -> None:
        """Rows of a request ran the segments from ``start`` on, ``stop`` not included."""
        ended[stop - 1] += rows
        self.ended_rows[stop - 1] += rows
        if start:
            ended[start - 1] -= rows
            self.ended_rows[start - 1] -= rows

    def _gather(self, rows: StepRows, rows_R: np.ndarray, x_RD: torch.Tensor) -> _Live:
        return _Live(rows_R, x_RD, rows.batch_of(rows_R)) if len(rows_R) else _Live(rows_R, x_RD, rows.batch())

    def _nobody(self, live: _Live) -> _Live:
        return _Live(live.rows_R[:0], live.x_RD[:0], live.batch)

    def _move(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.decoder.device)


def _parked(entry: Entry) -> ParkedRow:
    parked = entry.sequence.parked
    assert parked is not None
    return parked


def launched_rows(ended_rows: Sequence[int], full_rows: int) -> tuple[int, ...]:
    """Rows that were launched through each segment.

    Arguments:
        ended_rows: see :class:`ExitRunner`; full_rows: rows that ran the whole model at once.
    """
    return tuple(rows + full_rows for rows in itertools.accumulate(reversed(ended_rows)))[::-1]
