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
        thresholds_ET: the probe's logit from which on a row leaves; inf stays.
        thresholds: the same on the device.
        movable: rows that may be parked, with their entries.
        parked: those that are, by segment.
        budget: of the step's rows, if any is on one.
        steady: whether each row is the next new token of the sequence that the same row of the step before belonged to.
    """

    thresholds_ET: np.ndarray
    thresholds: torch.Tensor
    movable: dict[int, Entry]
    parked: dict[int, list[int]]
    budget: ExpertBudget | None
    steady: bool = False


@dataclass(frozen=True, slots=True)
class _Steady:
    """Sequences that each decoded a new token in the step before: while they go on, their thresholds stay the same."""

    sequences: list[Sequence]
    thresholds_ET: np.ndarray
    thresholds: torch.Tensor
    movable: list[int]

    def holds(self, entries: list[Entry]) -> bool:
        return len(entries) == len(self.sequences) and all(map(_goes_on, entries, self.sequences))


class Planner:
    """Makes the plans of one engine.

    Arguments:
        decoder: the model.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._device = decoder.device
        self._num_exits = len(decoder.exits)
        # Number of the exit after so many layers; the slice of no exit for rows that ran all of them.
        self._exit_at: dict[int, int | slice] = {layers: number for number, layers in enumerate(decoder.exits)}
        self._exit_at[decoder.spec.num_layers] = slice(0)
        self._steady: _Steady | None = None

    def plan(self, entries: list[Entry], num_rows: int, budget: ExpertBudget | None) -> StepPlan:
        """The plan of a step.

        Arguments:
            entries: the step's work, ``num_rows`` rows in all.
            budget: of these rows.
        """
        steady = self._steady
        if steady is not None and steady.holds(entries):
            movable = {row: entries[row] for row in steady.movable}
            return StepPlan(steady.thresholds_ET, steady.thresholds, movable, {}, budget, steady=True)
        plan = self._new_plan(entries, num_rows, budget)
        sequences = [entry.sequence for entry in entries]
        self._steady = None
        if all(map(_goes_on, entries, sequences)):
            self._steady = _Steady(sequences, plan.thresholds_ET, plan.thresholds, list(plan.movable))
        return plan

    def _new_plan(self, entries: list[Entry], num_rows: int, budget: ExpertBudget | None) -> StepPlan:
        thresholds_ET = np.full((self._num_exits, num_rows), STAYS, dtype=np.float32)
        movable: dict[int, Entry] = {}
        parked: dict[int, list[int]] = {}
        first = 0
        for entry in entries:
            sequence, logits_E = entry.sequence, entry.sequence.request.exit_logits_E
            if logits_E is not None:
                for position in range(max(entry.start, sequence.num_prompt), entry.start + entry.count):
                    row, known = first + position - entry.start, position - sequence.num_prompt
                    if known < len(sequence.depths):  # computed before: leaves where it left
                        thresholds_ET[self._exit_at[sequence.depths[known]], row] = LEAVES
                        continue
                    thresholds_ET[:, row] = logits_E
                    if entry.count == 1:
                        movable[row] = entry
                        if sequence.parked is not None:
                            parked.setdefault(sequence.parked.segment, []).append(row)
            first += entry.count
        return StepPlan(thresholds_ET, torch.from_numpy(thresholds_ET).to(self._device), movable, parked, budget)


def _goes_on(entry: Entry, sequence: Sequence) -> bool:
    """Whether an entry is the next new token of this sequence, from the first layer on."""
    if entry.sequence is not sequence or entry.count != 1 or sequence.parked is not None:
        return False
    return sequence.request.exit_logits_E is None or entry.start - sequence.num_prompt == len(sequence.depths)
