"""Changes to logits before sampling: penalties, logit bias, tokens that are forbidden for now.

All of them touch few tokens of the vocabulary, so they are kept and applied as lists of (row, token) entries that
change by one token a step, never as tables over the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from .request import Sequence


def forbids_stops(sequence: Sequence) -> bool:
    """Whether the output is still too short to end."""
    return sequence.num_output < sequence.request.params.min_tokens


def edits_logits(sequence: Sequence) -> bool:
    """Whether a row's logits must be changed before sampling."""
    return sequence.counts is not None or bool(sequence.request.params.logit_bias) or forbids_stops(sequence)


def edit_logits(logits_RV: torch.Tensor, sequences: list[Sequence]) -> None:
    """Apply bias, ``min_tokens`` and penalties in place, in this order (the one of vLLM).

    Arguments:
        logits_RV: float32.
        sequences: one per row.
    """
    _add_bias(logits_RV, sequences)
    _forbid_stops(logits_RV, sequences)
    _penalize(logits_RV, sequences)


def _add_bias(logits_RV: torch.Tensor, sequences: list[Sequence]) -> None:
    entries = [(r, t, b) for r, s in enumerate(sequences) for t, b in s.request.params.logit_bias.items()]
    if entries:
        rows, tokens, biases = zip(*entries, strict=True)
        device = logits_RV.device
        index = (torch.tensor(rows, device=device), torch.tensor(tokens, device=device))
        logits_RV[index] = logits_RV[index] + torch.tensor(biases, dtype=torch.float32, device=device)


def _forbid_stops(logits_RV: torch.Tensor, sequences: list[Sequence]) -> None:
    entries = [(r, t) for r, s in enumerate(sequences) if forbids_stops(s) for t in sorted(s.request.stop_tokens.all)]
    if entries:
        rows, tokens = zip(*entries, strict=True)
        device = logits_RV.device
        logits_RV[torch.tensor(rows, device=device), torch.tensor(tokens, device=device)] = float("-inf")


def _penalize(logits_RV: torch.Tensor, sequences: list[Sequence]) -> None:
    rows = [(r, s.counts, s.request.params) for r, s in enumerate(sequences) if s.counts is not None]
    if not rows:
        return
    sizes = [len(counts.ids) for _, counts, _ in rows]
    settings = [[p.repetition_penalty, p.presence_penalty, p.frequency_penalty] for _, _, p in rows]
    device = logits_RV.device

    def spread(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.repeat(values, sizes)).to(device)

    repetition_N, presence_N, frequency_N = map(spread, np.asarray(settings, dtype=np.float32).T)
    rows_N = spread(np.asarray([r for r, _, _ in rows]))
    ids_N = torch.from_numpy(np.concatenate([counts.ids for _, counts, _ in rows])).to(device)
    counts_N = torch.from_numpy(np.concatenate([counts.counts for _, counts, _ in rows])).to(device)
    values_N = logits_RV[rows_N, ids_N]
    values_N = torch.where(values_N > 0, values_N / repetition_N, values_N * repetition_N)
    values_N = values_N - frequency_N * counts_N - presence_N * (counts_N > 0)
    logits_RV[rows_N, ids_N] = values_N
