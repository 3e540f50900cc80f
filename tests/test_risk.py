"""Risk control: bounds against what others compute, the traps of the walk, and that the promises hold."""

from __future__ import annotations

import numpy as np
import pytest
from dynamoe.dynamic.contract.bounds import (
    BOUNDS,
    betting,
    betting_bound,
    conformal_risk_control,
    exact_binomial,
    hoeffding_bentkus,
    learn_then_test,
    requests_needed,
)
from scipy.stats import beta, binom, binomtest


def constant(level: float, count: int = 100) -> np.ndarray:
    """Losses whose mean is ``level``, as 0 and 1 spread evenly."""
    return np.diff(np.floor(level * np.arange(count + 1) + 1e-9))


def test_the_walk_stops_at_the_first_setting_that_fails_and_takes_the_one_before() -> None:
    good, bad = constant(0.0, 400), constant(0.5, 400)
    for bound in BOUNDS:
        assert learn_then_test(np.stack([good, good, bad, good]), 0.05, 0.05, bound) == 1
        assert learn_then_test(np.stack([bad, good]), 0.05, 0.05, bound) is None
        assert learn_then_test(np.stack([good, good]), 0.05, 0.05, bound) == 1
    assert conformal_risk_control(np.stack([good, good, bad, good]), 0.05) == 1
    assert conformal_risk_control(np.stack([bad, good]), 0.05) is None


def test_requests_needed_for_a_risk_of_zero() -> None:
    """(1 - a)^n ≤ d: 30 requests for 10 %, 59 for 5 %, 149 for 2 %, at 95 % confidence."""
    for alpha, needed in ((0.1, 29), (0.05, 59), (0.02, 149)):
        assert learn_then_test(np.zeros((1, needed)), alpha, 0.05, "exact_binomial") == 0
        assert learn_then_test(np.zeros((1, needed - 1)), alpha, 0.05, "exact_binomial") is None
        assert learn_then_test(np.zeros((1, needed + 2)), alpha, 0.05, "hoeffding_bentkus") == 0


def test_conformal_risk_control_counts_the_request_to_come() -> None:
    # 5 of 100: mean 0.05; (100 * 0.05 + 1) / 101 = 0.0594
    assert conformal_risk_control(constant(0.05)[None], 0.0595) == 0
    assert conformal_risk_control(constant(0.05)[None], 0.0593) is None


def test_binary_losses_get_the_exact_bound() -> None:
    losses = np.stack([constant(0.02), constant(0.03), constant(0.04)])
    expected = [binomtest(int(row.sum()), 100, 0.07, alternative="less").pvalue for row in losses]
    np.testing.assert_allclose(exact_binomial(losses, 0.07, 0.05), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="0 or 1"):
        exact_binomial(np.array([[0.5, 0.0]]), 0.1, 0.05)


def test_hoeffding_bentkus_is_the_smaller_of_its_two_parts() -> None:
    for mean in (0.0, 0.02, 0.05, 0.2):
        row = constant(mean, 200)
        a = min(mean, 0.05)
        entropy = (a * np.log(a / 0.05) if a else 0.0) + (1 - a) * np.log((1 - a) / 0.95)
        expected = min(1.0, np.exp(-200 * entropy), np.e * binom.cdf(round(200 * mean), 200, 0.05))
        assert hoeffding_bentkus(row[None], 0.05, 0.05)[0] == pytest.approx(expected, rel=1e-9)
    # A mean whose product with N is a whole number up to rounding is not rounded up to the next one.
    row = np.full((1, 1000), 0.029)
    assert hoeffding_bentkus(row, 0.05, 0.1)[0] <= np.e * binom.cdf(29, 1000, 0.05)


def test_the_betting_bound_and_its_p_value_agree() -> None:
    generator = np.random.default_rng(0)
    for spread in (0.5, 2.0):
        losses = generator.beta(0.05 * spread, 0.95 * spread, 400)
        upper = betting_bound(losses, 0.1)
        assert losses.mean() < upper < 0.2
        assert betting(losses[None], upper + 1e-6, 0.1)[0] <= 0.1
        assert betting(losses[None], upper - 1e-6, 0.1)[0] > 0.1
    assert betting_bound(np.ones(50), 0.05) == 1.0


