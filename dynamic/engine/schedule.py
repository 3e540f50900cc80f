"""A step's work: which tokens of which sequences run."""

from __future__ import annotations

from dataclasses import dataclass, field

from .request import Sequence


@dataclass(slots=True)
class Entry:
    """Tokens ``start : start + count`` of a sequence run in this step.

    Arguments:
        kept: (position, slot): the recurrent states in front of that position are kept in that slot.
    """

    sequence: Sequence
    start: int
    count: int
    kept: tuple[tuple[int, int], ...] = ()

    @property
    def samples(self) -> bool:
        """Whether the step computes the last known token, so that the next one can be sampled."""
        return self.start + self.count == self.sequence.num_tokens


@dataclass(slots=True)
class Schedule:
    """One step's work.

    Arguments:
        copies: (from page, to page), before anything else runs.
        state_copies: the same for recurrent states: (from slot, to slot).
        window_copies: the same as ``copies`` for each group of layers with a window of its own.
        decoding: where every running sequence decodes one token and nothing else runs: a number that stays the same as
            long as they are the same sequences.
    """

    entries: list[Entry] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    state_copies: list[tuple[int, int]] = field(default_factory=list)
    window_copies: list[list[tuple[int, int]]] = field(default_factory=list)
    decoding: int | None = None
