"""Random numbers by output position, and the token that they choose.

The noise of a token is a function of (seed, completion, output position, token id) and of nothing else, so that a seed
gives the same output alone, in a batch, after a preemption, and with tokens that a drafter proposed. The token is the
argmax of ``logit / temperature + g`` with one Gumbel number g per token (the Gumbel-max trick): a sample of the exact
distribution. Two distributions under the same noise mostly choose the same token: with probability of at least
(1 - TV) / (1 + TV), TV their total variation distance (Daliri et al. 2024, arXiv:2408.07978).

The hash is SplitMix64 (Steele et al. 2014), which passes BigCrush, at random places of its sequence: integer
arithmetic, so the same bits on every machine and device.

Shape suffixes: R rows, V vocabulary, H hashes, N some tokens.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from hashlib import blake2b
from typing import TypeVar

import numpy as np
import torch

from .selection import on_host

NO_TOKEN = -1
_Integers = TypeVar("_Integers", np.ndarray, torch.Tensor)
_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLY_1, _MULTIPLY_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_FINE = 0xD1B54A32D192ED03  # apart from 0, where a position's numbers begin
# Of a distribution's winner, the exponential number over the token's probability is itself exponential with mean 1: it
# exceeds this once in 10^14 times.
_LONGEST_RACE = 32.0
_LIMIT = np.float32(1.03 * _LONGEST_RACE * 2**16)  # with a margin for rounding, in units of the upper 16 bits
_FEW = 2048  # tokens whose noise is computed without looking for candidates first


class Draws:
    """The random numbers of one completion. Nothing is used up: a position has the same numbers whenever it is asked.

    Arguments:
        seed: what the request's seed is made of.
        completion: its number.
    """

    __slots__ = ("_key",)

    def __init__(self, seed: tuple[int, ...], completion: int) -> None:
        words = [word & _MASK for word in (*seed, completion)]
        digest = blake2b(struct.pack(f"<{len(words)}Q", *words), digest_size=8).digest()
        self._key = int.from_bytes(digest, "little")

    def peek(self, position: int) -> int:
        """The key, 64 bits, of the noise at an output position."""
        z = (self._key + _GAMMA * (position + 1)) & _MASK
        z = ((z ^ (z >> 30)) * _MULTIPLY_1) & _MASK
        z = ((z ^ (z >> 27)) * _MULTIPLY_2) & _MASK
        return z ^ (z >> 31)


def choose_tokens(scaled_RV: torch.Tensor, weights_RV: torch.Tensor, keys: list[int]) -> list[int]:
    """The token of each row with the largest sum of logit and noise, the lowest id among equals.

    Arguments:
        scaled_RV: logits over temperature, float32.
        weights_RV: their softmax, float32; 0 for tokens that a filter took out.
        keys: of each row's noise (:meth:`Draws.peek`).

    Returns: token ids; ``NO_TOKEN`` for rows whose logits are not numbers.
    """
    keys_R = keys_tensor(keys, scaled_RV.device)
    if on_host(scaled_RV):
        return _choose_among_few(scaled_RV.numpy(), weights_RV.numpy(), keys_R.numpy())
    return choose_among_all(scaled_RV, weights_RV, keys_R).tolist()


def choose_listed(scaled_N: np.ndarray, weights_N: np.ndarray, key: int, ids_N: np.ndarray) -> int:
    """:func:`choose_tokens` for a row of which only some tokens, by rising id, are given."""
    kept = np.flatnonzero(weights_N)
    scores_N = scaled_N[kept] - np.log(exponentials(np.array([key], np.uint64).view(np.int64), ids_N[kept]))
    best = kept[int(scores_N.argmax())] if len(kept) else 0
    return int(ids_N[best]) if weights_N[best] > 0 else NO_TOKEN  # NaN is not


def keys_tensor(keys: list[int], device: torch.device) -> torch.Tensor:
    """Keys of 64 bits as int64, (R,)."""
    return torch.from_numpy(np.array(keys, dtype=np.uint64).view(np.int64)).to(device)


def choose_among_all(scaled_RV: torch.Tensor, weights_RV: torch.Tensor, keys_R: torch.Tensor) -> torch.Tensor:
    """:func:`choose_tokens` with the noise of all tokens, int64, (R,); nothing waits for the device."""
    ids_V = torch.arange(scaled_RV.shape[1], device=scaled_RV.device)
    uniform_RV = _uniform_bits(keys_R[:, None], ids_V).double() * 2.0**-53
    scores_RV = scaled_RV.double() - uniform_RV.neg_().log1p_().neg_().log_()
    scores_RV.masked_fill_(weights_RV == 0, -torch.inf)
    best_R1 = scores_RV.amax(-1, keepdim=True)
    tokens_R = torch.where(scores_RV == best_R1, ids_V, scaled_RV.shape[1] - 1).amin(-1)
    return torch.where(weights_RV.gather(1, tokens_R[:, None])[:, 0] > 0, tokens_R, NO_TOKEN)


def _choose_among_few(scaled_RV: np.ndarray, weights_RV: np.ndarray, keys_R: np.ndarray) -> list[int]:
    """:func:`choose_tokens`, with logarithms of few candidates only where a row has many tokens.

    A token wins if its exponential number E over its weight w is the least. E is at least the uniform number u that it
    is made of: where u > c w, E / w > c. Once a token with E / w <= c is found, none of those can win.
    """
    coarse = _CoarseBits(weights_RV.shape[1])
    candidates: list[np.ndarray] = []
    partial: list[int] = []  # rows with more tokens than candidates
    for row, (weights_V, key) in enumerate(zip(weights_RV, keys_R, strict=True)):
        kept_V = weights_V != 0
        if np.count_nonzero(kept_V) > _FEW:
            candidates.append(coarse.below(key, weights_V))
            partial.append(row)
        else:
            candidates.append(np.flatnonzero(kept_V))
    tokens, races = _winners(scaled_RV, weights_RV, keys_R, candidates)
    for row in partial:
        if not races[row] <= _LONGEST_RACE:
            one, kept = slice(row, row + 1), [np.flatnonzero(weights_RV[row])]
            (tokens[row],), _ = _winners(scaled_RV[one], weights_RV[one], keys_R[one], kept)
    return tokens


def _winners(
    scaled_RV: np.ndarray, weights_RV: np.ndarray, keys_R: np.ndarray, candidates: list[np.ndarray]
) -> tuple[list[int], list[float]]:
    """The best of each row's candidates (token ids, rising), and its exponential number over its weight."""
    sizes = [len(ids) for ids in candidates]
    rows_N, ids_N = np.repeat(np.arange(len(sizes)), sizes), np.concatenate(candidates)
    exponentials_N = exponentials(keys_R[rows_N], ids_N)
    scores_N = scaled_RV[rows_N, ids_N] - np.log(exponentials_N)
    tokens, races, first = [], [], 0
    for row, size in enumerate(sizes):
        best = first + int(scores_N[first : first + size].argmax()) if size else 0
        weight = weights_RV[row, ids_N[best]] if size else 0.0
        found = weight > 0  # NaN is not
        tokens.append(int(ids_N[best]) if found else NO_TOKEN)
        races.append(float(exponentials_N[best] / weight) if found else np.inf)
        first += size
    return tokens, races


