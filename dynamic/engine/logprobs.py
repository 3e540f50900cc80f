"""Log-probabilities of chosen tokens and of the best ones beside them.

Shape suffixes: R rows, V vocabulary, N alternatives.
"""

from __future__ import annotations

import torch

from ..text.tokenizer import Tokenizer
from .outputs import Logprob, PositionLogprobs
from .selection import largest


def position_logprobs(
    logprobs_RV: torch.Tensor, token_ids: list[int], num_best: list[int], tokenizer: Tokenizer
) -> list[PositionLogprobs]:
    """What to report for each row: its chosen token first, then the best ones, by falling probability.

    Arguments:
        logprobs_RV: ``log_softmax`` of the model's raw logits, before penalties, bias and temperature; float32.
        token_ids: the chosen token of each row.
        num_best: how many of the best tokens to report for each row; 0 reports the chosen one alone.
    """
    chosen_R1 = torch.tensor(token_ids, device=logprobs_RV.device)[:, None]
    chosen = logprobs_RV.gather(1, chosen_R1).squeeze(1).tolist()
    positions: list[PositionLogprobs] = [{}] * len(token_ids)
    # One call per number: which of several equals come out may depend on how many are asked for.
    for count in set(num_best):
        rows = [row for row, n in enumerate(num_best) if n == count]
        rows_RV = logprobs_RV if len(rows) == len(token_ids) else logprobs_RV[rows]
        best_RN, places_RN = largest(rows_RV, min(max(count, 1), logprobs_RV.shape[1]))
        for row, best, places in zip(rows, best_RN.tolist(), places_RN.tolist(), strict=True):
            token, value = token_ids[row], chosen[row]
            if value >= best[-1]:  # all that are better are in the list
                rank = 1 + sum(other > value for other in best)
            else:
                rank = 1 + int((logprobs_RV[row] > value).sum())
            found = {token: Logprob(value, rank, tokenizer.token_text(token))}
            for place, (other, other_value) in enumerate(zip(places[:count], best, strict=False), start=1):
                if other != token:
                    found[other] = Logprob(other_value, place, tokenizer.token_text(other))
            positions[row] = found
    return positions
