"""Log-probabilities of chosen tokens and of the best ones beside them.

Shape suffixes: R rows, V vocabulary, N alternatives.
"""

from __future__ import annotations

import torch

from ..outputs import Logprob, PositionLogprobs
from ..tokenizer import Tokenizer


def position_logprobs(
    logits_RV: torch.Tensor, token_ids: list[int], num_best: list[int], tokenizer: Tokenizer
) -> list[PositionLogprobs]:
    """What to report for each row: its chosen token first, then the best ones, by falling probability.

    Probabilities are those of the model's raw logits, before penalties, bias and temperature.

    Arguments:
        logits_RV: float32.
        token_ids: the chosen token of each row.
        num_best: how many of the best tokens to report for each row; 0 reports the chosen one alone.
    """
    logprobs_RV = logits_RV.log_softmax(-1)
    chosen_R1 = torch.tensor(token_ids, device=logits_RV.device)[:, None]
    values_R1 = logprobs_RV.gather(1, chosen_R1)
    ranks = ((logprobs_RV > values_R1).sum(-1) + 1).tolist()
    values = values_R1.squeeze(1).tolist()
    text = tokenizer.token_text
    positions: list[PositionLogprobs] = [
        {token: Logprob(value, rank, text(token))} for token, value, rank in zip(token_ids, values, ranks, strict=True)
    ]
    # One call per number: how topk orders equals may depend on how many it is asked for.
    for count in sorted({n for n in num_best if n}):
        rows = [row for row, n in enumerate(num_best) if n == count]
        best_RN = logprobs_RV[rows].topk(min(count, logprobs_RV.shape[1]), -1)
        for row, best, ids in zip(rows, best_RN.values.tolist(), best_RN.indices.tolist(), strict=True):
            for rank, (value, token) in enumerate(zip(best, ids, strict=True), start=1):
                if token not in positions[row]:
                    positions[row][token] = Logprob(value, rank, text(token))
    return positions
