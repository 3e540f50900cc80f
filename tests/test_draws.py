"""Random numbers by position: against the hash written in plain integers, and as random numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from dynamoe.dynamic.engine.draws import NO_TOKEN, Draws, choose_among_all, choose_tokens, exponentials
from scipy import stats

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
FINE = 0xD1B54A32D192ED03


def splitmix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def plain_uniform(key: int, token: int) -> float:
    shared = splitmix((key + GAMMA * (token // 4)) & MASK)
    own = splitmix(((key ^ FINE) + GAMMA * token) & MASK)
    return ((shared >> 16 * (token % 4) & 0xFFFF) * 2**37 + (own >> 27 | 1)) / 2**53


def numbers(key: int, count: int) -> np.ndarray:
    return exponentials(np.array([signed(key)]), np.arange(count))


def signed(key: int) -> np.int64:
    return np.uint64(key).view(np.int64)


def test_the_numbers_are_those_of_the_plain_hash() -> None:
    draws = Draws((1, 7), 2)
    for key in (0, MASK, *(draws.peek(position) for position in range(20))):
        expected = [-math.log1p(-plain_uniform(key, token)) for token in range(40)]
        np.testing.assert_allclose(numbers(key, 40), expected, rtol=1e-14)


def test_the_key_of_a_position_never_changes() -> None:
    """What a seed gives is a promise; these were written down once."""
    assert [Draws((1, 7), 2).peek(position) for position in (0, 1, 1000)] == KEYS


KEYS = [6808004597279997490, 13305557058887358594, 12172470809961025797]


def brute_force(scaled_V: np.ndarray, weights_V: np.ndarray, key: int) -> int:
    scores_V = scaled_V.astype(np.float64) - np.log(numbers(key, len(scaled_V)))
    return int(np.where(weights_V > 0, scores_V, -np.inf).argmax())


@pytest.mark.parametrize("vocabulary", [1, 2, 33, 5001, 20_000])  # the last two are searched by candidates
@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0])
def test_the_token_is_the_argmax_over_the_whole_vocabulary(vocabulary: int, spread: float) -> None:
    rng = np.random.default_rng(vocabulary)
    scaled_RV = torch.from_numpy(rng.normal(0, spread, (24, vocabulary)).astype(np.float32))
    weights_RV = scaled_RV.softmax(-1)
    weights_RV[12:, ::2] *= vocabulary == 1  # a filter took every other one out
    weights_RV[23, 1:] *= 1e-6  # no winner among the candidates: those that are left had little weight
    weights_RV[23, 0] = 0.0 if vocabulary > 1 else 1.0
    keys = [Draws((1, 1), 0).peek(position) for position in range(24)]
    expected = [brute_force(*row) for row in zip(scaled_RV.numpy(), weights_RV.numpy(), keys, strict=True)]
    assert choose_tokens(scaled_RV, weights_RV, keys) == expected
    signed_R = torch.tensor([int(signed(key)) for key in keys])
    assert choose_among_all(scaled_RV, weights_RV, signed_R).tolist() == expected


def test_equals_go_to_the_lowest_id_and_rows_without_weight_have_none() -> None:
    keys = [Draws((1, 1), 0).peek(position) for position in range(2)]
    weights_RV = torch.zeros(2, 3000)
    weights_RV[0, 17] = 1.0
    assert choose_tokens(torch.zeros(2, 3000), weights_RV, keys) == [17, NO_TOKEN]


def test_numbers_are_exponential_and_independent() -> None:
    draws = Draws((1, 5), 0)
    table_PV = np.stack([numbers(draws.peek(position), 400) for position in range(500)])
    assert stats.kstest(table_PV.ravel(), "expon").pvalue > 1e-3
    # Next token, another part of the same hash, next position, next completion, next seed.
    uniform_PV = np.exp(-table_PV)
    others = [Draws((1, 5), 1), Draws((1, 6), 0)]
    neighbours = [
        (uniform_PV[:, :-1], uniform_PV[:, 1:]),
        (uniform_PV[:, ::4], uniform_PV[:, 2::4]),
        (uniform_PV[:-1], uniform_PV[1:]),
        *((uniform_PV, np.exp(-np.stack([numbers(o.peek(p), 400) for p in range(500)]))) for o in others),
    ]
    for first, second in neighbours:
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 4 / math.sqrt(first.size)
        squares, _, _ = np.histogram2d(first.ravel(), second.ravel(), bins=10, range=[[0, 1], [0, 1]])
        assert stats.chisquare(squares.ravel()).pvalue > 1e-3


def test_similar_distributions_choose_the_same_token_mostly() -> None:
    rng = np.random.default_rng(0)
    target = rng.normal(0, 2, 4000).astype(np.float32)
    scaled_2V = torch.from_numpy(np.stack([target, target + rng.normal(0, 0.5, 4000).astype(np.float32)]))
    weights_2V = scaled_2V.softmax(-1)
    distance = 0.5 * (weights_2V[0] - weights_2V[1]).abs().sum().item()
    keys = [Draws((1, 1), 0).peek(position) for position in range(2000)]
    pairs = [choose_tokens(scaled_2V, weights_2V, [key, key]) for key in keys]
    agreed = np.mean([a == b for a, b in pairs])
    assert agreed > (1 - distance) / (1 + distance) - 0.03
    assert agreed < 1 - distance + 0.03
