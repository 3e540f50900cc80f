"""Which tokens a prompt and its output hold: what penalties look at."""

from __future__ import annotations

import numpy as np

from .sampling_params import SamplingParams


class TokenCounts:
    """The distinct tokens of a prompt and its output, and how often the output holds each."""

    def __init__(self, prompt_token_ids: list[int]) -> None:
        distinct = np.unique(np.asarray(prompt_token_ids, dtype=np.int64))
        self._place = {token: i for i, token in enumerate(distinct.tolist())}
        self._ids = distinct
        self._counts = np.zeros(len(distinct), dtype=np.float32)
        self._size = len(distinct)

    @staticmethod
    def needed(params: SamplingParams) -> bool:
        """Whether a request's penalties look at counts at all."""
        return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0

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

    @property
    def ids(self) -> np.ndarray:
        """Distinct tokens, int64."""
        return self._ids[: self._size]

    @property
    def counts(self) -> np.ndarray:
        """How often the output holds each of ``ids``, float32; 0 for tokens of the prompt alone."""
        return self._counts[: self._size]
