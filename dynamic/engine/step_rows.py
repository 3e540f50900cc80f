"""The rows of a step as arrays on the host, and attention batches of all or some of them.

Shape suffixes as in ``kernels/api/types.py``; R some of the T rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from ...kernels.api.types import AttentionBatch
from .request import Sequence
from .schedule import Entry


class StepRows:
    """Where the rows of a step's entries live, in the entries' order.

    Arguments:
        entries: the step's work.
        page_size: tokens per page.
        device: of the tensors that are handed out.
    """

    def __init__(self, entries: list[Entry], page_size: int, device: torch.device) -> None:
        self._device = device
        runs = list(_runs(entries))
        # In plain lists: a step that only decodes has few rows, for which a dozen calls of numpy would take longer.
        positions: list[int] = []
        slots: list[int] = []
        token_ids: list[int] = []
        for sequence, start, count in runs:
            pages, end, evicted = sequence.pages, start + count, sequence.num_evicted
            positions += range(start, end)
            slots += [pages[i // page_size] * page_size + i % page_size for i in range(start - evicted, end - evicted)]
            token_ids += sequence.token_ids[start:end]
        ends = [start + count - sequence.num_evicted for sequence, start, count in runs]
        width = -(-max(ends) // page_size)
        self._table_SM = np.array([_padded(sequence.pages[:width], width) for sequence, _, _ in runs], dtype=np.int32)
        self._counts_S = np.array([count for _, _, count in runs], dtype=np.int32)
        self._query_start_S1 = _boundaries(self._counts_S)
        self._context_len_S = np.array(ends, dtype=np.int32)
        self._positions_T = np.array(positions, dtype=np.int64)
        self._slots_T = np.array(slots, dtype=np.int64)
        self._token_ids_T = np.array(token_ids, dtype=np.int64)
        evicted = any(sequence.num_evicted for sequence, _, _ in runs)
        self._max_position = max(positions) if evicted else None

    def __len__(self) -> int:
        return len(self._token_ids_T)

    def token_ids(self) -> torch.Tensor:
        """Token ids of all rows, int64, (T,)."""
        return self._move(self._token_ids_T)

    def batch(self) -> AttentionBatch:
        """The attention batch of all rows."""
        return self._batch(self._positions_T, self._slots_T, slice(None), self._counts_S, self._query_start_S1)

    def batch_of(self, rows_R: np.ndarray) -> AttentionBatch:
        """The attention batch of some rows.

        Arguments:
            rows_R: row numbers, rising; all rows or none of a run of several rows.
        """
        kept, counts = self._sequence_T[rows_R], self._counts_S
        if len(counts) == len(self):  # every run is one row
            counts = counts[rows_R]
        else:
            kept, counts = np.unique(kept, return_counts=True)
            assert (counts == self._counts_S[kept]).all(), "a run of rows was torn apart"
        return self._batch(self._positions_T[rows_R], self._slots_T[rows_R], kept, counts, _boundaries(counts))

    def slots_of(self, rows_R: np.ndarray, batch: AttentionBatch) -> AttentionBatch:
        """A batch for writing to the cache only: positions and slots of some rows, everything else as in ``batch``."""
        positions_R, slots_R = self._move(self._positions_T[rows_R]), self._move(self._slots_T[rows_R])
        return replace(batch, positions_T=positions_R, slots_T=slots_R)

    @cached_property
    def _sequence_T(self) -> np.ndarray:
        return np.repeat(np.arange(len(self._counts_S)), self._counts_S)

    def _batch(
        self,
        positions_R: np.ndarray,
        slots_R: np.ndarray,
        kept: np.ndarray | slice,
        counts_S: np.ndarray,
        query_start_S1: np.ndarray,
    ) -> AttentionBatch:
        context_len_S = self._context_len_S[kept]
        return AttentionBatch(
            positions_T=self._move(positions_R),
            slots_T=self._move(slots_R),
            query_start_S1=self._move(query_start_S1),
            context_len_S=self._move(context_len_S),
            block_table_SM=self._move(self._table_SM[kept]),
            max_query_len=int(counts_S.max()),
            max_context_len=int(context_len_S.max()),
            max_position=self._max_position,
        )

    def _move(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def _padded(pages: array[int], width: int) -> array[int]:
    return pages if len(pages) == width else pages + array("i", [0]) * (width - len(pages))


def _runs(entries: list[Entry]) -> Iterator[tuple[Sequence, int, int]]:
    """(sequence, first position, rows): what attention sees as one sequence of rows.

    Rows that may exit on their own become runs of one row, so that an exit never tears a run apart.
    """
    for entry in entries:
        sequence, start, end = entry.sequence, entry.start, entry.start + entry.count
        if entry.count > 1 and sequence.request.exit_logits_E is not None and end > sequence.num_prompt:
            if start < sequence.num_prompt:
                yield sequence, start, sequence.num_prompt - start
            for position in range(max(start, sequence.num_prompt), end):
                yield sequence, position, 1
        else:
            yield sequence, start, entry.count


def _boundaries(counts_S: np.ndarray) -> np.ndarray:
    starts_S1 = np.zeros(len(counts_S) + 1, dtype=np.int32)
    np.cumsum(counts_S, out=starts_S1[1:])
    return starts_S1
