"""Runs a step in which rows may exit early: segment after segment, a decision, KV propagation and a compaction between.

Whether a row exits depends on its own state and its own request's thresholds only. Prompts run all layers. Positions
behind the prompt that are computed again after a preemption exit where they exited before.

Shape suffixes as in ``kernels/api/types.py``; R some of a step's T rows, E exits of the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...exits.segments import Segment
from ...kernels.api.types import AttentionBatch, ExitDecision, ExpertBudget, KVLayer
from .exit_plan import CONTINUES, Planner, StepPlan

if TYPE_CHECKING:
    from ..model.decoder import Decoder
    from ..model.exits import DecoderExit
    from .schedule import Entry
    from .step_rows import StepRows


@dataclass(slots=True)
class _Live:
    """Rows on their way through the model.

    Arguments:
        rows_R: their numbers in the step, rising.
        at_R: the same on the device; None for all rows.
        x_RD: their residual streams.
    """

    rows_R: np.ndarray
    at_R: torch.Tensor | None
    x_RD: torch.Tensor
    batch: AttentionBatch


class ExitRunner:
    """Drives a decoder with exits."""

    def __init__(self, decoder: Decoder, kv: list[KVLayer]) -> None:
        self.decoder = decoder
        self.kv = kv
        self.exits = list(decoder.exits.values())
        self.planner = Planner(decoder)
        self.ended_rows = [0] * len(decoder.segments)  # by segment: rows whose run through the model ended behind it
        self.projected_rows = 0  # rows times layers
        self._segments_in = {s.layers.stop: s.index + 1 for s in decoder.segments}  # so many layers

    def logit_thresholds(self, probabilities: dict[int, float]) -> np.ndarray | None:
        """The thresholds of a request as logits of the exits' probes, float32, (E,); None if there are none.

        Raises:
            ValueError: for an exit that the model does not have, or that has no probe.
        """
        if not probabilities:
            return None
        logits_E = np.full(len(self.exits), CONTINUES, dtype=np.float32)
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

    def run(
        self, entries: list[Entry], rows: StepRows, plan: StepPlan, budget: ExpertBudget | None = None
    ) -> torch.Tensor:
        """Run a step; see :meth:`Runner.run`."""
        thresholds_ET = plan.thresholds(rows)
        if self.decoder.stack is not None and self.decoder.stack.num_exits == len(self.exits):
            return self._run_at_once(entries, rows, plan, thresholds_ET, budget)
        out_TD = torch.empty(len(rows), self.decoder.spec.hidden_size, device=self.decoder.device)
        depths_T = np.full(len(rows), self.decoder.spec.num_layers)
        live = _Live(np.arange(len(rows)), None, self.decoder.embed(rows.token_ids()), rows.batch())
        for segment in self.decoder.segments:
            if not len(live.rows_R):
                break
            exit, decision = self._run_segment(segment, live, plan, thresholds_ET, budget)
            if exit is not None and decision is not None and decision.num_staying < len(live.rows_R):
                live = self._split(exit, decision, live, rows, out_TD, depths_T)
        if live.at_R is None:
            out_TD = live.x_RD
        elif len(live.rows_R):
            out_TD.index_copy_(0, live.at_R, live.x_RD)
        self._record(entries, depths_T.tolist())
        return out_TD

    def _run_at_once(
        self,
        entries: list[Entry],
        rows: StepRows,
        plan: StepPlan,
        thresholds_ET: torch.Tensor,
        budget: ExpertBudget | None,
    ) -> torch.Tensor:
        """The whole step in one call of the backend: same rows, same bits, nothing spent between segments."""
        x_TD = self.decoder.embed(rows.token_ids())
        result = self.decoder.run_with_exits(x_TD, self.kv, rows.batch(), thresholds_ET, budget)
        if plan.steady and result.out_TD is x_TD:
            self._record_full_depth(plan)
            return x_TD
        depths = result.counts.tolist()[: len(rows)]
        if plan.steady:
            self._record_tokens(entries, depths)
        else:
            self._record(entries, depths)
        return result.out_TD

    def _run_segment(
        self,
        segment: Segment,
        live: _Live,
        plan: StepPlan,
        thresholds_ET: torch.Tensor,
        budget: ExpertBudget | None,
    ) -> tuple[DecoderExit | None, ExitDecision | None]:
        """Run a segment, and decide at the exit behind it, if any row may exit there."""
        exit, at_R = self.decoder.exits.get(segment.layers.stop), live.at_R
        asked = exit is not None and plan.thresholds_ET[segment.index].min() < CONTINUES
        probe = exit.probe if exit and asked else None
        previous_RD = live.x_RD.clone() if probe and probe.previous else None
        entropy_R = torch.zeros(len(live.rows_R), device=live.x_RD.device) if probe and probe.router_entropy else None
        own = budget if budget is None or at_R is None else budget.of_rows(at_R)
        live.x_RD = self.decoder.run_segment(segment, live.x_RD, self.kv, live.batch, entropy_R, own)
        if own is not None and budget is not None and at_R is not None:
            budget.skipped_T.index_add_(0, at_R, own.skipped_T)
        if exit is None or probe is None:
            return exit, None
        # A copy, because kernels want its beginning aligned.
        thresholds_T = thresholds_ET[segment.index]
        thresholds_R = thresholds_T.clone() if at_R is None else thresholds_T.index_select(0, at_R)
        return exit, self.decoder.decide(exit, live.x_RD, thresholds_R, previous_RD, entropy_R)

    def _split(
        self,
        exit: DecoderExit,
        decision: ExitDecision,
        live: _Live,
        rows: StepRows,
        out_TD: torch.Tensor,
        depths_T: np.ndarray,
    ) -> _Live:
        """Rows that exit get their results. Returns those that continue."""
        order_T, continuing = decision.order_T, decision.num_staying
        at_R = order_T if live.at_R is None else live.at_R.index_select(0, order_T)
        rows_R = live.rows_R[decision.order]
        x_RD = live.x_RD.index_select(0, order_T[continuing:])
        # In front of any deeper layer of this step: rows that continue may attend to these.
        self.decoder.propagate_kv(exit, x_RD, self.kv, rows.exiting(rows_R[continuing:], at_R[continuing:]))
        out_TD.index_copy_(0, at_R[continuing:], self.decoder.apply_exit_head(exit, x_RD))
        depths_T[rows_R[continuing:]] = exit.after_layers
        rows_R, at_R = rows_R[:continuing], at_R[:continuing]
        if not continuing:
            return _Live(rows_R, at_R, live.x_RD[:0], live.batch)
        return _Live(rows_R, at_R, live.x_RD.index_select(0, order_T[:continuing]), rows.batch_of(rows_R, at_R))

    def _record(self, entries: list[Entry], depths: list[int]) -> None:
        """Tell sequences and requests what was launched for them.

        Arguments:
            depths: layers that ran for each row.
        """
        num_layers, row = self.decoder.spec.num_layers, 0
        for entry in entries:
            sequence, request, first = entry.sequence, entry.sequence.request, row
            row += entry.count
            ended = request.ended_rows
            if ended is None:
                ended = request.ended_rows = [0] * len(self.ended_rows)
            whole = entry.count  # prompts and requests without exits run all layers
            if sequence.exit_logits_E is not None:
                whole = min(whole, max(0, sequence.num_prompt - entry.start))
            if whole:
                self._count(ended, len(ended), whole)
            if whole == entry.count:
                continue
            for position, depth in enumerate(depths[first + whole : row], entry.start + whole):
                self._count(ended, self._segments_in[depth], 1)
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
            if sequence.exit_logits_E is None:
                continue
            sequence.depths.append(depth)
            if depth < num_layers:
                sequence.mark_approximate(entry.start)
                request.projected_rows += num_layers - depth
                self.projected_rows += num_layers - depth

    def _record_full_depth(self, plan: StepPlan) -> None:
        """As :meth:`_record`, where every row is a new token and none exited."""
        self.ended_rows[-1] += len(plan.ended_rows)
        for ended in plan.ended_rows:
            ended[-1] += 1
        num_layers = self.decoder.spec.num_layers
        for depths in plan.new_depths:
            depths.append(num_layers)

    def _count(self, ended: list[int], segments: int, rows: int) -> None:
        """Rows of a request ran so many segments."""
        ended[segments - 1] += rows
        self.ended_rows[segments - 1] += rows


def launched_rows(ended_rows: Sequence[int], full_rows: int) -> tuple[int, ...]:
    """Rows that were launched through each segment.

    Arguments:
        ended_rows: see :class:`ExitRunner`; full_rows: rows that ran the whole model at once.
    """
    return tuple(rows + full_rows for rows in itertools.accumulate(reversed(ended_rows)))[::-1]