def test_betting_needs_fewer_requests_than_hoeffding_bentkus_where_losses_hardly_vary() -> None:
    losses = np.full((1, 600), 0.012)
    assert betting(losses, 0.02, 0.05)[0] < 0.05 < hoeffding_bentkus(losses, 0.02, 0.05)[0]


def test_a_setting_is_proved_where_all_of_its_means_are() -> None:
    good, bad = constant(0.01, 400), constant(0.2, 400)
    for bound in BOUNDS:
        assert learn_then_test(np.stack([[good, good], [good, bad]]), 0.05, 0.05, bound) == 0
        assert learn_then_test(np.stack([[bad, good], [good, good]]), 0.05, 0.05, bound) is None
    assert conformal_risk_control(np.stack([[good, good], [good, bad]]), 0.05) == 0


def test_nothing_is_paid_for_the_number_of_means() -> None:
    """However many nulls there are, all of them must be rejected: the level of each stays delta."""
    losses_N = np.random.default_rng(0).beta(0.05, 2.0, 400)
    alone, together = losses_N[None, None], np.repeat(losses_N[None, None], 500, axis=1)
    for alpha in np.linspace(0.01, 0.1, 20):
        assert learn_then_test(alone, alpha, 0.05) == learn_then_test(together, alpha, 0.05)


@pytest.mark.parametrize(("alpha", "least"), [(0.01, 300), (0.001, 2996)])
def test_a_level_needs_a_number_of_requests_even_without_any_loss(alpha: float, least: int) -> None:
    assert requests_needed(alpha, 0.05) == least
    assert learn_then_test(np.zeros((1, int(least * 0.98))), alpha, 0.05) is None
    assert learn_then_test(np.zeros((1, int(least * 1.15))), alpha, 0.05) == 0  # first stakes are small
    assert requests_needed(alpha, 0.05, alpha / 2) == pytest.approx(2 * least, abs=2)


@pytest.mark.parametrize("bound", ["hoeffding_bentkus", "wsr"])
@pytest.mark.parametrize("alpha", [0.02, 0.1])
def test_violations_are_as_rare_as_promised(bound: str, alpha: float) -> None:
    """A path of rising true risks; a calibration errs when it takes a setting whose true risk exceeds alpha."""
    generator, runs, delta = np.random.default_rng(1), 300, 0.1
    risks = alpha * np.array([0.2, 0.5, 0.9, 1.02, 1.05, 1.5])
    violations = 0
    for _ in range(runs):
        losses = beta.rvs(risks[:, None] * 5, (1 - risks[:, None]) * 5, size=(6, 400), random_state=generator)
        chosen = learn_then_test(losses, alpha, delta, bound)
        violations += chosen is not None and risks[chosen] > alpha
    assert violations <= binom.ppf(0.999, runs, delta)


def test_conformal_risk_control_holds_in_the_mean() -> None:
    generator, alpha = np.random.default_rng(2), 0.1
    risks = alpha * np.linspace(0.2, 2.0, 19)
    reached = []
    for _ in range(400):
        losses = (generator.random(200) < risks[:, None]).astype(float)  # one draw per request: grows along the path
        chosen = conformal_risk_control(losses, alpha)
        reached.append(0.0 if chosen is None else risks[chosen])
    assert np.mean(reached) <= alpha + 2 * np.std(reached) / np.sqrt(len(reached))


@pytest.mark.parametrize(
    ("losses", "alpha", "delta", "bound", "message"),
    [
        (np.zeros((1, 0)), 0.1, 0.1, "wsr", "no requests"),
        (np.full((1, 5), 1.5), 0.1, 0.1, "wsr", "between 0 and 1"),
        (np.full((1, 5), np.nan), 0.1, 0.1, "wsr", "between 0 and 1"),
        (np.zeros((1, 5)), 0.0, 0.1, "wsr", "alpha must be between 0 and 1, not 0.0"),
        (np.zeros((1, 5)), 0.1, 1.0, "wsr", "delta must be between 0 and 1, not 1.0"),
        (np.zeros((1, 5)), 0.1, 0.1, "clt", "unknown bound 'clt'"),
    ],
)
def test_nonsense_is_refused(losses: np.ndarray, alpha: float, delta: float, bound: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learn_then_test(losses, alpha, delta, bound)
