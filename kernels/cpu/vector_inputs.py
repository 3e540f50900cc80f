"""Numbers, places and parts that the kernels' test vectors are made of (:mod:`.vectors`).

Shape suffixes as in ``kernels/api/types.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ..api.kv_codes import stored_channels
from ..api.types import AttentionBatch, KVLayer, ProbeWeights

EPS = 1e-5


class Numbers:
    """A stream of numbers that depends on nothing but how many were taken (splitmix64)."""

    def __init__(self) -> None:
        self._taken = 0

    def _words(self, shape: Sequence[int]) -> np.ndarray:
        count = math.prod(shape)
        z = np.arange(self._taken + 1, self._taken + count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        self._taken += count
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (z ^ (z >> np.uint64(31))).reshape(shape)

    def floats(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """float32, evenly spread over -scale … scale."""
        values = (self._words(shape) >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0
        return torch.from_numpy((values * scale).astype(np.float32))

    def whole(self, below: int, *shape: int) -> torch.Tensor:
        """int64, 0 … below - 1."""
        return torch.from_numpy((self._words(shape) % np.uint64(below)).astype(np.int64))


def rotations(channels: int, length: int) -> torch.Tensor:
    """A table of numbers in place of cosines and sines: no library computes it."""
    return Numbers().floats(length, channels)


def places(lengths: Sequence[int], rows: Sequence[int], page: int) -> AttentionBatch:
    """The last ``rows`` tokens of contexts of ``lengths``, in pages that lie in falling order."""
    pages = [-(-length // page) for length in lengths]
    firsts = np.cumsum([0, *pages])
    table_SM = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
    positions, slots = [], []
    for s, (length, count) in enumerate(zip(lengths, rows, strict=True)):
        table_SM[s, : pages[s]] = torch.arange(int(firsts[s + 1]) - 1, int(firsts[s]) - 1, -1)
        place = torch.arange(length - count, length)
        positions.append(place)
        slots.append(table_SM[s][place // page].long() * page + place % page)
    return AttentionBatch(
        positions_T=torch.cat(positions),
        slots_T=torch.cat(slots),
        query_start_S1=torch.tensor([0, *np.cumsum(rows)], dtype=torch.int32),
        context_len_S=torch.tensor(list(lengths), dtype=torch.int32),
        block_table_SM=table_SM,
        max_query_len=max(rows),
        max_context_len=max(lengths),
    )


def cache(lengths: Iterable[int], page: int, kv_heads: int, channels: int, dtype: torch.dtype) -> KVLayer:
    pages = sum(-(-length // page) for length in lengths)
    keys, values = (torch.zeros(pages, kv_heads, page, stored_channels(channels, dtype), dtype=dtype) for _ in range(2))
    return KVLayer(keys_BGPC=keys, values_BGPC=values)


def probe(numbers: Numbers, hidden: int, inner: int, previous: bool, entropy: bool) -> ProbeWeights:
    inputs = hidden * (1 + previous) + entropy
    return ProbeWeights(
        weight_JX=numbers.floats(max(inner, 1), inputs, scale=inputs**-0.5),
        bias_J=numbers.floats(max(inner, 1)),
        out_J=numbers.floats(inner) if inner else None,
        out_bias=numbers.floats(1)[0].clone() if inner else None,
        previous=previous,
        router_entropy=entropy,
    )


def thresholds(numbers: Numbers, *shape: int) -> torch.Tensor:
    """Of which some keep a row for sure, and some let it go."""
    thresholds, kind = numbers.floats(*shape, scale=2), numbers.whole(5, *shape)
    return thresholds.masked_fill(kind == 0, math.inf).masked_fill(kind == 1, -math.inf)
