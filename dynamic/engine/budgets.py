"""Expert budgets of requests: what they mean layer by layer, the rows of a step that have one, what it made them skip.

A budget is the request's own and never changes, so that a position that is computed again after a preemption uses the
experts that it used before. Prompts run with all experts.

Shape suffixes as in ``kernels/api/types.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...kernels.api.types import ExpertBudget
from ...moe.contribution import keep_by_layer
from ..model.budgeted_layers import limited_layers
from .request import RequestBudget

if TYPE_CHECKING:
    from ..model.decoder import Decoder
    from .sampling_params import SamplingParams
    from .schedule import Entry
    from .step_rows import StepRows

NO_CAP = np.int32(2**31 - 1)


class ExpertBudgets:
    """Counts what budgets leave out in one engine."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.skipped_experts = 0  # rows times experts that budgets left out

    def of_request(self, params: SamplingParams) -> RequestBudget | None:
        """The budget that a request asks for, if any.

        Raises:
            ValueError: for a model whose experts cannot be limited, a layer that has none, or a share of a contribution
                that was never calibrated.
        """
        if params.expert_keep is None and params.experts_per_token is None:
            return None
        limited = limited_layers(self.decoder.spec)
        impacts = self.decoder.expert_impacts
        if params.expert_keep is not None and not impacts:
            raise ValueError(
                f"expert_keep={params.expert_keep} needs calibrated contributions, which this model lacks; measure them"
                " with dynamoe experts"
            )
        num_layers = self.decoder.spec.num_layers
        budget = RequestBudget(
            keep_L=np.ones(num_layers, dtype=np.float32), cap_L=np.full(num_layers, NO_CAP, dtype=np.int32)
        )
        keep, cap = params.expert_keep, params.experts_per_token
        if keep is not None and not isinstance(keep, Mapping):
            keep = dict(zip(limited, keep_by_layer(keep, [impacts[n] for n in limited]), strict=True))
        if cap is not None and not isinstance(cap, Mapping):
            cap = dict.fromkeys(limited, cap)
        for name, by_layer, limits_L in (
            ("expert_keep", keep, budget.keep_L),
            ("experts_per_token", cap, budget.cap_L),
        ):
            for layer, limit in (by_layer or {}).items():
                if layer not in limited:
                    raise ValueError(f"{name} names layer {layer}; layers with experts are {_ranges(limited)}")
                limits_L[layer] = limit
        return budget

    def plan(self, entries: list[Entry], rows: StepRows) -> ExpertBudget | None:
        """The budget of a step's rows, with which it goes to the device; None where nobody is on one."""
        if not any(_limited_rows(entry) for entry in entries):
            return None
        num_rows, num_layers, first = len(rows), self.decoder.spec.num_layers, 0
        keep_TL = np.ones((num_rows, num_layers), dtype=np.float32)
        cap_TL = np.full((num_rows, num_layers), NO_CAP, dtype=np.int32)
        for entry in entries:
            budget, limited = entry.sequence.expert_budget, _limited_rows(entry)
            first += entry.count
            if budget is not None and limited:
                keep_TL[first - limited : first] = budget.keep_L
                cap_TL[first - limited : first] = budget.cap_L
        keep, cap = rows.carry(keep_TL), rows.carry(cap_TL)
        return ExpertBudget(
            keep_TL=rows.carried(keep),
            cap_TL=rows.carried(cap),
            skipped_T=torch.zeros(num_rows, dtype=torch.int64, device=self.decoder.device),
        )

    def record(self, entries: list[Entry], budget: ExpertBudget | None) -> None:
        """Tell requests what their rows did without, and sequences where they stopped being exact."""
        if budget is None:
            return
        skipped, first = budget.skipped_T.tolist(), 0
        for entry in entries:
            rows = skipped[first : first + entry.count]
            first += entry.count
            for position, experts in enumerate(rows, entry.start):
                if experts:
                    entry.sequence.request.skipped_experts += experts
                    self.skipped_experts += experts
                    if position == entry.sequence.num_tokens - 1:
                        entry.sequence.skipped_experts += experts
                    entry.sequence.mark_approximate(position)


def _limited_rows(entry: Entry) -> int:
    """How many of an entry's rows, its last ones, are on a budget."""
    if entry.sequence.expert_budget is None:
        return 0
    return min(entry.count, max(0, entry.start + entry.count - entry.sequence.num_prompt))


def _ranges(layers: list[int]) -> str:
    return f"{layers[0]} … {layers[-1]}" if layers == list(range(layers[0], layers[-1] + 1)) else str(layers)
