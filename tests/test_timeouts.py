"""A test that takes too long fails by itself, also inside hypothesis, and the run goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SLOW = """
import time
import pytest
from hypothesis import given, settings, strategies

@pytest.mark.parametrize("seconds", [0.03, 60])
@settings(deadline=None, database=None)
@given(number=strategies.integers())
def test_slow(number, seconds):
    time.sleep(seconds)

def test_next():
    pass
"""


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_time_out_inside_hypothesis_fails_one_test(workers: str, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(SLOW)
    plugins = [f"-p{name}" for name in ("xdist.plugin", "pytest_timeout", "_hypothesis_pytestplugin", "timeouts")]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, "--timeout=1", "-n", workers, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    for seconds in ("0.03", "60"):
        assert f"TimedOut: test_it.py::test_slow[{seconds}] ran for more than 1.0 s" in done.stdout
    assert "2 failed, 1 passed" in done.stdout
