"""A test that takes too long fails by itself, also inside hypothesis, and the run goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SLOW = """
import time
from hypothesis import given, settings, strategies

@settings(deadline=None, database=None)
@given(strategies.integers())
def test_slow(number):
    time.sleep({seconds})

def test_next():
    pass
"""


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("seconds", [0.03, 60])
def test_a_time_out_inside_hypothesis_fails_one_test(seconds: float, workers: str, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(SLOW.format(seconds=seconds))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "timeouts", "--timeout=1", "-n", workers, str(tmp_path)]
    settings = ["-o", "asyncio_default_fixture_loop_scope=function"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [*command, *settings], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=50
    )
    assert "TimedOut: test_it.py::test_slow ran for more than 1.0 s" in done.stdout
    assert "1 failed, 1 passed" in done.stdout
