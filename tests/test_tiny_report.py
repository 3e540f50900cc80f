"""The comparison of the three tiny runs: ratios, genres, and packages that training never saw apart."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

_FILE = Path(__file__).parents[1] / "benchmarks" / "tiny_report.py"
_SPEC = importlib.util.spec_from_file_location("tiny_report", _FILE)
assert _SPEC is not None
assert _SPEC.loader is not None
tiny_report = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny_report)


def report(factor: float) -> dict[str, Any]:
    evaluation = {"perplexity/a/x": 4.0, "perplexity/a/y": 9.0, "perplexity/a/z": 5.0, "perplexity": 10.0}
    return {
        "evaluation": {**{k: v * factor for k, v in evaluation.items()}, "agreement/exit_4": 0.5},
        "known_streams": {"a/x": True, "a/y": True, "a/z": False, "b/too_short": True},
        "seconds": 1.0,
        "threads": 2,
    }


def test_ratios_and_genres() -> None:
    result = tiny_report.compare({"tiny": report(1.0), "tiny_no_exits": report(0.99), "tiny_shallow": report(1.05)})
    assert result["perplexity_by_genre"]["tiny"] == pytest.approx({"a/known": 6.0, "a/unseen": 5.0})
    assert result["tiny_over_no_exits"] == pytest.approx(1 / 0.99)
    assert result["shallow_over_tiny_by_genre"] == pytest.approx({"a/known": 1.05, "a/unseen": 1.05})
    assert result["exits_cost_at_most_2_percent"]
    assert not result["depth_is_worth_at_least_10_percent"]
    assert result["at_exits"] == {"agreement/exit_4": 0.5}


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    assert tiny_report.finish("no such recipe", tmp_path, [])
