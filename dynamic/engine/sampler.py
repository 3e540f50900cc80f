"""Choosing tokens. Every row is treated as if it were alone: its result does not depend on the rows beside it.

Shape suffixes: R rows to sample, U those of them that are not settled yet, V vocabulary, H best tokens looked at,
X blocks of the vocabulary, C tokens of a block.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from .penalties import edit_logits, edits_logits
from .selection import BLOCK, block_sums, first_best, largest

if TYPE_CHECKING:
    from .request import Sequence
    from .sampling_params import SamplingParams

NO_TOKEN = -1
_BELOW_ONE = 1 - 2**-53
# A nucleus rarely needs more tokens than these, and picking them is far cheaper than sorting the vocabulary.
NUCLEUS_HEADS = (64, 1024)


def sample(logits_RV: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    """Choose the next token of each row's sequence.

    Every row that is not greedy takes one uniform number from its sequence's own stream and inverts the distribution
    with it; the vocabulary's order is the order of the cumulative sum.

    Arguments:
        logits_RV: float32; overwritten.
        sequences: one per row.

    Returns: token ids; ``NO_TOKEN`` for a row that has no finite best logit.
    """
    if any(edits_logits(s) for s in sequences):
        edit_logits(logits_RV, sequences)
    drawn = [row for row, s in enumerate(sequences) if not s.request.params.greedy]
    mixed = len(drawn) < len(sequences)
    if mixed:
        tokens, best = first_best(logits_RV)
    else:
        tokens, best = [NO_TOKEN] * len(sequences), logits_RV.amax(-1).tolist()
    if drawn:
        params = [sequences[row].request.params for row in drawn]
        draws_R = torch.tensor([sequences[row].draw() for row in drawn], dtype=torch.float64, device=logits_RV.device)
        rows_RV = logits_RV[torch.tensor(drawn, device=logits_RV.device)] if mixed else logits_RV
        for row, token in zip(drawn, draw_tokens(rows_RV, params, draws_R).tolist(), strict=True):
            tokens[row] = token
    return [token if math.isfinite(value) else NO_TOKEN for token, value in zip(tokens, best, strict=True)]


def draw_tokens(logits_RV: torch.Tensor, params: list[SamplingParams], draws_R: torch.Tensor) -> torch.Tensor:
    """Invert each row's distribution after temperature, min-p, top-k and top-p, in this order (the one of vLLM).

    Tokens as likely as the last one that a filter keeps are kept too: which of several equals go must not depend on
    how they were sorted.

    Arguments:
        logits_RV: float32; overwritten.
        params: one per row; none of them greedy.
        draws_R: float64, uniform in [0, 1).

    Returns: token ids, int64, (R,).
    """
    temperature_R1 = _column([p.temperature for p in params], logits_RV)
    weights_RV = logits_RV.div_(temperature_R1).softmax(-1)
    floor_R1, floored_R1 = _floor(weights_RV, params)
    if floor_R1 is not None:
        _zero_below(weights_RV, floor_R1)
    if any(p.top_p < 1.0 for p in params):
        _keep_nucleus(weights_RV, params, floored_R1)
    return _invert(weights_RV, draws_R)


def _zero_below(weights_RV: torch.Tensor, floor_R1: torch.Tensor) -> None:
    """Zero the weights below each row's floor, in place and in one pass without a mask."""
    below = torch.nextafter(floor_R1, torch.full_like(floor_R1, -1.0)).squeeze(1).tolist()
    for weights_V, limit in zip(weights_RV, below, strict=True):
        if limit > 0.0:
            torch.threshold_(weights_V, limit, 0.0)


