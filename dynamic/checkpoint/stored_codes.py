"""Codes of 4 bits in words of 32, and groups of inputs: what of them belongs to some of a weight's outputs or inputs.

Shape suffixes: O outputs, I inputs, G groups of inputs, W words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels.api.formats import GROUPS, pack_int4, unpack_int4

NIBBLES = 8  # codes of 4 bits in a word


def width(part: slice) -> int:
    """How many things a part has."""
    return part.stop - part.start


def words_of(codes: slice, per_word: int = NIBBLES) -> slice:
    """The words that hold some codes."""
    return slice(codes.start // per_word, -(-codes.stop // per_word))


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """(…, W) words of 32 bits → (…, 8 W) codes, the lowest bits first, uint8."""
    return unpack_int4(words.contiguous().view(torch.uint8))


def from_first_word(codes: torch.Tensor, kept: slice) -> torch.Tensor:
    """The codes that are wanted of those of the words that hold them."""
    first = kept.start % NIBBLES
    return codes[..., first : first + width(kept)]


def some_nibbles(words: torch.Tensor, kept: slice) -> torch.Tensor:
    """Codes of some of a dimension that is in words, from those that :func:`words_of` names."""
    return from_first_word(nibbles(words), kept)


def packed_inputs(words_OW: torch.Tensor, kept: slice) -> torch.Tensor:
    """Codes of some inputs two to a byte, from the words that hold them."""
    if kept.start % NIBBLES or width(kept) % 2:
        return pack_int4(some_nibbles(words_OW, kept))
    return words_OW.contiguous().view(torch.uint8)[:, : width(kept) // 2]


@dataclass(frozen=True, kw_only=True)
class Groups:
    """How the groups of some inputs lie.

    Arguments:
        theirs, ours: inputs per group as stored, and as our format has them: groups are cut where it has no such size,
            or where the inputs do not begin with a group.
        stored: the groups that the inputs are in.
        index_G: which of those each of ours is in.
    """

    theirs: int
    ours: int
    stored: slice
    index_G: torch.Tensor

    def spread(self, values_OG: torch.Tensor) -> torch.Tensor:
        """Values of the stored groups for each of ours."""
        return values_OG[:, self.index_G]


def groups_of(theirs: int, inputs: slice, total: int) -> Groups:
    """The groups of some inputs.

    Arguments:
        theirs: inputs per group.
        inputs: begin in the middle of a group only where it is all inputs, or at a multiple of 32.
        total: all inputs.
    """
    sizes = (theirs, *reversed(GROUPS)) if theirs in GROUPS else tuple(reversed(GROUPS))
    ours = next(g for g in sizes if theirs >= total or (theirs % g == 0 and inputs.start % g == 0))
    stored = slice(inputs.start // theirs, -(-inputs.stop // theirs))
    index_G = torch.arange(inputs.start, inputs.stop, ours) // theirs - stored.start
    return Groups(theirs=theirs, ours=ours, stored=stored, index_G=index_G)
