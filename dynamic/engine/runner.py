"""Runs the model on a step's schedule: the rows, the segments of layers, the logits that are needed.

Shape suffixes as in ``kernels/api/types.py``; R rows whose logits are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...exits.segments import Segment
from ...kernels.api.types import ExpertBudget
from .budgets import ExpertBudgets
from .exit_runner import ExitRunner
from .schedule import Entry, Schedule
from .staging import HostStaging
from .step_rows import StepRows
from .window_pages import WindowPages

if TYPE_CHECKING:
    from ..model.decoder import Decoder

LOGITS_CHUNK_BYTES = 64 << 20


class Runner:
    """Owns the cache's tensors and drives the decoder."""

    def __init__(
        self,
        decoder: Decoder,
        num_pages: int,
        page_size: int,
        num_states: int = 1,
        windows: Sequence[WindowPages] = (),
    ) -> None:
        self.decoder = decoder
        self.device = torch.device(decoder.device)
        self.page_size = page_size
        self.staging = HostStaging(self.device)
        self.windows = windows
        window_pages = [window.num_pages for window in windows]
        self.kv = decoder.allocate_cache(num_pages, page_size, decoder.kv_shards, num_states, window_pages)
        self._has_states = decoder.spec.has_states
        # Long prompts with logprobs would need rows x vocabulary floats at once.
        self.max_logit_rows = max(1, LOGITS_CHUNK_BYTES // (4 * decoder.spec.vocab_size))
        self.exits = ExitRunner(decoder, self.kv)
        self.budgets = ExpertBudgets(decoder)
        self.full_rows = 0  # rows launched through the whole model at once
        self._sampled: tuple[list[int], torch.Tensor] | None = None  # rows of the last step, and where they are
        self._whole = Segment(index=0, layers=range(decoder.spec.num_layers))

    def run(self, schedule: Schedule) -> torch.Tensor:
        """Write the step's keys and values; returns what each row hands to :meth:`logits`, (T, D).

        Rows of requests with exits may leave early: their sequences remember after how many layers.
        """
        if schedule.copies or schedule.state_copies:
            pages, states = (schedule.copies, *schedule.window_copies), schedule.state_copies
            self.decoder.copy_pages(self.kv, *pages, states=states)
        entries, planner, plan = schedule.entries, self.exits.planner, None
        rows = StepRows(entries, self.page_size, self.staging, self._has_states, self.windows)
        # Whatever needs numbers on the device beside the rows' own lets them go with these, in one copy.
        if planner.goes_on(schedule) or any(e.sequence.exit_logits_E is not None for e in entries):
            plan = planner.plan(schedule, rows)
        sampled = [] if schedule.decoding is not None else _sampled_rows(entries)
        number = rows.carry(np.array(sampled, dtype=np.int64)) if sampled else None
        budget = self.budgets.plan(entries, rows)
        if plan is not None:
            x_TD = self.exits.run(entries, rows, plan, budget)
        else:
            x_TD = self._run_whole(entries, rows, budget)
        self._sampled = None if number is None else (sampled, rows.carried(number))
        self.budgets.record(entries, budget)
        return x_TD

    def _run_whole(self, entries: list[Entry], rows: StepRows, budget: ExpertBudget | None) -> torch.Tensor:
        for entry in entries:
            entry.sequence.request.full_rows += entry.count
        self.full_rows += len(rows)
        x_TD = self.decoder.embed(rows.token_ids())
        return self.decoder.run_segment(self._whole, x_TD, self.kv, rows.batch(), budget=budget)

    def logits(self, x_TD: torch.Tensor, rows: list[int] | range) -> torch.Tensor:
        """Logits of some rows of :meth:`run`'s result, float32, (R, V)."""
        if isinstance(rows, range):
            x_TD = x_TD[rows.start : rows.stop]
        elif rows != list(range(x_TD.shape[0])):  # a step of decodes alone needs all rows as they are
            known = self._sampled is not None and self._sampled[0] == rows
            at_R = self._sampled[1] if self._sampled and known else torch.tensor(rows, device=x_TD.device)
            x_TD = x_TD.index_select(0, at_R)
        return self.decoder.logits(x_TD)


def _sampled_rows(entries: list[Entry]) -> list[int]:
    """The rows behind which a step will sample; that of a prompt once for every completion that begins there."""
    rows: list[int] = []
    last = -1
    for entry in entries:
        last += entry.count
        if entry.samples:
            request = entry.sequence.request
            rows += [last] * (request.params.n - len(request.sequences) + 1)
    return rows
