"""The bet against a certificate: rarely rejects a true claim, soon a false one, and is the same after a round trip."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest
from dynamoe.dynamic.contract.e_process import EProcess

ALPHA, DELTA, TOKENS = 0.05, 0.05, 40


def draw(generator: np.random.Generator, risk: float, count: int) -> np.ndarray:
    """Losses of requests of 40 tokens, some of which go worse than others."""
    return generator.binomial(TOKENS, generator.beta(3 * risk, 3 * (1 - risk), count)) / TOKENS


def bet(losses: Iterable[float], process: EProcess | None = None) -> EProcess:
    process = process or EProcess.start(ALPHA, DELTA)
    for loss in losses:
        process = process.observe(float(loss))
    return process


@pytest.mark.parametrize("risk", [ALPHA, 0.9 * ALPHA, 0.5 * ALPHA])
@pytest.mark.parametrize("whole", [False, True])
def test_a_true_claim_is_rarely_rejected(risk: float, whole: bool) -> None:
    """50 runs of 2,000 requests: 2.5 are expected to fire at most; more than 6 would come up once in 85 tests."""
    generator = np.random.default_rng(0)
    fired = 0
    for _ in range(50):
        losses = (generator.random(2000) < risk).astype(float) if whole else draw(generator, risk, 2000)
        fired += bet(losses).fired
    assert fired <= 6
    assert risk == ALPHA or fired == 0


def test_the_wealth_is_what_the_paper_says() -> None:
    """K as a product, with stakes out of the means and variances that are kept."""
    losses = draw(np.random.default_rng(1), 2 * ALPHA, 300)
    process, wealth = EProcess.start(ALPHA, DELTA), 1.0
    for loss in losses.tolist():
        edge = process.recent_mean - ALPHA
        stake = min(max(edge / (process.recent_variance + edge**2), 0.0), 0.5 / ALPHA)
        wealth *= 1 + stake * (loss - ALPHA)
        process = process.observe(loss)
    assert process.log_wealth == pytest.approx(math.log(wealth), rel=1e-9)
    assert process.mean == pytest.approx(losses.mean(), rel=1e-12)
    assert process.count == 300


def test_the_stake_does_not_know_the_loss_it_is_placed_on() -> None:
    """The factor of a loss is linear in it: 1 + stake * (loss - alpha), one stake for every loss that could come."""
    before = bet(draw(np.random.default_rng(2), 2 * ALPHA, 50))
    assert before.stake > 0
    for loss in (0.0, 0.3, 1.0):
        factor = math.exp(before.observe(loss).log_wealth - before.log_wealth)
        assert factor == pytest.approx(1 + before.stake * (loss - ALPHA))


@pytest.mark.parametrize("before", [0, 1000, 5000])
def test_drift_is_noticed_within_200_requests(before: int) -> None:
    """A risk that rises to three times alpha, after a good time of any length."""
    for seed in range(10):
        generator = np.random.default_rng(seed)
        process = bet(draw(generator, 0.5 * ALPHA, before))
        assert not process.fired
        process = bet(draw(generator, 3 * ALPHA, 200), process)
        assert process.fired_at is not None
        assert before < process.fired_at <= before + 200


def test_after_firing_it_stays_fired() -> None:
    process = EProcess.start(ALPHA, DELTA)
    while not process.fired:
        process = process.observe(1.0)
    assert process.fired_at == process.count < 20
    assert process.log_wealth >= math.log(1 / DELTA)
    later = bet([0.0] * 500, process)
    assert later.log_wealth < math.log(1 / DELTA)
    assert later.fired_at == process.fired_at


def test_requests_without_loss_cost_nothing_once_the_risk_is_low() -> None:
    process = bet([0.0] * 200)
    assert process.stake == 0
    assert process.log_wealth == 0
    assert process.mean == 0


def test_losses_that_never_vary() -> None:
    """A variance that goes to zero: the stake stays within its bound."""
    assert bet([ALPHA] * 500).log_wealth == pytest.approx(0)
    process = bet([0.2] * 500)
    assert process.fired
    assert process.stake <= 0.5 / ALPHA


def test_the_state_survives_a_round_trip_bit_for_bit() -> None:
    losses = draw(np.random.default_rng(3), 2 * ALPHA, 200)
    whole, pieces = bet(losses), EProcess.start(ALPHA, DELTA)
    for loss in losses.tolist():
        pieces = EProcess.from_json(pieces.observe(loss).to_json())
    assert pieces == whole


def test_nonsense_is_refused() -> None:
    for levels in ((0.0, 0.1), (0.1, 1.0), (float("nan"), 0.1)):
        with pytest.raises(ValueError, match="must be between 0 and 1"):
            EProcess.start(*levels)
    for loss in (-0.01, 1.01, float("nan")):
        with pytest.raises(ValueError, match="a loss must lie between 0 and 1"):
            EProcess.start(0.1, 0.1).observe(loss)
    for text in (
        "{",
        "[]",
        '{"alpha": 0.1}',
        '{"alpha": 2, "delta": 0.1, "recent_mean": 0, "recent_variance": 0}',
        '{"colour": 1}',
    ):
        with pytest.raises(ValueError, match="is not the state of a bet"):
            EProcess.from_json(text)
