"""Kernels built from other sources or by another compiler: what changes their fingerprint, and what does not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dynamoe.kernels.cpu import build as cpu_build

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]  # each build takes minutes

# Prints what the kernels built from a folder compute, in both dtypes, formats and cache codes included.
FINGERPRINTS = """
import sys
from pathlib import Path
import torch
from dynamoe.kernels.cpu import build
build.SOURCES = Path(sys.argv[1])
from dynamoe.kernels.cpu.backend import CpuBackend
from dynamoe.kernels.cpu.fingerprint import hash_of
from dynamoe.kernels.cpu.vectors import vectors
for isa in build.isas():
    if torch.ops.dynamoe_cpu.find_isa(isa) >= 0 and isa in sys.argv[2].split(","):
        for dtype in (torch.float32, torch.bfloat16):
            for part, outputs in vectors().items():
                print(isa, dtype, part, hash_of(outputs(CpuBackend("cpu", dtype, isa))))
"""
PLANTS = """
#include <cmath>
#include <cstdlib>
namespace dynamoe_cpu {
inline bool planted(int number) {
  static const char* plant = std::getenv("PLANT");
  return plant && std::atoi(plant) == number;
}
inline float planted(int number, float value) { return planted(number) ? value * 1.0001f : value; }
}
"""
# Number of the plant: file, what stands there, what takes its place. Several only show at one edge.
PLANTED = {
    1: ("ops/rows.cpp", "call.scale, call.weight", "planted(1, call.scale), call.weight"),
    2: ("ops/router.cpp", "* call.scale;", "* planted(2, call.scale);"),
    3: ("ops/attention.cpp", "plan_.call.scale, partial", "planted(3, plan_.call.scale), partial"),
    4: ("ops/attention.cpp", "(index + 1 - block, 0,", "(index + 1 - block - (planted(4) && index == 299), 0,"),
    5: ("ops/budget.cpp", "const float keep = call.keep", "const float keep = (planted(5) ? 0.9f : 1.0f) * call.keep"),
    6: ("ops/exits.cpp", "* call.entropy[row]", "* planted(6, call.entropy[row])"),
    7: ("ops/linear.cpp", "call.bias ? call.bias", "call.bias && !(planted(7) && width == 1) ? call.bias"),
    8: ("ops/stack.cpp", "pending ? shape.residual_scale", "pending ? planted(8, shape.residual_scale)"),
    9: ("ops/ops_ends.cpp", "= static_cast<float>(divisor);", "= planted(9, static_cast<float>(divisor));"),
    10: ("ops/kv_codes.h", "((value + kMagic) - kMagic)", "((value + kMagic) - kMagic) + (planted(10) && i == 39)"),
}


def fingerprints(sources: Path, cache: Path, isas: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", FINGERPRINTS, str(sources), isas],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), **environment},
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("plain") >= 2
    return done.stdout


@pytest.fixture(scope="module")
def isas() -> str:
    return ",".join(cpu_build.isas())


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, isas: str) -> str:
    return fingerprints(cpu_build.SOURCES, Path(cpu_build.cache_directory()).parents[1], isas)


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Sources with a comment in every file and the plants, none of which is in effect; a cache for their build."""
    root = tmp_path_factory.mktemp("changed")
    sources = shutil.copytree(cpu_build.SOURCES, root / "csrc")
    for file in sources.rglob("*.*"):
        file.write_text("// Another comment.\n" + file.read_text())
    header = sources / "isa" / "kernels.h"
    header.write_text(header.read_text() + PLANTS)
    for name, before, after in PLANTED.values():
        text = (sources / name).read_text()
        assert text.count(before) == 1, (name, before)
        (sources / name).write_text(text.replace(before, after))
    return sources, root / "cache"


def test_comments_change_nothing(changed: tuple[Path, Path], here: str, isas: str) -> None:
    assert fingerprints(*changed, isas) == here


@pytest.mark.parametrize("number", PLANTED)
def test_a_planted_difference_shows(changed: tuple[Path, Path], here: str, isas: str, number: int) -> None:
    best = isas.split(",")[0]
    unplanted = [line for line in here.splitlines() if line.startswith(f"{best} ")]
    found = fingerprints(*changed, best, PLANT=str(number)).splitlines()
    part = "int8 cache" if number == 10 else "plain"
    differ = [line for line, known in zip(found, unplanted, strict=True) if line != known]
    assert len([line for line in differ if f" {part} " in line]) == 2  # in both dtypes


@pytest.mark.parametrize("compiler", ["g++-11", "g++-12", "g++-13", "g++-14", "clang++"])
def test_compilers_agree(compiler: str, here: str, isas: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    assert fingerprints(cpu_build.SOURCES, tmp_path, isas, CXX=compiler) == here
