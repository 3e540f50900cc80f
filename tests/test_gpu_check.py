"""The GPU benchmark's rehearsal, from a checkout that is not installed, and the layer benchmark on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A machine with a GPU may have none of these: the check needs torch, triton and transformers.
ABSENT = (
    "accelerate", "deepspeed", "fastapi", "gguf", "hydra", "megablocks", "omegaconf", "openai", "prometheus_client",
    "pytest", "starlette", "uvicorn",
)  # fmt: skip


@pytest.fixture
def bare_environment(tmp_path: Path) -> dict[str, str]:
    """Variables of an interpreter that cannot import ``ABSENT``, nor find the package where it is installed."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
    )
    return {**os.environ, "PYTHONPATH": str(site)}


def run(script: str, *arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=cwd, env=env)


@pytest.mark.slow
def test_layer_benchmark(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    done = run(
        "moe_layer.py", "--shapes", "tiny", "--tokens", "1", "9", "--repetitions", "3", "--only", "torch", "grouped_mm",
        "transformers grouped_mm", "--device", "cpu", "--json", str(results), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cells = json.loads(results.read_text())
    assert {(m["name"], m["tokens"]) for m in cells} == {
        (name, tokens) for name in ("torch", "grouped_mm", "transformers grouped_mm") for tokens in (1, 9)
    }
    assert all(0 < m["fastest"] <= m["seconds"] <= m["slowest"] and m["fraction"] > 0 for m in cells)
    assert "is wrong" not in done.stdout


def test_without_a_gpu_the_check_says_how_to_rehearse(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("gpu_check.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "--rehearse" in done.stderr


def test_the_check_imports_only_what_it_says_it_needs(tmp_path: Path, bare_environment: dict[str, str]) -> None:
    code = f"import {ABSENT[0]}"
    blocked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=bare_environment)
    assert "ModuleNotFoundError" in blocked.stderr
    done = run("gpu_check.py", "--help", cwd=tmp_path, env=bare_environment)
    assert done.returncode == 0, done.stderr
    assert "--rehearse" in done.stdout


@pytest.mark.slow
def test_rehearsal(tmp_path: Path, bare_environment: dict[str, str]) -> None:
    done = run("gpu_check.py", "--rehearse", "--output", str(tmp_path), cwd=tmp_path, env=bare_environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("gpu_check-*.json")
    report = json.loads(path.read_text())
    assert report["rehearsal"]
    assert report["failures"] == []
    assert {"triton/float32", "triton/bfloat16", "triton/float16", "grouped_mm/bfloat16"} <= set(report["correct"])
    assert all(report["correct"].values())
    assert report["measurements"]
    assert {cell["cache"] for cell in report["attention"]} == {"auto", "int8", "fp8"}
    assert {cell["quantization"] for cell in report["decode"]} == {"none", "int4", "int8"}
    assert all(cell["launches"] > 10 and cell["captured"] is None for cell in report["decode"])
