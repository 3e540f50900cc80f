"""Pages of layers that see a window only: pages of the pool have one each as long as a sequence sees what is in it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Pages

import numpy as np

from .block_pool import BlockPool
from .request import Sequence

_NONE = -1
_NOTHING = range(0)


class WindowPages:
    """What a group of layers with one window keeps beside the pages of the pool, which hold the layers that see more.

    A page of the pool is given a page of the group when a sequence is about to write to it, and so the group's pages
    are shared, copied, found and approximate as those of the pool are. Behind the window of every sequence that holds
    it, a page that can be found keeps what it has until the group needs it for another one. Those go first that no
    prefix is likely to need: neither the end of a prompt, nor of what two prompts have in common, nor of an answer;
    then those that were left longest ago. Pages that cannot be found give it up at once.

    Arguments:
        pool: of the layers that see most.
        num_pages: of the group, as many in each KV shard: those of the pool, or enough for all that the sequences that
            run at a time can see in one step.
        window: how many positions a token sees, its own included.
        page_size: tokens per page, as in the pool.
    """

    def __init__(self, pool: BlockPool, num_pages: int, window: int, page_size: int) -> None:
        assert num_pages % pool.kv_shards == 0, f"{num_pages} pages in {pool.kv_shards} KV shards"
        self.num_pages = num_pages
        self.window = window
        self._pool, self._page_size = pool, page_size
        size = num_pages // pool.kv_shards
        ends = range(size, num_pages + 1, size)
        self._own_B = np.full(pool.num_pages, _NONE, dtype=np.int32)  # the group's, by page of the pool
        self._seen = [0] * pool.num_pages  # by how many sequences
        # By KV shard: the group's pages that nothing has; pages of the pool that nobody sees and that have one, in the
        # order in which they give it up.
        self._empty = [list(range(end - 1, end - size - 1, -1)) for end in ends]
        self._left: list[OrderedDict[int, None]] = [OrderedDict() for _ in ends]
        self._copies: dict[int, int] = {}  # to page of the group → from page

    @property
    def num_seen(self) -> int:
        """Pages of the group that sequences see."""
        return self.num_pages - sum(map(len, self._empty)) - sum(map(len, self._left))

    def own(self, pages: np.ndarray) -> np.ndarray:
        """The group's pages, int32; 0 for pages of the pool that have none, which nobody reads."""
        return np.maximum(self._own_B[pages], 0)

    def slots(self, slots_T: np.ndarray) -> np.ndarray:
        """Slots of the group, int64, by those of the pool."""
        own_T = self._own_B[slots_T // self._page_size].astype(np.int64)
        assert (own_T != _NONE).all(), "a row is written to a page that the group does not have"
        return own_T * self._page_size + slots_T % self._page_size

    def holds(self, page: int) -> bool:
        """Whether the group still has what belongs to a page of the pool that was found."""
        return bool(self._own_B[page] != _NONE)

    def usable(self, pages: Pages[int], blocks: int) -> int:
        """With how many of the first ``blocks`` pages a sequence can begin, as far as one look says; with all if their
        number comes back."""
        for block in range(blocks - 1, self._first_seen(blocks * self._page_size) - 1, -1):
            if not self.holds(pages[block]):
                return block
        return blocks

    def see(self, sequence: Sequence, computed: int, blocks: int) -> None:
        """The tokens from ``computed`` on come next, in so many blocks; what lies behind their window is left."""
        old = sequence.seen.get(self.window, _NOTHING)
        new = range(max(old.start, self._first_seen(computed)), max(old.stop, blocks))
        sequence.seen[self.window] = new
        for block in range(old.start, min(new.start, old.stop)):
            self._leave(sequence.pages[block], self._ends_prefix(sequence, block))
        for block in range(max(new.start, old.stop), new.stop):
            self._take(sequence.pages[block])

    def share(self, sequence: Sequence) -> None:
        """Another sequence sees the same as this one."""
        for block in sequence.seen.get(self.window, _NOTHING):
            self._take(sequence.pages[block])

    def drop(self, sequence: Sequence) -> None:
        """A sequence sees nothing any more; it still holds its pages."""
        for block in reversed(sequence.seen.pop(self.window, _NOTHING)):
            self._leave(sequence.pages[block])

    def copy(self, source: int, target: int) -> None:
        """One of the sequences that see a page of the pool goes on in another, which becomes a copy."""
        self._take(target)
        self._copies[int(self._own_B[target])] = int(self._own_B[source])
        self._leave(source)

    def copies(self) -> list[tuple[int, int]]:
        """(From page, to page) of the group, to be made before the next step; asked once per step."""
        copies, self._copies = self._copies, {}
        return [(source, target) for target, source in copies.items()]

    def _ends_prefix(self, sequence: Sequence, block: int) -> bool:
        """Whether a block is seen behind the last full block of the prompt, or where another prompt went on in another
        way."""
        size = self._page_size
        borders = (sequence.num_prompt - 1) // size, sequence.num_shared // size
        return any(self._first_seen(border * size) <= block < border for border in borders)

    def _first_seen(self, position: int) -> int:
        return max(position - self.window + 1, 0) // self._page_size

    def _take(self, page: int) -> None:
        kv_shard = page // self._pool.shard_pages
        if not self._seen[page]:
            if self.holds(page):
                del self._left[kv_shard][page]
            else:
                self._own_B[page] = self._free_page(kv_shard)
        self._seen[page] += 1

    def _free_page(self, kv_shard: int) -> int:
        if self._empty[kv_shard]:
            return self._empty[kv_shard].pop()
        page, _ = self._left[kv_shard].popitem(last=False)
        return self._given_up(page)

    def _given_up(self, page: int) -> int:
        own, self._own_B[page] = int(self._own_B[page]), _NONE
        return own

    def _leave(self, page: int, kept: bool = True) -> None:
        self._seen[page] -= 1
        if self._seen[page]:
            return
        kv_shard = page // self._pool.shard_pages
        if self._pool.can_be_found(page):
            self._left[kv_shard][page] = None
            self._left[kv_shard].move_to_end(page, last=kept)
        else:
            self._empty[kv_shard].append(self._given_up(page))
