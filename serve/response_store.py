"""Finished responses that clients asked to keep, in memory and within bounds; each belongs to the key that made it."""

from __future__ import annotations

import json
import secrets
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One response, and the conversation up to its end as messages of a chat, without instructions."""

    answer: dict[str, Any]
    messages: Sequence[dict[str, Any]]
    size: int


def new_response_id() -> str:
    """An id that nobody can guess: 192 random bits."""
    return f"resp_{secrets.token_hex(24)}"


class ResponseStore:
    """Keeps the newest responses. Where there is no more room, the oldest of the owner who uses the most give way. Safe
    to use from several threads.

    Arguments:
        max_count, max_bytes: of all responses together.
    """

    def __init__(self, max_count: int, max_bytes: int) -> None:
        self._max_count, self._max_bytes = max_count, max_bytes
        self._lock = threading.Lock()
        self._owners: dict[str | None, OrderedDict[str, StoredResponse]] = {}
        self._sizes: dict[str | None, int] = {}
        self.count = self.size = 0

    def put(self, owner: str | None, answer: dict[str, Any], messages: Sequence[dict[str, Any]], size: int = 0) -> None:
        """Keep a response; one that alone is larger than the store is not kept.

        Arguments:
            size: of the messages, in bytes.
        """
        stored = StoredResponse(answer, messages, size_of(answer) + size)
        if stored.size > self._max_bytes:
            return
        with self._lock:
            self._owners.setdefault(owner, OrderedDict())[answer["id"]] = stored
            self._account(owner, stored.size, 1)
            while self.count > self._max_count or self.size > self._max_bytes:
                largest = max(self._sizes, key=lambda name: self._sizes[name])
                self._remove(largest, next(iter(self._owners[largest])))

    def get(self, owner: str | None, response_id: str) -> StoredResponse | None:
        """A response of this owner; None where there is none."""
        with self._lock:
            return self._owners.get(owner, {}).get(response_id)

    def delete(self, owner: str | None, response_id: str) -> bool:
        """Forget a response of this owner; False where there is none."""
        with self._lock:
            known = response_id in self._owners.get(owner, {})
            if known:
                self._remove(owner, response_id)
            return known

    def _remove(self, owner: str | None, response_id: str) -> None:
        stored = self._owners[owner].pop(response_id)
        self._account(owner, -stored.size, -1)
        if not self._owners[owner]:
            del self._owners[owner], self._sizes[owner]

    def _account(self, owner: str | None, size: int, count: int) -> None:
        self._sizes[owner] = self._sizes.get(owner, 0) + size
        self.size += size
        self.count += count


def size_of(value: Any) -> int:
    """Bytes of a JSON value as text."""
    return len(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
