"""Copies of recurrent states behind beginnings of sequences, from which others with the same beginning go on."""

from __future__ import annotations

from collections import OrderedDict

LEAST_STRIDE = 16  # pages


class StateSnapshots:
    """Which slots hold the states behind which pages; those that were not used for longest are given up first.

    A slot is taken when the step that writes it is scheduled, and can be found when that step has run. What is found
    is copied before anything else of the next step, so that it may be given up at once.

    Arguments:
        slots: numbers of the slots, beside those of running sequences.
        page_size: tokens per page.
        longest: tokens that one sequence may have. It keeps states every so many pages that no more than half of the
            slots go to it.
    """

    def __init__(self, slots: range, page_size: int, longest: int) -> None:
        self._free = list(slots)
        self._slot_of: OrderedDict[tuple[int, bytes], int] = OrderedDict()  # by KV shard and digest
        self.stride = page_size * max(LEAST_STRIDE, -(-longest // (page_size * max(1, len(slots) // 2))))

    def find(self, kv_shard: int, digest: bytes) -> int | None:
        """The slot with the states behind a page of this content in a KV shard."""
        slot = self._slot_of.get((kv_shard, digest))
        if slot is not None:
            self._slot_of.move_to_end((kv_shard, digest))
        return slot

    def take(self) -> int | None:
        """A slot to write to; None where all are being written."""
        if self._free:
            return self._free.pop()
        return self._slot_of.popitem(last=False)[1] if self._slot_of else None

    def publish(self, slot: int, kv_shard: int, digest: bytes) -> None:
        """Let the states in a slot that was taken be found. The first slot with a content keeps the name."""
        if self._slot_of.setdefault((kv_shard, digest), slot) != slot:
            self.release(slot)

    def release(self, slot: int) -> None:
        """Give back a slot that was taken."""
        self._free.append(slot)

    def forget(self, kv_shard: int, digest: bytes) -> None:
        """Give up the states behind a page, if they are still there."""
        slot = self._slot_of.pop((kv_shard, digest), None)
        if slot is not None:
            self._free.append(slot)
