"""The plain-torch oracle of the expert budget: which of its chosen experts a row really uses.

What a slot contributes is estimated as its router weight times its expert's calibrated scale: the mean norm of what the
expert adds per unit of router weight. Shape suffixes are explained in ``types.py``. Everything runs in float32.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..api.types import Routing
from .router import pack_kept


def limit_experts(routing: Routing, scale_E: torch.Tensor | None, keep_T: torch.Tensor, cap_T: torch.Tensor) -> Routing:
    """Keep, of each row's slots, the fewest whose estimated contributions reach a share of the row's sum.

    Slots are taken by falling contribution, ties in the router's order; the first is always kept. Kept slots stay in
    the router's order and move to the front, so that a row that keeps all of them is what it was, to the bit. Sums run
    slot by slot, so that a row's result never depends on the device or on other rows. Weights stay what they were:
    giving kept ones the weight of those that are gone moved the output further from the full model's.

    Arguments:
        scale_E: float32, at least 0; None for an uncalibrated layer, where the router's weight is the estimate.
        keep_T: float32, share of the sum that is to be reached; from 1 on all are kept, at 0 one.
        cap_T: int32, most slots.

    Returns: the routing with ``counts_T``; dropped slots name expert 0 with weight 0.
    """
    num_rows, top_k = routing.expert_ids_TK.shape
    slots_K = torch.arange(top_k, device=routing.weights_TK.device)
    used_TK = routing.used_TK
    worth_TK = routing.weights_TK.abs()
    if scale_E is not None:
        worth_TK = worth_TK * scale_E[routing.expert_ids_TK.masked_fill(~used_TK, 0).long()]
    order_TK = worth_TK.masked_fill(~used_TK, -1.0).sort(dim=-1, descending=True, stable=True).indices
    ranked_TK = worth_TK.masked_fill(~used_TK, 0.0).gather(-1, order_TK)
    before_TK = torch.empty_like(ranked_TK)  # contributions of the slots that are ranked higher
    total_T = ranked_TK.new_zeros(num_rows)
    for k in range(top_k):
        before_TK[:, k] = total_T
        total_T = total_T + ranked_TK[:, k]
    # Every comparison with NaN is false, so that such a row keeps its slots.
    enough_TK = (before_TK >= (keep_T * total_T)[:, None]) & (keep_T < 1)[:, None]
    surplus_TK = (enough_TK | (slots_K >= cap_T[:, None])) & (slots_K > 0)
    kept_TK = used_TK & ~torch.zeros_like(used_TK).scatter(-1, order_TK, surplus_TK)
    return replace(
        routing,
        expert_ids_TK=pack_kept(routing.expert_ids_TK, kept_TK),
        weights_TK=pack_kept(routing.weights_TK, kept_TK),
        counts_T=kept_TK.sum(-1, dtype=torch.int32),
        index=None,  # its tables are those of the routing as it was
    )
