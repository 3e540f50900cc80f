"""Every Triton kernel compiles for GPUs that are not there, keeps to its registers and uses the tensor cores."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

SHAPES = (
    "default",
    "granite-1b-a400m",
    "olmoe",
    "qwen3-30b-a3b",
    "mixtral",
    "deepseek-v3",
    "longcat",
    "variants",
    "attention",
    "caches",
    "quantised",
    "states",
)


@pytest.fixture
def compile_table(record_property: Callable[[str, object], None]) -> Callable[..., str]:
    """The compiler in a process of its own, as the tests' process may be in interpreter mode. Its table is printed."""

    def run(*arguments: str) -> str:
        table = run_compiler(*arguments)
        record_property("table", table)
        return table

    return run


def run_compiler(target: str, shape: str, *more: str) -> str:
    command = [sys.executable, "-m", "dynamoe.kernels.triton.aot", "--target", target, "--shape", shape, *more]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_sm_90_one_shape(compile_table: Callable[..., str]) -> None:
    table = compile_table("sm_90", "qwen3-30b-a3b")
    prefill = [line.split() for line in table.splitlines() if "m128 n" in line and ("_up_" in line or "down" in line)]
    assert len(prefill) == 2
    assert all(line[-1] == "wgmma" for line in prefill)
    kernels = {word for line in table.splitlines() for word in line.split() if word.endswith("_kernel")}
    assert len(kernels) == 14, kernels


@pytest.mark.slow
def test_quantised_weights_on_sm_90(compile_table: Callable[..., str]) -> None:
    lines = [line.split() for line in compile_table("sm_90", "quantised").splitlines() if "quant_gemm" in line]
    assert len(lines) == 108  # of each format a dense product, gate and up, down; for few rows and for many
    assert all(line[-1] == ("wgmma" if line[2] == "2048" else "mma") for line in lines)


@pytest.mark.slow
def test_8_bit_keys_and_values_on_sm_90(compile_table: Callable[..., str]) -> None:
    lines = [line.split() for line in compile_table("sm_90", "caches").splitlines() if "attention_kernel" in line]
    prefill = [line for line in lines if line[2] == "8192"]
    assert len(prefill) >= 10
    assert len(lines) > 2 * len(prefill)
    assert all(line[-1] == ("wgmma" if line in prefill else "mma") for line in lines)


def test_recurrent_states_on_sm_90(compile_table: Callable[..., str]) -> None:
    kernels = [line.split()[3] for line in compile_table("sm_90", "states").splitlines() if "_kernel" in line]
    assert {kernel: kernels.count(kernel) for kernel in kernels} == {
        "recurrence_kernel": 3,
        "selective_scan_kernel": 1,
        "short_convolution_kernel": 6,
        "convolution_tails_kernel": 3,
    }


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", ["sm_90", "sm_80", "gfx942"])
def test_every_target_and_shape(target: str, shape: str, compile_table: Callable[..., str]) -> None:
    compile_table(target, shape)


@pytest.mark.slow
def test_float16(compile_table: Callable[..., str]) -> None:
    compile_table("sm_90", "granite-1b-a400m", "--dtype", "float16")


def test_a_spill_and_a_missing_tensor_core_are_complaints() -> None:
    from dynamoe.kernels.triton.aot import Report

    fine = {"kernel": "down_kernel", "target": "sm_90", "tokens": 8192, "blocks": "", "registers": 200, "shared": 0,
            "spills": 0, "tensor_core": "wgmma", "prefill": True}  # fmt: skip
    assert Report(**fine).complaint is None
    assert "spills 8 bytes" in str(Report(**{**fine, "spills": 8}).complaint)
    assert "65536" in str(Report(**{**fine, "target": "gfx942", "shared": 65537}).complaint)
    assert "not wgmma" in str(Report(**{**fine, "tensor_core": "mma"}).complaint)
    assert "no tensor cores" in str(Report(**{**fine, "target": "gfx942", "tensor_core": ""}).complaint)
