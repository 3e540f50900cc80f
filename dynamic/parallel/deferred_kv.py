"""Deferred KV writes: rows that exited on an earlier stage get their keys and values here when a later row reads them.

Every rank of a pipeline lists the same rows from rank 0's messages; the vectors themselves are with one stage only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...kernels.api.types import AttentionBatch


@dataclass(eq=False)
class DeferredRow:
    """A row that exited after ``after_layers`` layers; ``x_D`` is its hidden vector, where this stage has it.

    ``state_slot``: where its sequence has its recurrent states, if it has any; ``group_slots``: its slots in groups of
    layers behind the first.
    """

    slot: int
    position: int
    after_layers: int
    x_D: torch.Tensor | None
    state_slot: int = 0
    group_slots: tuple[int, ...] = ()

    @property
    def place(self) -> tuple[int, ...]:
        """Position, slot, slot of states, slots of groups."""
        return self.position, self.slot, self.state_slot, *self.group_slots


def exited_rows(batch: AttentionBatch, after_layers: int, x_RD: torch.Tensor | None) -> list[DeferredRow]:
    """The rows of a batch, see :func:`.rows_to_write`, on the host; their vectors are copied."""
    vectors = [None] * len(batch.slots_T) if x_RD is None else x_RD.clone().unbind()
    states_T = torch.zeros_like(batch.slots_T) if batch.state_slots_T is None else batch.state_slots_T
    groups = [pages.slots_T.tolist() for pages in batch.groups]
    places = zip(batch.slots_T.tolist(), batch.positions_T.tolist(), vectors, states_T.tolist(), *groups, strict=True)
    return [
        DeferredRow(slot, position, after_layers, x_D, state, tuple(own)) for slot, position, x_D, state, *own in places
    ]


def take_vectors(rows: Sequence[DeferredRow], width: int, device: torch.device) -> torch.Tensor:
    """Their hidden vectors, (R, D), which the rows give up."""
    if not rows:
        return torch.empty(0, width, device=device)
    found_RD = torch.stack([row.x_D for row in rows if row.x_D is not None])
    assert len(found_RD) == len(rows), "these rows are on another stage"
    for row in rows:
        row.x_D = None
    return found_RD


def slots_read(batch: AttentionBatch, page_size: int) -> dict[int, int]:
    """What the rows of a batch read of the cache: how many slots of each page, from its first on."""
    tables, lengths = batch.block_table_SM.tolist(), batch.context_len_S.tolist()
    found: dict[int, int] = {}
    for table, length in zip(tables, lengths, strict=True):
        for start in range(0, length, page_size):
            page = table[start // page_size]
            found[page] = max(found.get(page, 0), min(length - start, page_size))
    return found


class DeferredWrites:
    """Deferred rows of one cache between two stages, by the page where their keys belong.

    Attributes:
        dropped: rows whose keys nobody will read any more: their page has got another owner.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._pages: dict[int, list[DeferredRow]] = {}  # in the order of their exits, which is the same on all ranks
        self.dropped = 0

    def __bool__(self) -> bool:
        return bool(self._pages)

    def __len__(self) -> int:
        return sum(len(rows) for rows in self._pages.values())

    def add(self, rows: Iterable[DeferredRow]) -> None:
        """Defer the writes of rows."""
        for row in rows:
            self._pages.setdefault(row.slot // self._page_size, []).append(row)

    def take(self, slots: Mapping[int, int] | None = None) -> list[DeferredRow]:
        """Rows that are no longer deferred here: those at the first so many slots of some pages, or all."""
        due: list[DeferredRow] = []
        for page in [page for page in self._pages if slots is None or page in slots]:
            stop = page * self._page_size + (self._page_size if slots is None else slots[page])
            rows = self._pages.pop(page)
            due += [row for row in rows if row.slot < stop]
            if kept := [row for row in rows if row.slot >= stop]:
                self._pages[page] = kept
        return due

    def drop(self, pages: Iterable[int]) -> None:
        """These pages are written anew."""
        self.dropped += len(self.take(dict.fromkeys(pages, self._page_size)))

    def overwrite(self, slots: Iterable[int]) -> None:
        """Rows begin at some slots: what is deferred there, and behind on the page, is of a sequence that is gone.

        A sequence fills a page from its first slot on, or from where a copy ends.
        """
        for slot in slots:
            page = slot // self._page_size
            if rows := self._pages.pop(page, None):
                kept = [row for row in rows if row.slot < slot]
                self.dropped += len(rows) - len(kept)
                if kept:
                    self._pages[page] = kept