def _invert(weights_RV: torch.Tensor, draws_R: torch.Tensor) -> torch.Tensor:
    """The token at which the cumulative weight first exceeds its share ``draw``: first the block, then the token in it.

    A place where a cumulative sum first exceeds something has a weight above zero, so none without weight is taken.
    """
    cumulative_RX = block_sums(weights_RV).cumsum(-1)
    targets_R1 = draws_R[:, None] * cumulative_RX[:, -1:]
    last_block = cumulative_RX.shape[1] - 1
    block_R1 = torch.searchsorted(cumulative_RX, targets_R1, right=True).clamp_(max=last_block)
    end_R1 = cumulative_RX.gather(1, block_R1)
    start_R1 = cumulative_RX.gather(1, (block_R1 - 1).clamp_(min=0)).masked_fill_(block_R1 == 0, 0.0)
    # The block's sum and the sum of its entries may differ in the last bit: carry the share over, not the amount.
    share_R1 = ((targets_R1 - start_R1) / (end_R1 - start_R1)).clamp_(max=_BELOW_ONE)
    places_RC = block_R1 * BLOCK + torch.arange(BLOCK, device=weights_RV.device)
    outside_RC = places_RC >= weights_RV.shape[1]
    inside_RC = weights_RV.gather(1, places_RC.masked_fill(outside_RC, 0)).masked_fill_(outside_RC, 0.0)
    within_RC = inside_RC.cumsum(-1, dtype=torch.float64)
    offset_R1 = torch.searchsorted(within_RC, share_R1 * within_RC[:, -1:], right=True)
    return (block_R1 * BLOCK + offset_R1).squeeze(1).clamp_(max=weights_RV.shape[1] - 1)


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _floor(weights_RV: torch.Tensor, params: list[SamplingParams]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The least weight that min-p and top-k keep in each row, and which rows have such a limit."""
    vocabulary = weights_RV.shape[1]
    top_k = [p.top_k if 0 < p.top_k < vocabulary else 0 for p in params]
    limited = [k > 0 or p.min_p > 0.0 for k, p in zip(top_k, params, strict=True)]
    if not any(limited):
        return None, None
    # Each keeps a beginning of the falling order, so the two together keep the shorter beginning.
    floor_R1 = weights_RV.amax(-1, keepdim=True) * _column([p.min_p for p in params], weights_RV)
    if any(top_k):
        best_RK, _ = largest(weights_RV, max(top_k))
        last_R1 = torch.tensor([max(k - 1, 0) for k in top_k], device=weights_RV.device)[:, None]
        has_k_R1 = torch.tensor([k > 0 for k in top_k], device=weights_RV.device)[:, None]
        kth_R1 = best_RK.gather(1, last_R1).masked_fill_(~has_k_R1, 0.0)
        floor_R1 = torch.maximum(floor_R1, kth_R1)
    return floor_R1, torch.tensor(limited, device=weights_RV.device)[:, None]


def _keep_nucleus(weights_RV: torch.Tensor, params: list[SamplingParams], floored_R1: torch.Tensor | None) -> None:
    """Zero all weights but the smallest set of best tokens that holds ``top_p`` of the row's sum (Holtzman 2019)."""
    vocabulary = weights_RV.shape[1]
    goal_R1 = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=weights_RV.device)[:, None]
    if floored_R1 is not None:  # rows without a limit sum to 1
        total_R1 = block_sums(weights_RV).cumsum(-1)[:, -1:]
        goal_R1 = goal_R1 * torch.where(floored_R1, total_R1, 1.0)
    least_R1 = torch.zeros_like(goal_R1, dtype=torch.float32)
    open_U = torch.tensor([row for row, p in enumerate(params) if p.top_p < 1.0], device=weights_RV.device)
    for head in (*(h for h in NUCLEUS_HEADS if h < vocabulary), vocabulary):
        rows_UV = weights_RV if len(open_U) == len(params) else weights_RV[open_U]
        best_UH, _ = largest(rows_UV, head)
        least_R1[open_U], reached_U1 = _nucleus_limit(best_UH, goal_R1[open_U])
        open_U = open_U[~reached_U1.squeeze(1)]
        if not len(open_U):
            break
    _zero_below(weights_RV, least_R1)


def _nucleus_limit(best_RH: torch.Tensor, goal_R1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight of the token with which the falling weights reach the goal, and whether they do."""
    cumulative_RH = best_RH.cumsum(-1, dtype=torch.float64)
    place_R1 = torch.searchsorted(cumulative_RH, goal_R1).clamp_(max=best_RH.shape[1] - 1)
    return best_RH.gather(1, place_R1), cumulative_RH[:, -1:] >= goal_R1
