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


def share_heads(num_heads: int, num_groups: int, parts: int, part: int) -> tuple[slice, slice]:
    """Heads and groups of heads of one rank: whole groups, or a part of one where ranks outnumber the groups.

    Raises:
        ValueError: when the heads cannot be shared out like this.
    """
    per_group = num_heads // num_groups
    if parts <= num_groups:
        groups = part_of(num_groups, parts, part)
        return slice(groups.start * per_group, groups.stop * per_group), groups
    if parts % num_groups or parts // num_groups > per_group:
        raise ValueError(
            f"parallel.tensor={parts} does not go with {num_heads} heads in {num_groups} groups: it must be at most "
            f"{num_groups}, or a multiple of it up to {num_heads}"
        )
    group, inner = divmod(part, parts // num_groups)
    heads = part_of(per_group, parts // num_groups, inner)
    first = group * per_group
    return slice(first + heads.start, first + heads.stop), slice(group, group + 1)


def scaled(things: slice, size: int, first: int = 0) -> slice:
    """The rows of some things that have ``size`` rows each, behind ``first`` others."""
    return slice(first + things.start * size, first + things.stop * size)
