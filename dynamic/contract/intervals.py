"""Estimates with 95 % bootstrap intervals over requests: requests are exchangeable, tokens are not.

Where every value is 0, or every value is 1, a bootstrap would give an interval of no width. There the interval ends
where so many equal values would be a matter of 2.5 %.

Shape suffix: N requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 4000
_TAIL = 0.025


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and the 95 % interval around it."""

    value: float
    low: float
    high: float


def mean(values_N: np.ndarray) -> Estimate:
    """Mean over requests."""
    values_N = np.asarray(values_N, dtype=np.float64)
    found = ratio(values_N, np.ones(len(values_N)))
    if found.low != found.high or found.value not in (0.0, 1.0):
        return found
    reach = 1 - _TAIL ** (1 / len(values_N))
    return Estimate(value=found.value, low=max(0.0, found.low - reach), high=min(1.0, found.high + reach))


def ratio(
    over_N: np.ndarray, under_N: np.ndarray, transform: Callable[[np.ndarray], np.ndarray] | None = None
) -> Estimate:
    """Sum of one amount over the sum of another, both counted by request.

    Arguments:
        transform: increasing function of the ratio, on arrays: ``numpy.exp`` turns log-likelihoods into a perplexity.

    Raises:
        ValueError: when there is nothing to divide by.
    """
    over_N, under_N = np.asarray(over_N, dtype=np.float64), np.asarray(under_N, dtype=np.float64)
    if not under_N.sum() > 0:
        raise ValueError("there is nothing to divide by: no request counts")
    value = over_N.sum() / under_N.sum()
    resampled = np.random.default_rng(0).integers(len(over_N), size=(_RESAMPLES, len(over_N)))
    below = under_N[resampled].sum(1)
    drawn = over_N[resampled].sum(1)[below > 0] / below[below > 0]
    low, high = np.quantile(drawn, (_TAIL, 1 - _TAIL))
    ends = np.array((value, min(low, value), max(high, value)))
    value, low, high = (ends if transform is None else transform(ends)).tolist()
    return Estimate(value=value, low=low, high=high)


def paired_difference(first_N: np.ndarray, second_N: np.ndarray) -> Estimate:
    """Mean over requests of the second minus the first.

    Raises:
        ValueError: when their lengths differ.
    """
    if len(first_N) != len(second_N):
        raise ValueError(f"{len(first_N)} and {len(second_N)} requests cannot be paired")
    return ratio(np.asarray(second_N) - np.asarray(first_N), np.ones(len(first_N)))
