"""An instruction set is one file, which may lie outside the package and pack activations its own way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dynamoe.kernels.cpu import build as cpu_build

# The portable kernels, row by row. Activations lie in steps of 8 inputs, rows filled up to multiples of 4 and beside
# each other; limbs row after row, behind a gap. Products abort on threads that have not been told to expect them.
TOY = r"""
#include "isa/isa_begin.h"

#include <cstdlib>

#define TARGET

namespace dynamoe_cpu {
namespace {

constexpr int kTileRows = 5;
constexpr int kPassVectors = 4;

#include "isa/simd_portable.h"
#include "isa/transpose_portable.h"
#include "isa/row_kernels.h"
#include "isa/state_kernels.h"
#include "isa/packed_words.h"
#include "ops/kv_codes.h"
#include "isa/tile_kernels.h"
#include "isa/fp8_plain.h"
#include "quant/quant_rows.h"
#include "quant/quant_plain.h"
#include "isa/table.h"

constexpr int kStep = 8, kGap = 64;
thread_local int multiplying = 0;

int64_t toy_offset(int num_rows, int64_t input) { return ceil_div(num_rows, 4) * 4 * input * sizeof(float); }

float* place(void* packed, int num_rows, int row, int input) {
  char* step = static_cast<char*>(packed) + toy_offset(num_rows, input / kStep * kStep);
  return reinterpret_cast<float*>(step) + row * kStep + input % kStep;
}

template <Dtype kDtype>
void toy_pack(void* packed, const void* const* rows, int num_rows, int inputs) {
  std::memset(packed, 0, toy_offset(num_rows, ceil_div(inputs, kStep) * kStep));
  for (int r = 0; r < num_rows; ++r)
    for (int i = 0; i < inputs; ++i)
      *place(packed, num_rows, r, i) = kDtype == Dtype::fp32 ? static_cast<const float*>(rows[r])[i]
                                                             : widen_bf16(static_cast<const uint16_t*>(rows[r])[i]);
}

template <Dtype kDtype>
void toy_append(void* packed, int64_t first, float* rows, int num_rows) {
  for (int r = 0; r < num_rows; ++r)
    for (int i = 0; i < kGatedOutputs; ++i) {
      alignas(16) float value[Vec::kLanes] = {rows[r * kGatedOutputs + i]};
      Vec::store(value, rounded(Vec::load(value), kDtype));
      *place(packed, num_rows, r, static_cast<int>(first) + i) = value[0];
    }
}

template <int kInputs>
void toy_run(int num_rows, const void* packed, const uint32_t* weights, int words, float* tile, bool accumulate,
             Ahead ahead) {
  if (!multiplying) std::abort();
  constexpr int kWords = kStep / kInputs;
  for (int word = 0; word < words; word += kWords) {
    const char* step = static_cast<const char*>(packed) + toy_offset(num_rows, word * kInputs);
    for (int r = 0; r < num_rows; ++r)
      multiply<1, kInputs>(reinterpret_cast<const float*>(step) + r * kStep, weights + word * kBlockOutputs,
                           words - word < kWords ? words - word : kWords, tile + r * kBlockOutputs,
                           accumulate || word, {ahead.first, 0});
  }
}

int64_t toy_limb_bytes(const LimbShape& shape, int num_rows) { return num_rows * (kGap + shape.row_bytes); }

void toy_pack_limbs(const LimbShape& shape, char* packed, const void* const* limbs, int num_rows) {
  for (int r = 0; r < num_rows; ++r) std::memmove(packed + toy_limb_bytes(shape, r) + kGap, limbs[r], shape.row_bytes);
  std::memset(packed, 255, kGap);
}

void toy_multiply_limbs(const QuantLayout& layout, const LimbShape& shape, int num_rows, const char* packed,
                        const char* block, float* tile, CodesAhead ahead) {
  if (!multiplying) std::abort();
  for (int r = 0; r < num_rows; ++r)
    multiply_limbs(layout, shape, 1, packed + toy_limb_bytes(shape, r) + kGap, block, tile + r * kBlockOutputs, ahead);
}

Kernels kernels() {
  Kernels kernels = common_kernels();
  kernels.gemm[0] = {kTileRows, 1, kStep, toy_offset, toy_pack<Dtype::fp32>, toy_append<Dtype::fp32>, toy_run<1>};
  kernels.gemm[1] = {kTileRows, 2, kStep, toy_offset, toy_pack<Dtype::bf16>, toy_append<Dtype::bf16>, toy_run<2>};
  kernels.quant.tile_rows[0] = 17;
  kernels.quant.packed_bytes = toy_limb_bytes;
  kernels.quant.pack_limbs = toy_pack_limbs;
  kernels.quant.multiply_limbs = toy_multiply_limbs;
  kernels.begin_products = [] { ++multiplying; };
  kernels.end_products = [] { --multiplying; };
  return kernels;
}

const Isa registered("toy", 1000, [] { return Fit::by_name; }, kernels());

}  // namespace
}  // namespace dynamoe_cpu
"""

SCRIPT = r"""
import json, sys
import torch
from dynamoe import LLM, SamplingParams
from dynamoe.kernels.cpu.backend import CpuBackend
from dynamoe.kernels.cpu.build import isas

torch.set_num_threads(2)
prompts = ["Once upon a time", "Lily and Tom went to the park. " * 4]
params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)

def tokens(backend, **settings):
    llm = LLM("tiny", backend=backend, progress=False, max_model_len=256, **settings)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return llm.model.decoder.backend.isa, [list(output.outputs[0].token_ids) for output in outputs]

runs = [{}, {"dtype": "float32"}, {"quantization": "w8a8"}, {"quantization": "int4"}]
print(json.dumps({
    "names": isas(),
    "auto": CpuBackend("cpu", torch.float32).isa,
    "runs": [[tokens(backend, **settings) for backend in ("cpu:toy", "cpu:portable")] for settings in runs],
}))
"""


def run(source: Path) -> subprocess.CompletedProcess[str]:
    # Two threads, which sleep at barriers: beside other processes they would get nothing done otherwise.
    environment = {**os.environ, cpu_build.EXTRA_SOURCES: str(source), "GOMP_SPINCOUNT": "0"}
    return subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=900)


def test_a_file_of_its_own_adds_an_instruction_set(tmp_path: Path):
    source = tmp_path / "toy.cpp"
    source.write_text(TOY)
    result = run(source)
    assert result.returncode == 0, result.stderr[-4000:]
    seen = json.loads(result.stdout.splitlines()[-1])
    assert seen["names"] == ["toy", *cpu_build.isas()]
    assert seen["auto"] != "toy"  # which asks to be called by name
    for (isa, tokens), (other, expected) in seen["runs"]:
        assert (isa, other) == ("toy", "portable")
        assert tokens == expected


def test_an_extra_file_that_does_not_compile_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = tmp_path / "broken.cpp"
    source.write_text("int f() { return undeclared; }\n")
    library = cpu_build.build()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(cpu_build.BuildError, match="undeclared"):
        cpu_build._build_extra(library, source)
    with pytest.raises(cpu_build.BuildError, match=r"missing\.cpp"):
        cpu_build._build_extra(library, tmp_path / "missing.cpp")


def test_names_come_from_the_kernels():
    names = cpu_build.isas()
    assert names[-1] == "portable"
    assert torch.ops.dynamoe_cpu.find_isa("portable") == len(names) - 1
    assert torch.ops.dynamoe_cpu.find_isa("sse9") == -1
