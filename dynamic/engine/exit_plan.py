"""What is known about a step's rows before it runs: which rows may exit, and where.

Shape suffixes as in ``kernels/api/types.py``; E exits of the model.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from ..model.decoder import Decoder
    from .request import Sequence
    from .schedule import Entry, Schedule
    from .step_rows import StepRows

CONTINUES, EXITS = np.float32(np.inf), np.float32(-np.inf)


@dataclass(slots=True)
class StepPlan:
    """One step's rows.

    Arguments:
        entries: the step's work.
        thresholds_ET: the probe's logit from which on a row exits; inf continues.
        carried: what the step's rows know them by.
        steady: whether each row is the next new token of the sequence that the same row of the step before belonged to.
        ended_rows: of a steady plan, by row, :attr:`.Request.ended_rows`.
        new_depths: of a steady plan, :attr:`.Sequence.depths` of the rows that may exit.
    """

    entries: list[Entry]
    thresholds_ET: np.ndarray
    carried: int
    steady: bool = False
    ended_rows: list[list[int]] = field(default_factory=list)
    new_depths: list[array[int]] = field(default_factory=list)
    _thresholds: torch.Tensor | None = None

    def thresholds(self, rows: StepRows) -> torch.Tensor:
        """The thresholds on the device, where they went with the rows of the step that they were first made for."""
        if self._thresholds is None:
            self._thresholds = rows.carried(self.carried)
        return self._thresholds


class Planner:
    """Sorts the rows of every step.

    Most steps decode the sequences of the step before and nothing else. What was found for those is used again.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._num_exits = len(decoder.exits)
        # Number of the exit after so many layers; the slice of no exit for rows that ran all of them.
        self._exit_at: dict[int, int | slice] = {layers: number for number, layers in enumerate(decoder.exits)}
        self._exit_at[decoder.spec.num_layers] = slice(0)
        self._plan: StepPlan | None = None
        self._decoding: int | None = None  # of the steps that it holds for

    def goes_on(self, schedule: Schedule) -> bool:
        """Whether a step decodes the sequences of the step before, one new token each, and nothing else."""
        return self._decoding is not None and schedule.decoding == self._decoding

    def plan(self, schedule: Schedule, rows: StepRows) -> StepPlan:
        """Sort a step's rows.

        Arguments:
            schedule: the step's work.
            rows: of it; new thresholds go to the device with them.

        Returns: a plan that the next call may change.
        """
        entries, plan = schedule.entries, self._plan
        if plan is not None and self.goes_on(schedule):
            plan.entries = entries
            if not plan.steady:
                plan.steady = True
                plan.ended_rows = [_ended_rows(entry.sequence) for entry in entries]
                plan.new_depths = [entry.sequence.depths for entry in entries if _may_exit(entry)]
            return plan
        self._plan = plan = self._new_plan(entries, rows)
        self._decoding = schedule.decoding if all(_is_new(entry) for entry in entries) else None
        return plan

    def _new_plan(self, entries: list[Entry], rows: StepRows) -> StepPlan:
        thresholds_ET = np.full((self._num_exits, len(rows)), CONTINUES, dtype=np.float32)
        first = 0
        for entry in entries:
            sequence, logits_E = entry.sequence, entry.sequence.exit_logits_E
            if logits_E is not None:
                for position in range(max(entry.start, sequence.num_prompt), entry.start + entry.count):
                    row, known = first + position - entry.start, position - sequence.num_prompt
                    if known < len(sequence.depths):  # computed before: exits where it did
                        thresholds_ET[self._exit_at[sequence.depths[known]], row] = EXITS
                        continue
                    thresholds_ET[:, row] = logits_E
            first += entry.count
        return StepPlan(entries, thresholds_ET, rows.carry(thresholds_ET))


def _may_exit(entry: Entry) -> bool:
    return entry.sequence.exit_logits_E is not None


def _is_new(entry: Entry) -> bool:
    """Whether the token is not one that was computed before, and exits where it did."""
    return not _may_exit(entry) or entry.start - entry.sequence.num_prompt == len(entry.sequence.depths)


def _ended_rows(sequence: Sequence) -> list[int]:
    ended = sequence.request.ended_rows
    assert ended is not None, "the step before was recorded"
    return ended
