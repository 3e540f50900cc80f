"""Which tokens a prompt and its output hold: what penalties look at."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np


class TokenCounts:
    """The distinct tokens of a prompt and its output, and how often the output holds each."""

    def __init__(self, prompt_token_ids: Sequence[int]) -> None:
        distinct = np.unique(np.asarray(prompt_token_ids, dtype=np.int64))
        self._place = {token: i for i, token in enumerate(distinct.tolist())}
        self._ids = distinct
        self._counts = np.zeros(len(distinct), dtype=np.float32)
        self._size = self._num_prompt = len(distinct)
        self._output = array("i")

    def add(self, token_id: int) -> None:
        """Count one more output token."""
        place = self._place.setdefault(token_id, self._size)
        if place == self._size:
            if self._size == len(self._ids):
                room = max(64, self._size)
                self._ids = np.concatenate([self._ids, np.zeros(room, np.int64)])
                self._counts = np.concatenate([self._counts, np.zeros(room, np.float32)])
            self._ids[place], self._counts[place] = token_id, 0.0
            self._size += 1
        self._counts[place] += 1.0
        self._output.append(token_id)

    def remove_last(self) -> None:
        """Take the newest output token back."""
        token_id = self._output.pop()
        place = self._place[token_id]
        self._counts[place] -= 1.0
        if self._counts[place] == 0 and place >= self._num_prompt:  # then it is the one that was found last
            del self._place[token_id]
            self._size -= 1

    def copy(self) -> TokenCounts:
        """Counts that go their own way from here."""
        other = TokenCounts(())
        other._place, other._ids, other._counts = self._place.copy(), self._ids.copy(), self._counts.copy()
        other._size, other._num_prompt, other._output = self._size, self._num_prompt, self._output[:]
        return other

    @property
    def ids(self) -> np.ndarray:
        """Distinct tokens, int64."""
        return self._ids[: self._size]

    @property
    def counts(self) -> np.ndarray:
        """How often the output holds each of ``ids``, float32; 0 for tokens of the prompt alone."""
        return self._counts[: self._size]
