"""Slots for the recurrent states of running sequences: one each, whatever their length."""

from __future__ import annotations

NO_SLOT = -1


class StateSlots:
    """Says which slots are free, and which are copied before the next step.

    What a slot held before does not matter: a sequence whose first row is at position 0 begins with states of zero.

    Arguments:
        num_slots: as many as sequences run at a time.
    """

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots - 1, -1, -1))
        self._copies: dict[int, int] = {}  # to slot → from slot

    def take(self) -> int:
        """A free slot. There must be one."""
        return self._free.pop()

    def take_copy(self, source: int) -> int:
        """A free slot that will hold what is in ``source`` now, which may be no slot of a running sequence."""
        slot = self.take()
        self._copies[slot] = source
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back; copies of it that are due are made before it is written again."""
        self._copies.pop(slot, None)
        self._free.append(slot)

    def copies(self) -> list[tuple[int, int]]:
        """(From slot, to slot), to be made before the next step; asked once per step."""
        copies, self._copies = self._copies, {}
        return [(source, slot) for slot, source in copies.items()]
