"""Quantised weights as a backend has packed them: what may be kept in a file, to be had again without the weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """One linear layer, or the experts of one layer of a model, without biases.

    Arguments:
        shape: (O, I); of experts (E, F, D).
        words: int32, as the backend packed them: one tensor of a linear layer, two of experts.
        layouts: what the backend knows of each of them, in numbers.
    """

    shape: tuple[int, ...]
    words: tuple[torch.Tensor, ...] = field(repr=False)
    layouts: tuple[tuple[int, ...], ...]

    @property
    def nbytes(self) -> int:
        return sum(words.nbytes for words in self.words)
