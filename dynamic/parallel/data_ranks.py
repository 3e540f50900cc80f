"""Where sequences live: each in one KV shard, a tensor group of ranks, which alone run its rows and hold its pages.

A cache lies in KV shards of equal runs of pages, so that a slot says whose row it is. Between segments all ranks of a
stage have all rows; within a segment a KV shard has its own.

Shape suffixes as in ``kernels/api/types.py``; W some of a batch's rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from ...kernels.api.types import AttentionBatch, GroupPages, KVLayer, KVLayers
from ..model.kv_cache import Copies
from .context import ParallelContext
from .plan import rows_to_write


class SharedCache(KVLayers):
    """One rank's share of a cache that all ranks know by its number.

    Arguments:
        pages: of a KV shard, by group of layers; page_size: tokens per page.
        kv_shard: of this rank; KV shards beyond those that the cache has hold nothing.
    """

    def __init__(
        self, layers: Iterable[KVLayer], number: int, pages: Sequence[int], kv_shard: int, page_size: int
    ) -> None:
        super().__init__(layers)
        self.number, self.kv_shard, self.page_size = number, kv_shard, page_size
        self.shard_pages, *self._window_pages = pages
        self._parts: dict[range, KVLayers] = {}

    def held(self, part: range) -> KVLayers:
        """The cache of those layers that a rank holds; always the same, so that a backend's own of it is made once."""
        if part not in self._parts:
            self._parts[part] = KVLayers(self[part.start : part.stop])
        return self._parts[part]

    @property
    def shard_slots(self) -> int:
        """Slots of a KV shard."""
        return self.shard_pages * self.page_size

    @property
    def first_page(self) -> int:
        """Of this rank's KV shard."""
        return self.kv_shard * self.shard_pages

    @property
    def first_slot(self) -> int:
        """Of this rank's KV shard."""
        return self.kv_shard * self.shard_slots

    def own_copies(self, *copies: Copies) -> list[list[tuple[int, int]]]:
        """By group of layers, those copies of pages, (from, to), that are within this KV shard, by its own numbers."""
        return [
            [(s - self.kv_shard * pages, t - self.kv_shard * pages) for s, t in pairs if s // pages == self.kv_shard]
            for pages, pairs in zip((self.shard_pages, *self._window_pages), copies, strict=False)
        ]

    def own_groups(
        self, batch: AttentionBatch, own_W: torch.Tensor, here_S: torch.Tensor | None = None
    ) -> tuple[GroupPages, ...]:
        """Pages of the groups of layers behind the first, by this KV shard's numbers.

        Arguments:
            own_W, here_S: numbers of rows and of sequences that live here; the latter are not needed for writing only.
        """
        assert len(batch.groups) in (0, len(self._window_pages)), "the batch has other groups than the cache"
        found = []
        for (slots_T, table_SM), pages in zip(batch.groups, self._window_pages, strict=False):
            first = self.kv_shard * pages
            table = table_SM if here_S is None else (table_SM[here_S] - first).clamp_(min=0)
            found.append(GroupPages(slots_T[own_W] - first * self.page_size, table))
        return tuple(found)

    def own_rows(self, batch: AttentionBatch) -> tuple[torch.Tensor, AttentionBatch]:
        """The numbers of the rows that live here, int64, and a batch that writes them to this KV shard's slots.

        Arguments:
            batch: see :func:`rows_to_write`; on the host.
        """
        own_W = (batch.slots_T // self.shard_slots == self.kv_shard).nonzero()[:, 0]
        states_T = batch.state_slots_T
        positions_W, slots_W = batch.positions_T[own_W], batch.slots_T[own_W] - self.first_slot
        states_W = None if states_T is None else states_T[own_W]
        groups = [pages.slots_T for pages in self.own_groups(batch, own_W)]
        return own_W, rows_to_write(positions_W, slots_W, batch.num_positions - 1, states_W, groups)


def cache_of(kv: Sequence[KVLayer]) -> SharedCache:
    """A cache as :meth:`ParallelDecoder.allocate_cache` made it."""
    assert isinstance(kv, SharedCache), "other ranks do not have this cache"
    return kv


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How the rows of a batch lie in KV shards.

    Arguments:
        rows: by KV shard, their numbers in the batch, int64, rising.
        own: the batch of those of this rank's KV shard, by its own pages and slots; None where there are none.
    """

    rows: list[torch.Tensor]
    own: AttentionBatch | None

    @property
    def counts(self) -> list[int]:
        """Rows by KV shard."""
        return [len(rows_W) for rows_W in self.rows]


def spread(batch: AttentionBatch, cache: SharedCache, kv_shards: int) -> Spread:
    """Find the KV shards of a batch's rows.

    Arguments:
        batch: on the host.
    """
    shard_T = batch.slots_T // cache.shard_slots
    rows = [(shard_T == kv_shard).nonzero()[:, 0] for kv_shard in range(kv_shards)]
    own_W = rows[cache.kv_shard]
    if not len(own_W):
        return Spread(rows=rows, own=None)
    starts_S1 = batch.query_start_S1.long()
    here_S = (shard_T[starts_S1[:-1]] == cache.kv_shard).nonzero()[:, 0]
    counts_S, context_len_S = starts_S1.diff()[here_S], batch.context_len_S[here_S]
    own = AttentionBatch(
        positions_T=batch.positions_T[own_W],
        slots_T=batch.slots_T[own_W] - cache.first_slot,
        query_start_S1=torch.cat((torch.zeros(1, dtype=torch.int64), counts_S.cumsum(0))).int(),
        context_len_S=context_len_S,
        block_table_SM=(batch.block_table_SM[here_S] - cache.first_page).clamp_(min=0),  # behind the context are zeros
        max_query_len=int(counts_S.max()),
        max_context_len=int(context_len_S.max()),
        max_position=batch.max_position,
        state_slots_S=None if batch.state_slots_S is None else batch.state_slots_S[here_S],
        kept_slots_S=None if batch.kept_slots_S is None else batch.kept_slots_S[here_S],
        groups=cache.own_groups(batch, own_W, here_S),
    )
    return Spread(rows=rows, own=own)


def on_device(batch: AttentionBatch, device: torch.device) -> AttentionBatch:
    """A batch whose tensors are on a device."""
    tensors = {name: value.to(device) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    groups = tuple(GroupPages(*(tensor.to(device) for tensor in pages)) for pages in batch.groups)
    return replace(batch, **tensors, groups=groups)


def share_rows(
    context: ParallelContext, own_WY: torch.Tensor, executed_X: torch.Tensor, spread: Spread
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make all rows whole on all ranks of a stage.

    Arguments:
        own_WY: what there is of the rows of this rank's KV shard, float32.
        executed_X: int64, slots of these rows by the rank that ran them.

    Returns: the same of all rows, and of all KV shards.
    """
    counts, width, extra = spread.counts, own_WY.shape[1], len(executed_X)
    packet = own_WY.flatten()
    if len(own_WY):
        packet = torch.cat((packet, executed_X.int().view(torch.float32)))
    sizes = [count * width + extra if count else 0 for count in counts]
    sent = [len(packet)] * len(sizes)
    found, work = context.swap(packet.repeat(len(sizes)), sent, sizes, context.shards_group, "rows")
    context.finish(work)
    parts = [part.tensor_split([len(part) - extra]) for part in found.split(sizes) if len(part)]
    rows_TY = torch.empty(sum(counts), width, device=own_WY.device)
    order_T = torch.cat(spread.rows).to(own_WY.device)
    rows_TY[order_T] = torch.cat([rows.view(-1, width) for rows, _ in parts])
    return rows_TY, torch.stack([executed.view(torch.int32) for _, executed in parts]).sum(0)


def rows_at(slots_T: torch.Tensor, wanted_R: torch.Tensor) -> torch.Tensor:
    """Numbers of the rows that live at some slots; every slot is one row's."""
    sorted_T, order_T = slots_T.sort()
    return order_T[torch.searchsorted(sorted_T, wanted_R)]
