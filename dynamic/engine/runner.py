"""Runs the model on a step's schedule: host-side index arrays, the segments of layers, the logits that are needed.

Shape suffixes as in ``kernels/types.py``; R rows whose logits are needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ...kernels.types import AttentionBatch
from .kv_cache import allocate_layers, copy_pages
from .scheduler import Entry, Schedule

if TYPE_CHECKING:
    from ..decoder import Decoder

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
        self.kv = allocate_layers(decoder.spec, num_pages, page_size, decoder.dtype, self.device)
        # Long prompts with logprobs would need rows x vocabulary floats at once.
        self.max_logit_rows = max(1, LOGITS_CHUNK_BYTES // (4 * decoder.spec.vocab_size))

    def run(self, schedule: Schedule) -> torch.Tensor:
        """Write the step's keys and values; returns the last layer's output of every row, (T, D)."""
        if schedule.copies:
            copy_pages(self.kv, schedule.copies)
        token_ids_T, batch = build_batch(schedule.entries, self.page_size, self.device)
        x_TD = self.decoder.embed(token_ids_T)
        for segment in self.decoder.segments:
            x_TD = self.decoder.run_segment(segment, x_TD, self.kv, batch)
        return x_TD

    def logits(self, x_TD: torch.Tensor, rows: list[int] | range) -> torch.Tensor:
        """Logits of some rows of :meth:`run`'s result, float32, (R, V)."""
        if list(rows) != list(range(x_TD.shape[0])):  # a step of decodes alone needs all rows as they are
            x_TD = x_TD[torch.tensor(rows, device=x_TD.device)]
        return self.decoder.logits(x_TD)


def build_batch(entries: list[Entry], page_size: int, device: torch.device) -> tuple[torch.Tensor, AttentionBatch]:
    """Token ids (int64, (T,)) and the attention batch of a step's entries, in their order."""
    counts_S = np.array([e.count for e in entries], dtype=np.int32)
    starts_S = np.array([e.start for e in entries], dtype=np.int32)
    query_start_S1 = np.zeros(len(entries) + 1, dtype=np.int32)
    np.cumsum(counts_S, out=query_start_S1[1:])
    context_len_S = starts_S + counts_S
    max_context_len = int(context_len_S.max())
    table_SM = np.zeros((len(entries), -(-max_context_len // page_size)), dtype=np.int32)
    token_ids: list[int] = []
    for row, entry in enumerate(entries):
        sequence, end = entry.sequence, entry.start + entry.count
        token_ids += sequence.token_ids[entry.start : end]
        used = -(-end // page_size)
        table_SM[row, :used] = sequence.pages[:used]
    sequence_T = np.repeat(np.arange(len(entries)), counts_S)
    # Positions count up within each sequence: row number minus its sequence's first row plus where that starts.
    positions_T = np.arange(len(token_ids)) + (starts_S - query_start_S1[:-1])[sequence_T]
    slots_T = table_SM[sequence_T, positions_T // page_size].astype(np.int64) * page_size + positions_T % page_size

    def move(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return move(np.array(token_ids, dtype=np.int64)), AttentionBatch(
        positions_T=move(positions_T),
        slots_T=move(slots_T),
        query_start_S1=move(query_start_S1),
        context_len_S=move(context_len_S),
        block_table_SM=move(table_SM),
        max_query_len=int(counts_S.max()),
        max_context_len=max_context_len,
    )
