"""Measures of confidence against brute force, and calibrators on outcomes whose truth is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dynamoe.exits.calibrators import Isotonic, Temperature, calibrator_from_json, fit_isotonic, fit_temperature
from dynamoe.exits.metrics import (
    aurc,
    brier_score,
    coverage_at_risk,
    expected_calibration_error,
    operating_point,
    plot_risk_coverage,
    report,
    risk_coverage,
    table,
)
from hypothesis import given, settings
from hypothesis import strategies as st

ROWS = st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.5, 0.9, 1.0]), st.booleans()), min_size=1, max_size=30)


def outcomes(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and outcomes that a sigmoid of twice the logit minus one draws."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, generator=generator) * 2
    truth = torch.sigmoid(2 * logits - 1)
    return logits, (torch.rand(count, generator=generator) < truth).float()


@settings(deadline=None, max_examples=100)
@given(ROWS)
def test_risk_coverage_is_the_share_of_wrong_rows_above_each_threshold(rows: list[tuple[float, bool]]) -> None:
    confidence = torch.tensor([c for c, _ in rows], dtype=torch.float64)
    correct = torch.tensor([float(ok) for _, ok in rows])
    coverage, risk = risk_coverage(confidence, correct)
    assert coverage.tolist() == [(i + 1) / len(rows) for i in range(len(rows))]
    for index, threshold in enumerate(confidence.sort(descending=True).values.tolist()):
        above = [ok for c, ok in rows if c >= threshold]
        assert risk[index].item() == pytest.approx(above.count(False) / len(above))
    # Which of two equal rows comes first must not matter.
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(len(rows)))
    assert aurc(confidence[shuffled], correct[shuffled]) == pytest.approx(aurc(confidence, correct))


def test_a_perfect_order_beats_a_random_one_and_a_random_one_a_wrong_one() -> None:
    correct = (torch.arange(1000) < 700).float()
    perfect, wrong = -torch.arange(1000.0), torch.arange(1000.0)
    random = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert aurc(perfect, correct) < 0.06
    assert aurc(random, correct) == pytest.approx(0.3, abs=0.05)
    assert aurc(wrong, correct) > 0.5
    assert coverage_at_risk(perfect, correct, 0.02) == pytest.approx(0.714, abs=0.001)  # 700 / (1 - 0.02)
    assert coverage_at_risk(wrong, correct, 0.02) == 0


def test_ece_and_brier_on_known_values() -> None:
    confidence, correct = torch.tensor([0.8] * 5 + [0.2] * 5), torch.tensor([1.0] * 4 + [0.0] + [1.0] + [0.0] * 4)
    assert expected_calibration_error(confidence, correct, bins=2) == pytest.approx(0, abs=1e-7)
    assert expected_calibration_error(torch.ones(10), correct) == pytest.approx(0.5)
    assert brier_score(torch.ones(10), correct) == 0.5
    assert brier_score(confidence, correct) == pytest.approx(0.16)
    with pytest.raises(ValueError, match=r"0…1, not -1\.0"):
        expected_calibration_error(torch.tensor([-1.0]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        brier_score(torch.zeros(2), torch.zeros(3))


def test_temperature_finds_the_scale_and_the_shift_that_made_the_outcomes() -> None:
    logits, correct = outcomes(40_000)
    calibrator = fit_temperature(logits, correct)
    assert calibrator.temperature == pytest.approx(0.5, abs=0.03)
    assert calibrator.shift == pytest.approx(0.5, abs=0.05)
    raw, after = (expected_calibration_error(c, correct) for c in (logits.sigmoid(), calibrator(logits)))
    assert after < 0.01 < raw
    with pytest.raises(ValueError, match="5 right of 5"):
        fit_temperature(torch.zeros(5), torch.ones(5))


def test_isotonic_calibrates_what_no_temperature_can() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40_000, generator=generator)
    truth = torch.where(logits > 0, 0.9, 0.3)  # a step
    correct = (torch.rand(40_000, generator=generator) < truth).float()
    fresh = torch.linspace(-2, 2, 101)
    error = (fit_isotonic(logits, correct)(fresh) - torch.where(fresh > 0, 0.9, 0.3)).abs()
    assert error.median() < 0.02
    scaled = (fit_temperature(logits, correct)(fresh) - torch.where(fresh > 0, 0.9, 0.3)).abs()
    assert scaled.max() > 0.1


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_isotonic_rises_and_keeps_the_mean(seed: int) -> None:
    logits, correct = outcomes(3000, seed)
    logits = (logits * 4).round() / 4  # many equal logits
    calibrator = fit_isotonic(logits, correct)
    assert list(calibrator.probabilities) == sorted(calibrator.probabilities)
    assert calibrator(logits).mean().item() == pytest.approx(correct.mean().item(), abs=1e-4)
    assert calibrator(torch.tensor([-100.0])).item() == pytest.approx(calibrator.probabilities[0])


def test_isotonic_refuses_too_few_positives() -> None:
    with pytest.raises(ValueError, match="1000 correct rows, not 3"):
        fit_isotonic(torch.arange(5.0), torch.tensor([1.0, 1, 1, 0, 0]))


@pytest.mark.parametrize("calibrator", [Temperature(0.7, 0.25), Isotonic((-1.0, 0.5), (0.2, 0.8))])
def test_calibrators_survive_json(calibrator: Temperature | Isotonic) -> None:
    again = calibrator_from_json(json.loads(json.dumps(calibrator.to_json())))
    assert again == calibrator
    with pytest.raises(ValueError, match="'magic'"):
        calibrator_from_json({"kind": "magic"})


def test_operating_point_stays_within_the_risk_and_counts_layers() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = {4: torch.rand(5000, generator=generator), 8: torch.rand(5000, generator=generator)}
    correct = {e: (torch.rand(5000, generator=generator) < c).float() for e, c in confidence.items()}
    point = operating_point(confidence, correct, 16, 0.05)
    first = confidence[4] >= point.threshold
    second = ~first & (confidence[8] >= point.threshold)
    wrong = first & (correct[4] == 0) | second & (correct[8] == 0)
    assert point.disagreement == pytest.approx(wrong.double().mean().item())
    assert 0.02 < point.disagreement <= 0.05
    assert point.leaves[8] == pytest.approx(second.double().mean().item())
    assert point.layers_cut == pytest.approx((first.double().mean() * 12 + second.double().mean() * 8).item() / 16)
    assert operating_point(confidence, {e: torch.zeros(5000) for e in confidence}, 16, 0.0).layers_cut == 0


def test_table_and_plot(tmp_path: Path) -> None:
    logits, correct = outcomes(2000)
    calibrated, raw = report(logits.sigmoid(), correct), report(logits, correct, probability=False)
    text = table({"linear, after 4": calibrated, "margin, after 4": raw})
    assert text.splitlines()[2].startswith("| linear, after 4 |")
    assert "| - | - |" in text.splitlines()[3]
    assert calibrated.aurc == pytest.approx(raw.aurc, abs=1e-3)  # a sigmoid does not change the order
    pytest.importorskip("matplotlib")
    plot_risk_coverage({"linear": (logits, correct)}, tmp_path / "curve.svg")
    assert "<svg" in (tmp_path / "curve.svg").read_text()
