"""Pages of the key/value cache: who holds them, which are free, which free ones still hold something worth finding."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Reference-counted pages, numbered from 0.

    A page whose count falls to zero is free. If its content has a digest, it can still be found and taken back, until
    it is given to somebody else; among such pages, the one that was released longest ago goes first.

    A page is *exact* if it and everything before it in its sequence holds what the full model computes. Others belong
    to one sequence for good: they get no digest and no second holder.

    Arguments:
        num_pages: in all; a multiple of ``kv_shards``.
        kv_shards: so many equal runs of pages lie in different places. A sequence keeps to one of them.
    """

    def __init__(self, num_pages: int, kv_shards: int = 1) -> None:
        assert num_pages % kv_shards == 0, f"{num_pages} pages in {kv_shards} KV shards"
        self.num_pages = num_pages
        self.kv_shards = kv_shards
        self.shard_pages = num_pages // kv_shards
        self._references = [0] * num_pages
        ends = range(self.shard_pages, num_pages + 1, self.shard_pages)
        # By KV shard: pages that hold nothing; free pages with a digest, longest released first; pages by digest.
        self._empty = [list(range(end - 1, end - self.shard_pages - 1, -1)) for end in ends]
        self._findable: list[OrderedDict[int, None]] = [OrderedDict() for _ in ends]
        self._page_of: list[dict[bytes, int]] = [{} for _ in ends]
        self._digest_of: dict[int, bytes] = {}
        self._approximate: set[int] = set()

    @property
    def num_free(self) -> int:
        """Pages that ``allocate`` can hand out, in all KV shards."""
        return sum(map(self.free_in, range(self.kv_shards)))

    def free_in(self, kv_shard: int) -> int:
        """Pages of a KV shard that ``allocate`` can hand out."""
        return len(self._empty[kv_shard]) + len(self._findable[kv_shard])

    def references(self, page: int) -> int:
        """How many sequences hold a page."""
        return self._references[page]

    def allocate(self, kv_shard: int = 0) -> int:
        """A page of a KV shard with one reference; its content is undefined. There must be a free one."""
        if self._empty[kv_shard]:
            page = self._empty[kv_shard].pop()
        else:
            page, _ = self._findable[kv_shard].popitem(last=False)
            del self._page_of[kv_shard][self._digest_of.pop(page)]
        self._references[page] = 1
        self._approximate.discard(page)
        return page

    def is_exact(self, page: int) -> bool:
        """Whether the page was not marked as approximate since it was allocated."""
        return page not in self._approximate

    def mark_approximate(self, page: int) -> None:
        """Say that a page of one sequence holds something else than the full model computes."""
        assert self._references[page] == 1, f"page {page} is shared"
        assert page not in self._digest_of, f"page {page} can be found"
        self._approximate.add(page)

    def retain(self, page: int) -> None:
        """One more holder; takes a findable page back from the free ones."""
        assert page not in self._approximate, f"page {page} is approximate and cannot be shared"
        if self._references[page] == 0:
            del self._findable[page // self.shard_pages][page]
        self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder less for each page, in order: the pages named first are forgotten first."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is released but nobody holds it"
            self._references[page] -= 1
            if self._references[page] == 0:
                kv_shard = page // self.shard_pages
                if page in self._digest_of:
                    self._findable[kv_shard][page] = None
                else:
                    self._empty[kv_shard].append(page)

    def find(self, digest: bytes, kv_shard: int = 0) -> int | None:
        """The page of a KV shard with this content, held or free."""
        return self._page_of[kv_shard].get(digest)

    def can_be_found(self, page: int) -> bool:
        """Whether the page has a digest."""
        return page in self._digest_of

    def forget(self, page: int) -> None:
        """A page that can be found cannot any more; its holders keep it."""
        kv_shard = page // self.shard_pages
        del self._page_of[kv_shard][self._digest_of.pop(page)]
        if self._references[page] == 0:
            del self._findable[kv_shard][page]
            self._empty[kv_shard].append(page)

    def publish(self, page: int, digest: bytes) -> None:
        """Let a held page be found by its content. The first page of its KV shard with a content keeps the name."""
        assert self._references[page] > 0
        assert page not in self._approximate, f"page {page} is approximate and cannot be found"
        page_of = self._page_of[page // self.shard_pages]
        if digest not in page_of and page not in self._digest_of:
            page_of[digest] = page
            self._digest_of[page] = digest
