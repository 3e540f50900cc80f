"""The rows of a step: what goes to the device once, and attention batches of all or some of them.

Shape suffixes as in ``kernels/api/types.py``; R some of the T rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from ...kernels.api.types import AttentionBatch, GroupPages
from .request import Sequence
from .schedule import Entry
from .staging import HostStaging
from .state_slots import NO_SLOT
from .window_pages import WindowPages


class StepRows:
    """Where the rows of a step's entries live, in the entries' order.

    Arguments:
        entries: the step's work.
        page_size: tokens per page.
        staging: takes everything to the device, in one copy when it is first asked for.
        has_states: whether the rows' sequences have recurrent states.
        windows: pages of layers that see less than others.
    """

    def __init__(
        self,
        entries: list[Entry],
        page_size: int,
        staging: HostStaging,
        has_states: bool = False,
        windows: Iterable[WindowPages] = (),
    ) -> None:
        self._staging = staging
        self._carried: list[np.ndarray] = []
        cut = list(_runs(entries, has_states))
        runs = [run for run, _ in cut]
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
        states = [sequence.state_slot for sequence, _, _ in runs] if has_states else None
        self._states = None if states is None else self.carry(np.array(states, dtype=np.int64))
        kept = np.array([slot for _, slot in cut], dtype=np.int64) if any(entry.kept for entry in entries) else None
        self._kept = None if kept is None else self.carry(kept)
        self._groups = [(self.carry(w.slots(self._slots_T)), self.carry(w.own(self._table_SM))) for w in windows]

    def __len__(self) -> int:
        return len(self._token_ids_T)

    def carry(self, array: np.ndarray) -> int:
        """Let an array go to the device with the rows. Returns what :meth:`carried` knows it by."""
        assert "_on_device" not in self.__dict__, "the rows are on the device already"
        self._carried.append(array)
        return len(self._carried) - 1

    def carried(self, number: int) -> torch.Tensor:
        """An array of :meth:`carry`, on the device."""
        return self._on_device[6 + number]

    def token_ids(self) -> torch.Tensor:
        """Token ids of all rows, int64, (T,)."""
        return self._on_device[0]

    def batch(self) -> AttentionBatch:
        """The attention batch of all rows."""
        return self._batch

    def batch_of(self, rows_R: np.ndarray, at_R: torch.Tensor) -> AttentionBatch:
        """The attention batch of some rows.

        Arguments:
            rows_R: row numbers, rising; all rows or none of a run of several rows.
            at_R: the same on the device.
        """
        whole, counts = self._batch, self._counts_S
        if len(counts) == len(self):  # every run is one row
            kept, kept_S, starts_S1, counts = rows_R, at_R, whole.query_start_S1[: len(rows_R) + 1], counts[rows_R]
        else:
            kept, counts = np.unique(self._sequence_T[rows_R], return_counts=True)
            assert (counts == self._counts_S[kept]).all(), "a run of rows was torn apart"
            kept_S, starts_S1 = self._staging.upload(kept, _boundaries(counts))
        some = self.slots_of(at_R)
        groups = [GroupPages(slots_R, table_SM.index_select(0, kept_S)) for slots_R, table_SM in some.groups]
        return replace(
            some,
            groups=tuple(groups),
            query_start_S1=starts_S1,
            context_len_S=whole.context_len_S.index_select(0, kept_S),
            block_table_SM=whole.block_table_SM.index_select(0, kept_S),
            max_query_len=int(counts.max()),
            max_context_len=int(self._context_len_S[kept].max()),
            state_slots_S=None if whole.state_slots_S is None else whole.state_slots_S.index_select(0, kept_S),
            kept_slots_S=None if whole.kept_slots_S is None else whole.kept_slots_S.index_select(0, kept_S),
        )

    def exiting(self, rows_R: np.ndarray, at_R: torch.Tensor) -> AttentionBatch:
        """A batch for what rows leave in layers that they skip; arguments as for :meth:`batch_of`."""
        return self.slots_of(at_R) if self._states is None else self.batch_of(rows_R, at_R)

    def slots_of(self, at_R: torch.Tensor) -> AttentionBatch:
        """A batch for writing to the cache only: positions and slots of some rows, all else of all rows."""
        whole = self._batch
        positions_R, slots_R = whole.positions_T.index_select(0, at_R), whole.slots_T.index_select(0, at_R)
        groups = tuple(GroupPages(slots_T.index_select(0, at_R), table_SM) for slots_T, table_SM in whole.groups)
        return replace(whole, positions_T=positions_R, slots_T=slots_R, groups=groups)

    @cached_property
    def _sequence_T(self) -> np.ndarray:
        return np.repeat(np.arange(len(self._counts_S)), self._counts_S)

    @cached_property
    def _on_device(self) -> tuple[torch.Tensor, ...]:
        return self._staging.upload(
            self._token_ids_T,
            self._positions_T,
            self._slots_T,
            self._query_start_S1,
            self._context_len_S,
            self._table_SM,
            *self._carried,
        )

    @cached_property
    def _batch(self) -> AttentionBatch:
        _, positions_T, slots_T, query_start_S1, context_len_S, table_SM = self._on_device[:6]
        return AttentionBatch(
            positions_T=positions_T,
            slots_T=slots_T,
            query_start_S1=query_start_S1,
            context_len_S=context_len_S,
            block_table_SM=table_SM,
            max_query_len=int(self._counts_S.max()),
            max_context_len=int(self._context_len_S.max()),
            max_position=self._max_position,
            state_slots_S=None if self._states is None else self.carried(self._states),
            kept_slots_S=None if self._kept is None else self.carried(self._kept),
            groups=tuple(GroupPages(*map(self.carried, numbers)) for numbers in self._groups),
        )


def _padded(pages: array[int], width: int) -> array[int]:
    return pages if len(pages) == width else pages + array("i", [0]) * (width - len(pages))


def _runs(entries: list[Entry], has_states: bool) -> Iterator[tuple[tuple[Sequence, int, int], int]]:
    """(Sequence, first position, rows), which attention sees as one sequence, and where its states are kept then.

    Rows that may exit on their own become runs of one row, so that an exit never tears a run apart. Where there are
    recurrent states, rows of a sequence exit together, see :attr:`.Sequence.num_together`.
    """
    for entry in entries:
        sequence, start, end = entry.sequence, entry.start, entry.start + entry.count
        if entry.count == 1:
            yield (sequence, start, 1), entry.kept[0][1] if entry.kept else NO_SLOT
            continue
        kept = dict(entry.kept)
        ends = {end, *kept}
        if not has_states and entry.count > 1 and sequence.exit_logits_E is not None:
            ends.update(range(max(start + 1, sequence.num_prompt), end))
        for stop in sorted(ends):
            yield (sequence, start, stop - start), kept.get(stop, NO_SLOT)
            start = stop


def _boundaries(counts_S: np.ndarray) -> np.ndarray:
    starts_S1 = np.zeros(len(counts_S) + 1, dtype=np.int32)
    np.cumsum(counts_S, out=starts_S1[1:])
    return starts_S1
