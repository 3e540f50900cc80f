"""How things are shared out among ranks: heads, neurons, experts, tokens of the vocabulary."""

from __future__ import annotations


def part_of(total: int, parts: int, part: int) -> slice:
    """The ``part``-th of ``parts`` nearly equal runs of ``total`` things; the first ones are the larger."""
    size, larger = divmod(total, parts)
    start = part * size + min(part, larger)
    return slice(start, start + size + (part < larger))


def width(part: slice) -> int:
    """How many things a part has."""
    return part.stop - part.start
