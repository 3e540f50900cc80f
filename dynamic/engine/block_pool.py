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
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._empty = list(range(num_pages - 1, -1, -1))
        self._findable: OrderedDict[int, None] = OrderedDict()  # free pages with a digest, longest released first
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._approximate: set[int] = set()

    @property
    def num_free(self) -> int:
        """Pages that ``allocate`` can hand out."""
        return len(self._empty) + len(self._findable)

    def references(self, page: int) -> int:
        """How many sequences hold a page."""
        return self._references[page]

    def allocate(self) -> int:
        """A page with one reference; its content is undefined. There must be a free one."""
        if self._empty:
            page = self._empty.pop()
        else:
            page, _ = self._findable.popitem(last=False)
            del self._page_of[self._digest_of.pop(page)]
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
            del self._findable[page]
        self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder less for each page, in order: the pages named first are forgotten first."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is released but nobody holds it"
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._digest_of:
                    self._findable[page] = None
                else:
                    self._empty.append(page)

    def find(self, digest: bytes) -> int | None:
        """The page with this content, held or free."""
        return self._page_of.get(digest)

    def publish(self, page: int, digest: bytes) -> None:
        """Let a held page be found by its content. The first page with a content keeps the name."""
        assert self._references[page] > 0
        assert page not in self._approximate, f"page {page} is approximate and cannot be found"
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def forget_contents(self) -> None:
        """No page can be found any more; free ones become empty."""
        self._empty.extend(self._findable)
        self._findable.clear()
        self._page_of.clear()
        self._digest_of.clear()
