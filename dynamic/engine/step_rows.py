"""The rows of a step as arrays on the host, and attention batches of all or some of them.

Shape suffixes as in ``kernels/types.py``; R some of the T rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np
import torch

from ...kernels.types import AttentionBatch
from .request import Sequence
from .scheduler import Entry


class StepRows:
    """Where the rows of a step's entries live, in the entries' order.

    Arguments:
        entries: the step's work.
        page_size: tokens per page.
        device: of the tensors that are handed out.
    """

    def __init__(self, entries: list[Entry], page_size: int, device: torch.device) -> None:
        self._device, self._on_cpu = device, device.type == "cpu"
        runs = list(_runs(entries))
        if all(count == 1 for _, _, count in runs):
            self._take_single_rows(runs, page_size)
            return
        self._counts_S = np.array([count for _, _, count in runs], dtype=np.int32)
        starts_S = np.array([start for _, start, _ in runs], dtype=np.int32)
        self._query_start_S1 = _boundaries(self._counts_S)
        self._context_len_S = starts_S + self._counts_S
        pages = -(-int(self._context_len_S.max()) // page_size)
        self._table_SM = np.zeros((len(runs), pages), dtype=np.int32)
        token_ids: list[int] = []
        for row, (sequence, start, count) in enumerate(runs):
            end = start + count
            token_ids += sequence.token_ids[start:end]
            used = -(-end // page_size)
            self._table_SM[row, :used] = sequence.pages[:used]
        self._sequence_T = np.repeat(np.arange(len(runs)), self._counts_S)
        # Positions count up within each sequence: row number minus its sequence's first row plus where that starts.
        self._positions_T = np.arange(len(token_ids)) + (starts_S - self._query_start_S1[:-1])[self._sequence_T]
        pages_T = self._table_SM[self._sequence_T, self._positions_T // page_size].astype(np.int64)
        self._slots_T = pages_T * page_size + self._positions_T % page_size
        self._token_ids_T = np.array(token_ids, dtype=np.int64)

    def _take_single_rows(self, runs: list[tuple[Sequence, int, int]], page_size: int) -> None:
        """Where every run is one row, as when all sequences decode: few calls of numpy, each of which costs as much as
        a hundred rows in plain Python."""
        positions = [start for _, start, _ in runs]
        width = max(positions) // page_size + 1
        self._table_SM = np.array([_padded(s.pages[:width], width) for s, _, _ in runs], dtype=np.int32)
        slots = [s.pages[start // page_size] * page_size + start % page_size for s, start, _ in runs]
        self._positions_T = np.array(positions, dtype=np.int64)
        self._slots_T = np.array(slots, dtype=np.int64)
        self._token_ids_T = np.array([s.token_ids[start] for s, start, _ in runs], dtype=np.int64)
        self._query_start_S1 = np.arange(len(runs) + 1, dtype=np.int32)
        self._counts_S = np.ones(len(runs), dtype=np.int32)
        self._sequence_T = self._query_start_S1[:-1].astype(np.int64)
        self._context_len_S = (self._positions_T + 1).astype(np.int32)

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
        return AttentionBatch(
            positions_T=self._move(self._positions_T[rows_R]),
            slots_T=self._move(self._slots_T[rows_R]),
            query_start_S1=batch.query_start_S1,
            context_len_S=batch.context_len_S,
            block_table_SM=batch.block_table_SM,
            max_query_len=batch.max_query_len,
            max_context_len=batch.max_context_len,
        )

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
        )

    def _move(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._on_cpu else tensor.to(self._device)


def _padded(pages: array[int], width: int) -> array[int]:
    return pages if len(pages) == width else pages + array("i", [0]) * (width - len(pages))


def _runs(entries: list[Entry]) -> Iterator[tuple[Sequence, int, int]]:
    """(sequence, first position, rows): what attention sees as one sequence of rows.

    Rows that may leave on their own become runs of one row, which any of them can leave without tearing a run apart.
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
