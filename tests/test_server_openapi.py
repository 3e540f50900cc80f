"""Schemathesis against the OpenAPI document: data that fits it, data that does not, and the edges between."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)


def run_schemathesis(server: Any, directory: Path, examples: int, phases: str, timeout: float) -> str:
    """What it prints; fails if it finds something."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--no-color", "--mode"]
    command += ["all", "--checks", ",".join(CHECKS), "--max-examples", str(examples), "--seed", "1"]
    command += ["--phases", phases, "--generation-database", "none"]
    command += ["--request-timeout", "120"]  # answers of full length on a busy machine
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=directory)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "19 selected / 19 total" in result.stdout
    assert "Traceback" not in server.log
    return result.stdout


@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed")
def test_schemathesis_finds_nothing(server: Any, tmp_path: Path) -> None:
    run_schemathesis(server, tmp_path, 8, "fuzzing", 240)


@pytest.mark.slow
@pytest.mark.timeout(7300)
@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed")
def test_ten_thousand_cases_find_nothing(server: Any, tmp_path: Path) -> None:
    """Data that fits the document, data that does not, and the edges between, over all paths."""
    found = re.search(r"(\d+) generated", run_schemathesis(server, tmp_path, 1600, "coverage,fuzzing", 7200))
    assert found is not None
    assert int(found[1]) >= 10_000