def exponentials(keys: np.ndarray, ids_N: np.ndarray) -> np.ndarray:
    """Exponential numbers with mean 1 of some tokens, float64; minus their logarithms are Gumbel numbers.

    Arguments:
        keys: int64, of a shape that broadcasts with ``ids_N``.
        ids_N: token ids, int64.
    """
    return -np.log1p(_uniform_bits(keys, ids_N) * -(2.0**-53))


def _uniform_bits(keys: _Integers, ids_N: _Integers) -> _Integers:
    """Whole numbers, 1 to 2^53 - 1: the uniform numbers of some tokens, in units of 2^-53.

    Four tokens share a hash, each has 16 bits of it, the lowest first. The other 37 bits come from a hash of its own.
    """
    coarse = (_mixed(keys + _signed(_GAMMA) * (ids_N >> 2)) >> ((ids_N & 3) << 4)) & 0xFFFF
    fine = _mixed((keys ^ _signed(_FINE)) + _signed(_GAMMA) * ids_N) >> 27 & ((1 << 37) - 1)
    return coarse << 37 | fine | 1


def _mixed(z: _Integers) -> _Integers:
    """SplitMix64's output function of int64 numbers, in place. Shifts fill with zeros."""
    for shift, factor in ((30, _MULTIPLY_1), (27, _MULTIPLY_2)):
        z ^= (z >> shift) & (_MASK >> shift)
        z *= _signed(factor)
    z ^= (z >> 31) & (_MASK >> 31)
    return z


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


class _CoarseBits:
    """The upper 16 bits of the uniform numbers of a whole vocabulary, with numpy, whose integers are vectorised."""

    def __init__(self, vocabulary: int) -> None:
        hashes = -(-vocabulary // 4)
        self._z_H = np.empty(hashes, dtype=np.uint64)
        self._shifted_H = np.empty(hashes, dtype=np.uint64)
        self._bits_V = np.empty(vocabulary, dtype=np.float32)

    def below(self, key: np.int64, weights_V: np.ndarray) -> np.ndarray:
        """All tokens whose uniform number is below their weight times the longest race, and few others."""
        z_H, shifted_H = self._z_H, self._shifted_H
        np.add(_steps(len(z_H)), key.view(np.uint64), out=z_H)
        for shift, factor in ((30, _MULTIPLY_1), (27, _MULTIPLY_2), (31, None)):
            np.right_shift(z_H, np.uint64(shift), out=shifted_H)
            np.bitwise_xor(z_H, shifted_H, out=z_H)
            if factor is not None:
                np.multiply(z_H, np.uint64(factor), out=z_H)
        self._bits_V[:] = z_H.view(np.uint16)[: len(self._bits_V)]
        return np.flatnonzero(self._bits_V < weights_V * _LIMIT)


@lru_cache(maxsize=4)
def _steps(hashes: int) -> np.ndarray:
    return np.arange(hashes, dtype=np.uint64) * np.uint64(_GAMMA)
