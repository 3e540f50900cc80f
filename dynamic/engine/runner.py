"""Runs the model on a step's schedule: the rows, the segments of layers, the logits that are needed.

Shape suffixes as in ``kernels/api/types.py``; R rows whose logits are needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...exits.segments import Segment
from ...kernels.api.types import ExpertBudget
from .budgets import ExpertBudgets
from .exit_runner import ExitRunner
from .schedule import Entry, Schedule
from .step_rows import StepRows

if TYPE_CHECKING:
    from ..model.decoder import Decoder

LOGITS_CHUNK_BYTES = 64 << 20


class Runner:
    """Owns the cache's tensors and drives the decoder.

    Arguments:
        decoder: the model.
        num_pages, page_size: shape of the cache.
    """

    def __init__(self, decoder: Decoder, num_pages: int, page_size: int) -> None:
        self.decoder = decoder
        self.device = torch.device(decoder.device)
        self.page_size = page_size
        self.kv = decoder.allocate_cache(num_pages, page_size, decoder.homes)
        # Long prompts with logprobs would need rows x vocabulary floats at once.
        self.max_logit_rows = max(1, LOGITS_CHUNK_BYTES // (4 * decoder.spec.vocab_size))
        self.exits = ExitRunner(decoder, self.kv)
        self.budgets = ExpertBudgets(decoder)
        self.full_rows = 0  # rows launched through the whole model at once
        self._whole = Segment(index=0, layers=range(decoder.spec.num_layers))

    def run(self, schedule: Schedule) -> torch.Tensor:
        """Write the step's keys and values; returns what each row hands to :meth:`logits`, (T, D).

        Rows of requests with exits may leave early: their sequences remember after how many layers.
        """
        if schedule.copies:
            self.decoder.copy_pages(self.kv, schedule.copies)
        rows = StepRows(schedule.entries, self.page_size, self.device)
        budget = self.budgets.plan(schedule.entries, len(rows))
        exits = self.exits
        if exits.planner.goes_on(schedule) or any(
            e.sequence.request.exit_logits_E is not None for e in schedule.entries
        ):
            x_TD = exits.run(schedule, rows, budget)
        else:
            x_TD = self._run_whole(schedule.entries, rows, budget)
        self.budgets.record(schedule.entries, budget)
        return x_TD

    def _run_whole(self, entries: list[Entry], rows: StepRows, budget: ExpertBudget | None) -> torch.Tensor:
        for entry in entries:
            entry.sequence.request.full_rows += entry.count
        self.full_rows += len(rows)
        x_TD = self.decoder.embed(rows.token_ids())
        return self.decoder.run_segment(self._whole, x_TD, self.kv, rows.batch(), budget=budget)

    def logits(self, x_TD: torch.Tensor, rows: list[int] | range) -> torch.Tensor:
        """Logits of some rows of :meth:`run`'s result, float32, (R, V)."""
        if list(rows) != list(range(x_TD.shape[0])):  # a step of decodes alone needs all rows as they are
            x_TD = x_TD[torch.tensor(rows, device=x_TD.device)]
        return self.decoder.logits(x_TD)
