"""Long runs of the tests go on where they were stopped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CASES = """
import os, pytest
@pytest.mark.parametrize("number", range(4))
def test_number(number):
    assert number != 2 or os.environ.get("GOOD")
"""


def run(folder: Path, *options: str, good: str = "") -> str:
    command = [sys.executable, "-m", "pytest", "-q", *options]
    env = {**os.environ, "GOOD": good, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    made = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return made.stdout.splitlines()[-1]


@pytest.mark.parametrize("workers", [(), ("-p", "xdist", "-n", "1")])
def test_what_passed_is_not_run_again_until_all_has(tmp_path: Path, workers: tuple[str, ...]) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    shutil.copy(Path(__file__).with_name("resume.py"), tests)
    (tests / "conftest.py").write_text("from resume import pytest_addoption, pytest_configure\n")
    (tests / "test_numbers.py").write_text(CASES)
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = tests\ntestpaths = tests\n")
    assert run(tmp_path, "--resume", *workers).startswith("1 failed, 3 passed")
    assert run(tmp_path, "--resume", *workers).startswith("1 failed")
    assert run(tmp_path, "--resume", *workers, good="1").startswith("1 passed")
    assert run(tmp_path, "--resume", *workers, good="1").startswith("4 passed")
    assert run(tmp_path, "--resume", *workers).startswith("1 failed, 3 passed")
    (tests / "test_numbers.py").write_text(CASES + "\n")
    assert run(tmp_path, "--resume", *workers).startswith("1 failed, 3 passed")
