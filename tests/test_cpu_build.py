"""The C++ kernels are chosen where they run, and are done without where they cannot be built."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from dynamoe.kernels import select as ops
from dynamoe.kernels.cpu import build as cpu_build
from dynamoe.kernels.cpu.backend import CpuBackend


def test_select_backend_takes_the_kernels_on_a_cpu():
    for dtype in (torch.float32, torch.bfloat16):
        assert isinstance(ops.select_backend("cpu", dtype), CpuBackend)
        assert ops.select_backend("cpu", dtype, "torch").name == "torch"
    assert ops.select_backend("cpu", torch.float16).name == "torch"
    with pytest.raises(ValueError, match="float16"):
        ops.select_backend("cpu", torch.float16, "cpu")
    with pytest.raises(ValueError, match="sse9"):
        ops.select_backend("cpu", torch.float32, "cpu:sse9")
    with pytest.raises(ValueError, match="takes no instruction set"):
        ops.select_backend("cpu", torch.float32, "torch:avx2")


def test_an_instruction_set_may_be_named():
    backend = ops.select_backend("cpu", torch.bfloat16, "cpu:portable")
    assert isinstance(backend, CpuBackend)
    assert backend.isa == "portable"


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", "not on the path"), ("false", "does not run")],
    ids=["missing", "broken"],
)
def test_without_a_compiler_torch_takes_over_with_one_warning(tmp_path, compiler: str, reason: str):
    script = (
        "import warnings, torch\n"
        "from dynamoe.kernels.select import select_backend\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('default')\n"
        "    names = [select_backend('cpu', d).name for d in (torch.bfloat16, torch.float32, torch.bfloat16)]\n"
        "print(names, len(seen), seen[0].message)\n"
    )
    environment = {**os.environ, "CXX": compiler, "XDG_CACHE_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("['torch', 'torch', 'torch'] 1 ")
    assert reason in result.stdout


def test_a_failing_build_says_why(tmp_path, monkeypatch: pytest.MonkeyPatch):
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "broken.cpp").write_text("int f() { return undeclared; }\n")
    monkeypatch.setattr(cpu_build, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(cpu_build.BuildError, match="undeclared"):
        cpu_build.build()
