"""Tests which settings have a risk below a level: p-values, upper bounds, fixed-sequence testing.

The unit is a request: its loss is one number in [0, 1]; requests are exchangeable, tokens are not. Settings lie on one
path that was fixed before any loss was seen, from the safest (full compute) to the boldest.

A setting may come with several means at once, those of outputs cut at one length after the other. It is proved where
each of them is: all of its nulls must be rejected, so the largest p-value counts, and nothing is paid for their number.

Shape suffixes: M settings, safest first; K means of a setting; N requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

PValues = Callable[[np.ndarray, float, float], np.ndarray]


def hoeffding_bentkus(losses_MN: np.ndarray, alpha: float, delta: float) -> np.ndarray:
    """P-values of "the risk exceeds ``alpha``" for losses in [0, 1], (M,).

    The smaller of Hoeffding's bound in its relative-entropy form and Bentkus' e · BinomCDF (Bates et al. 2021;
    Angelopoulos et al. 2021, Learn then Test). ``delta`` does not enter.
    """
    from scipy.stats import binom  # imported lazily: serving contracts does not need it

    means_M, count = _means(losses_MN)
    entropy_M = _relative_entropy(np.minimum(means_M, alpha), alpha)
    bentkus_M = np.e * binom.cdf(_ceil(count * means_M), count, alpha)
    return np.minimum(1.0, np.minimum(np.exp(-count * entropy_M), bentkus_M))


def exact_binomial(losses_MN: np.ndarray, alpha: float, delta: float) -> np.ndarray:
    """P-values of "the risk exceeds ``alpha``" for losses that are 0 or 1, (M,). ``delta`` does not enter.

    Raises:
        ValueError: for a loss in between.
    """
    from scipy.stats import binom

    losses_MN = np.atleast_2d(losses_MN)
    if not np.isin(losses_MN, (0, 1)).all():
        raise ValueError("the exact binomial bound is for losses that are 0 or 1")
    return binom.cdf(losses_MN.sum(1), losses_MN.shape[1], alpha)


def betting(losses_MN: np.ndarray, alpha: float, delta: float) -> np.ndarray:
    """P-values of "the risk exceeds ``alpha``" by betting against it, (M,) (Waudby-Smith & Ramdas 2024).

    One over the greatest wealth of bets on losses below ``alpha``, with stakes optimised for ``delta``. A setting is
    safe at ``delta`` exactly where :func:`betting_bound` is at most ``alpha``.
    """
    return np.exp(-np.maximum(0.0, _log_wealth(np.atleast_2d(losses_MN), np.asarray(alpha), delta)))


def betting_bound(losses_N: np.ndarray, delta: float) -> float:
    """The upper bound on the risk that holds with probability 1 - ``delta``: the level at which the bets of
    :func:`betting` reach a wealth of 1 / ``delta``."""
    low, high = float(np.mean(losses_N)), 1.0
    losses_MN = np.atleast_2d(losses_N)
    if _log_wealth(losses_MN, np.asarray(high), delta)[0] < np.log(1 / delta):
        return 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if _log_wealth(losses_MN, np.asarray(middle), delta)[0] >= np.log(1 / delta):
            high = middle
        else:
            low = middle
    return high


BOUNDS: dict[str, PValues] = {
    "hoeffding_bentkus": hoeffding_bentkus,
    "exact_binomial": exact_binomial,
    "wsr": betting,
}


def learn_then_test(losses: np.ndarray, alpha: float, delta: float, bound: str = "wsr") -> int | None:
    """The boldest setting whose risk is at most ``alpha`` with probability 1 - ``delta``, by fixed-sequence testing.

    Tests settings from the safest on and stops at the first whose p-value exceeds ``delta``; later settings are not
    considered. No monotonicity is needed.

    Arguments:
        losses: (M, N), or (M, K, N) of settings that hold where all of their K means do.

    Returns: the last setting before the stop; None when not even the first passes, which leaves full compute.

    Raises:
        ValueError: for a level outside (0, 1), a loss outside [0, 1], no requests, an unknown bound.
    """
    losses_MKN = _checked(losses)
    check_levels(alpha=alpha, delta=delta)
    if bound not in BOUNDS:
        raise ValueError(f"unknown bound {bound!r}; known: {', '.join(BOUNDS)}")
    passed = 0
    while passed < len(losses_MKN) and BOUNDS[bound](losses_MKN[passed], alpha, delta).max() <= delta:
        passed += 1
    return passed - 1 if passed else None


def requests_needed(alpha: float, delta: float, risk: float = 0.0) -> int:
    """About how many requests prove a level where the risk is ``risk``: ln(1 / delta) / (alpha - risk).

    No stake is above 1, so that a request without any loss multiplies the wealth by at most 1 + alpha: even at no risk
    fewer requests prove nothing.
    """
    assert risk < alpha, "no number of requests proves a level below the risk"
    return math.ceil(math.log(1 / delta) / (alpha - risk))


def conformal_risk_control(losses: np.ndarray, alpha: float) -> int | None:
    """The boldest setting such that it and every safer one have a mean loss of at most ``a - (1 - a) / N``, a = alpha.

    For losses that grow along the path the expected loss of a further request is at most ``alpha`` (Angelopoulos et al.
    2024). It does not bound how often a calibration errs: there is no ``delta``.

    Returns: as for :func:`learn_then_test`.
    """
    losses_MKN = _checked(losses)
    check_levels(alpha=alpha)
    means_M, count = losses_MKN.mean(2).max(1), losses_MKN.shape[2]
    passed_M = means_M <= alpha - (1 - alpha) / count
    stop = len(passed_M) if passed_M.all() else int(np.argmin(passed_M))
    return stop - 1 if stop else None


def check_levels(**levels: float) -> None:
    """Refuse levels outside (0, 1).

    Raises:
        ValueError: naming the first one.
    """
    for name, value in levels.items():
        if not 0 < value < 1:
            raise ValueError(f"{name} must be between 0 and 1, not {value}")


def _checked(losses: np.ndarray) -> np.ndarray:
    losses = np.atleast_2d(np.asarray(losses, dtype=np.float64))
    losses_MKN = losses if losses.ndim == 3 else losses[:, None]
    if losses_MKN.shape[2] == 0:
        raise ValueError("there are no requests to test on")
    if not ((losses_MKN >= 0) & (losses_MKN <= 1)).all():
        raise ValueError("losses must lie between 0 and 1")
    return losses_MKN


def _means(losses_MN: np.ndarray) -> tuple[np.ndarray, int]:
    losses_MN = np.atleast_2d(losses_MN)
    return losses_MN.mean(1), losses_MN.shape[1]


def _ceil(values: np.ndarray) -> np.ndarray:
    """Rounded up, ignoring rounding errors above a whole number."""
    return np.ceil(values - 1e-9)


def _relative_entropy(a: np.ndarray, b: float) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        first = np.where(a > 0, a * np.log(a / b), 0.0)
        second = np.where(a < 1, (1 - a) * np.log((1 - a) / (1 - b)), 0.0)
    return first + second


def _log_wealth(losses_MN: np.ndarray, alpha: np.ndarray, delta: float) -> np.ndarray:
    """The greatest log wealth of each setting's bets, (M,). A stake depends on earlier losses only."""
    count = losses_MN.shape[1]
    seen_N = np.arange(1, count + 1)
    means_MN = (0.5 + losses_MN.cumsum(1)) / (1 + seen_N)
    variances_MN = (0.25 + ((losses_MN - means_MN) ** 2).cumsum(1)) / (1 + seen_N)
    before_MN = np.concatenate((np.full((len(losses_MN), 1), 0.25), variances_MN[:, :-1]), 1)
    stakes_MN = np.minimum(1.0, np.sqrt(2 * np.log(1 / delta) / (count * before_MN)))
    with np.errstate(divide="ignore"):
        steps_MN = np.log1p(-stakes_MN * (losses_MN - alpha))
    return steps_MN.cumsum(1).max(1)
