"""Codes of 4 bits in words of 32: those of some of a weight's outputs or inputs.

Shape suffixes: O outputs, W words.
"""

from __future__ import annotations

import torch

from ...kernels.api.codes import pack_int4, unpack_int4

NIBBLES = 8  # codes of 4 bits in a word


def width(part: slice) -> int:
    """The length of a part."""
    return part.stop - part.start


def words_of(codes: slice, per_word: int = NIBBLES) -> slice:
    """The words that hold some codes."""
    return slice(codes.start // per_word, -(-codes.stop // per_word))


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """(…, W) words of 32 bits → (…, 8 W) codes, the lowest bits first, uint8."""
    return unpack_int4(words.contiguous().view(torch.uint8))


def from_first_word(codes: torch.Tensor, kept: slice) -> torch.Tensor:
    """Selects the wanted codes from all codes of the words that hold them."""
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
