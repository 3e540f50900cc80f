"""What is known about a step's rows before it runs: who may leave where, who may wait, who has waited.

Shape suffixes as in ``kernels/types.py``; E exits of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    """

    entries: list[Entry]
    thresholds_ET: np.ndarray
    thresholds: torch.Tensor
    movable: dict[int, int]
    parked: dict[int, list[int]]
    budget: ExpertBudget | None
    steady: bool = False

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
        self._sequences: list[Sequence] = []  # of the plan that may hold for the next step too
        self._plan: StepPlan | None = None

    def plan(self, entries: list[Entry], num_rows: int, budget: ExpertBudget | None) -> StepPlan:
        """Sort a step's rows.

        Arguments:
            entries: the step's work, of sequences that are either parked or have a row to run.
            num_rows: positions of all of them.

        Returns: a plan that the next call may change.
        """
        plan = self._plan
        if plan is not None and len(entries) == len(self._sequences) and all(map(_goes_on, entries, self._sequences)):
            plan.entries, plan.budget, plan.steady = entries, budget, True
            return plan
        plan = self._new_plan(entries, num_rows, budget)
        sequences = [entry.sequence for entry in entries]
        self._plan = None
        if all(map(_goes_on, entries, sequences)):
            self._plan, self._sequences = plan, sequences
        return plan

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


def _goes_on(entry: Entry, sequence: Sequence) -> bool:
    """Whether an entry is the next new token of this sequence, from the first layer on."""
    if entry.sequence is not sequence or entry.count != 1 or sequence.parked is not None:
        return False
    return sequence.request.exit_logits_E is None or entry.start - sequence.num_prompt == len(sequence.depths)
