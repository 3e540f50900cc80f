"""Calibrations on stored losses of the shipped models keep their promises, and MAPIE finds the same."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import pytest
from dynamoe.dynamic.contract.bounds import conformal_risk_control, hoeffding_bentkus, learn_then_test

_BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
_SPEC = importlib.util.spec_from_file_location("validity", _BENCHMARKS / "validity.py")
assert _SPEC is not None
assert _SPEC.loader is not None
validity = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(validity)


@pytest.fixture(scope="module", params=["tiny", "default"])
def losses(request: pytest.FixtureRequest) -> np.ndarray:
    return np.load(_BENCHMARKS / "results" / f"losses_{request.param}.npz")["losses"].astype(np.float64)


@pytest.mark.parametrize("alpha", validity.ALPHAS)
def test_resampled_calibrations_keep_their_promise(losses: np.ndarray, alpha: float) -> None:
    assert losses.shape[1] >= 1000
    record = validity.resample(losses, alpha, 0.05, 200, seed=1)
    assert validity.holds(record), record


def test_and_where_choosing_wrong_is_likeliest(losses: np.ndarray) -> None:
    levels = validity.hardest_levels(losses)
    records = [validity.resample(losses, alpha, 0.05, 200, seed=2) for alpha in levels]
    assert all(validity.holds(record) for record in records)
    # The check has teeth: some of these calibrations do go wrong, as a share of delta may.
    assert any(record["methods"]["wsr"]["violations"] for record in records)


@pytest.mark.parametrize("alpha", validity.ALPHAS)
def test_mapie_finds_the_same_settings(losses: np.ndarray, alpha: float) -> None:
    control = pytest.importorskip("mapie.risk_control.fwer_control").control_fwer
    methods = pytest.importorskip("mapie.risk_control.methods")
    generator, count = np.random.default_rng(3), losses.shape[1]
    for _ in range(20):
        drawn = losses[:, generator.integers(count, size=count)]
        theirs = methods.compute_hoeffding_bentkus_p_value(drawn.mean(1), count, alpha)[:, 0]
        np.testing.assert_allclose(np.minimum(1, theirs), hoeffding_bentkus(drawn, alpha, 0.05), rtol=1e-6)
        passed = control(theirs, 0.05, "fixed_sequence")
        found = learn_then_test(drawn, alpha, 0.05, "hoeffding_bentkus")
        assert (len(passed) - 1 if len(passed) else None) == found

        settings = np.arange(float(len(drawn)))
        _, bounds = methods.get_r_hat_plus(drawn.T, settings, "crc", None, None, None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # says so where no setting passes, and returns one all the same
            best = methods.find_best_predict_param(settings, bounds, np.array([alpha]))[0]
        assert (int(best) if bounds[0] < alpha else None) == conformal_risk_control(drawn, alpha)
