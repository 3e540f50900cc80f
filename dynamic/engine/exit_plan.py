"""What is known about a step's rows before it runs: who may leave where, who may wait, who has waited.

Shape suffixes as in ``kernels/types.py``; E exits of the model.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...kernels.types import ExpertBudget

if TYPE_CHECKING:
    from ..decoder import Decoder
    from .request import Sequence
    from .scheduler import Entry

STAYS, LEAVES = np.float32(np.inf), np.float32(-np.inf)


@dataclass(slots=True)
class StepPlan:
    """One step's rows.

    Arguments:
        entries: the step's work.
        thresholds_ET: the probe's logit from which on a row leaves; inf stays.
        thresholds: the same on the device.
        movable: rows that may be parked, with their entries' numbers.
        parked: those that are, by segment.
        budget: of the step's rows, if any is on one.
        steady: whether each row is the next new token of the sequence that the same row of the step before belonged to.
        ended_rows: of a steady plan, by row, :attr:`.Request.ended_rows`.
        new_depths: of a steady plan, :attr:`.Sequence.depths` of the rows that may leave.
    """

    entries: list[Entry]
    thresholds_ET: np.ndarray
    thresholds: torch.Tensor
    movable: dict[int, int]
    parked: dict[int, list[int]]
    budget: ExpertBudget | None
    steady: bool = False
    ended_rows: list[list[int]] = field(default_factory=list)
    new_depths: list[array[int]] = field(default_factory=list)

    def entry(self, row: int) -> Entry:
        """The entry of a row that may be parked."""
        return self.entries[self.movable[row]]


class Planner:
    """Sorts the rows of every step.

    Most steps decode the sequences of the step before and nothing else. What was found for those is used again.

    Arguments:
        decoder: the model.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._device, self._num_exits = decoder.device, len(decoder.exits)
        # Number of the exit after so many layers; the slice of no exit for rows that ran all of them.
        self._exit_at: dict[int, int | slice] = {layers: number for number, layers in enumerate(decoder.exits)}
        self._exit_at[decoder.spec.num_layers] = slice(0)
        # The plan that may hold for the next step too; by row: sequence, length of its prompt, depths if it has.
        self._plan: StepPlan | None = None
        self._known: list[tuple[Sequence, int, array[int] | None]] = []

    def plan(self, entries: list[Entry], num_rows: int, budget: ExpertBudget | None) -> StepPlan:
        """Sort a step's rows.

        Arguments:
            entries: the step's work, of sequences that are either parked or have a row to run.
            num_rows: positions of all of them.

        Returns: a plan that the next call may change.
        """
        plan = self._plan
        if plan is not None and self._go_on(entries):
            plan.entries, plan.budget = entries, budget
            if not plan.steady:
                plan.steady = True
                plan.ended_rows = [_ended_rows(sequence) for sequence, _, _ in self._known]
                plan.new_depths = [depths for _, _, depths in self._known if depths is not None]
            return plan
        self._plan = plan = self._new_plan(entries, num_rows, budget)
        self._known = [(e.sequence, e.sequence.num_prompt, _new_depths(e.sequence)) for e in entries]
        if plan.parked or not self._go_on(entries):
            self.forget()
        return plan

    def forget(self) -> None:
        """The next step is not like this one: rows were parked."""
        self._plan = None

    def _go_on(self, entries: list[Entry]) -> bool:
        """Whether every entry is the next new token of the sequence that is known for its place."""
        if len(entries) != len(self._known):
            return False
        for entry, (sequence, num_prompt, depths) in zip(entries, self._known, strict=True):
            if entry.sequence is not sequence or entry.count != 1:
                return False
            if depths is not None and entry.start - num_prompt != len(depths):
                return False
        return True

    def _new_plan(self, entries: list[Entry], num_rows: int, budget: ExpertBudget | None) -> StepPlan:
        thresholds_ET = np.full((self._num_exits, num_rows), STAYS, dtype=np.float32)
        movable: dict[int, int] = {}
        parked: dict[int, list[int]] = {}
        first = 0
        for number, entry in enumerate(entries):
            sequence, logits_E = entry.sequence, entry.sequence.request.exit_logits_E
            if logits_E is not None:
                for position in range(max(entry.start, sequence.num_prompt), entry.start + entry.count):
                    row, known = first + position - entry.start, position - sequence.num_prompt
                    if known < len(sequence.depths):  # computed before: leaves where it left
                        thresholds_ET[self._exit_at[sequence.depths[known]], row] = LEAVES
                        continue
                    thresholds_ET[:, row] = logits_E
                    if entry.count == 1:
                        movable[row] = number
                        if sequence.parked is not None:
                            parked.setdefault(sequence.parked.segment, []).append(row)
            first += entry.count
        thresholds = torch.from_numpy(thresholds_ET).to(self._device)
        return StepPlan(entries, thresholds_ET, thresholds, movable, parked, budget)


def _new_depths(sequence: Sequence) -> array[int] | None:
    return None if sequence.request.exit_logits_E is None else sequence.depths


def _ended_rows(sequence: Sequence) -> list[int]:
    ended = sequence.request.ended_rows
    assert ended is not None, "the step before was recorded"
    return ended
