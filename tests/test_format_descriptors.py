"""Formats as descriptors: those of GGUF's K-quants, MXFP4, and one that the package does not have, NVFP4.

What the gguf package makes of random blocks is the oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from dynamoe.dynamic.checkpoint.k_quants import K_QUANTS, k_quant_weight
from dynamoe.kernels.api import format_join
from dynamoe.kernels.api.codes import Codes, pack, unpack
from dynamoe.kernels.api.formats import MXFP4, Format
from dynamoe.kernels.api.quantized_weight import QuantizedWeight
from dynamoe.kernels.api.support import quantised_outcomes
from dynamoe.kernels.api.tolerance import QUANTIZED_TOLERANCE, error
from dynamoe.kernels.cpu.backend import CpuBackend
from dynamoe.kernels.reference import quantized as quant_reference
from dynamoe.kernels.torch.backend import TorchBackend
from dynamoe.kernels.triton.backend import TritonBackend
from gguf import GGMLQuantizationType, dequantize, quants
from k_blocks import random_blocks

OUTPUTS, INPUTS = 40, 512
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
NVFP4 = Format(
    name="nvfp4", codes=Codes(bits=4, table=E2M1), groups=(16,), scales=(torch.float8_e4m3fn,), two_level=True
)


@dataclass(frozen=True)
class Case:
    weight: QuantizedWeight
    plain: torch.Tensor


def random_bytes(*shape: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)


def rows(values: np.ndarray) -> torch.Tensor:
    """Of blocks → of outputs."""
    return torch.from_numpy(np.ascontiguousarray(values)).reshape(OUTPUTS, -1)


def dequantized(kind: type, blocks: np.ndarray) -> torch.Tensor:
    return rows(kind.dequantize_blocks(blocks))  # type: ignore[attr-defined]


def k_quant(kind: str) -> Case:
    raw = random_blocks(kind, OUTPUTS, INPUTS)
    plain = torch.from_numpy(dequantize(raw.numpy(), GGMLQuantizationType[kind]))
    return Case(k_quant_weight(raw, kind, (OUTPUTS, INPUTS)), plain)


def mxfp4() -> Case:
    count = OUTPUTS * INPUTS // 32
    exponents, qs = random_bytes(count, 1) % 20 + 118, random_bytes(count, 16)
    codes = np.concatenate([qs & 15, qs >> 4], -1)
    scale = rows(exponents).view(torch.float8_e8m0fnu)
    weight = QuantizedWeight(format=MXFP4, data=pack(rows(codes), 4), scale=scale, inputs=INPUTS, group=32)
    return Case(weight, dequantized(quants.MXFP4, np.concatenate([exponents, qs], -1)))


def nvfp4() -> Case:
    """With a scale for all of an output's groups, which GGUF's blocks have not."""
    count = OUTPUTS * INPUTS // 64
    scales, qs = random_bytes(count, 4) % 0x7F, random_bytes(count, 32)
    parts = qs.reshape(count, 4, 8)
    outer = torch.rand(OUTPUTS, 1) + 0.5
    weight = QuantizedWeight(
        format=NVFP4,
        data=pack(rows(np.concatenate([parts & 15, parts >> 4], -1)), 4),
        scale=rows(scales).view(torch.float8_e4m3fn),
        inputs=INPUTS,
        group=16,
        outer_scale=outer,
    )
    return Case(weight, dequantized(quants.NVFP4, np.concatenate([scales, qs], -1)).float() * outer)


CASES: dict[str, Callable[[], Case]] = {
    **{kind: partial(k_quant, kind) for kind in K_QUANTS},
    "mxfp4": mxfp4,
    "nvfp4": nvfp4,
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def test_numbers_are_those_of_the_blocks(case: Case) -> None:
    weight = case.weight
    assert weight.shape == (OUTPUTS, INPUTS)
    torch.testing.assert_close(weight.dequantize(), case.plain, rtol=1e-6, atol=0)
    bits = 8 * weight.nbytes / weight.shape[0] / INPUTS
    assert bits <= weight.format.codes.bits + 16 / (weight.group or INPUTS) + 0.2


def test_parts_and_joins_are_those_of_the_matrix(case: Case) -> None:
    weight, plain = case.weight, case.weight.dequantize()
    assert torch.equal(weight.rows(3, 17).dequantize(), plain[3:17])
    for start, stop in ((0, 256), (256, 512), (0, 100), (256, 391)):
        assert torch.equal(weight.columns(start, stop).dequantize(), plain[:, start:stop])
    with pytest.raises(ValueError, match="inputs from 8 on begin inside a group"):
        weight.columns(8, 64)
    joined = format_join.concatenate([weight.rows(0, 9), weight.rows(9, OUTPUTS)])
    assert torch.equal(joined.dequantize(), plain)
    stacked = format_join.stack_experts([weight, weight])
    assert torch.equal(stacked.expert(1).dequantize(), plain)
    assert stacked.num_experts == 2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # lanes that the interpreter computes and a mask discards
def test_backends_run_them(case: Case) -> None:
    """With kernels of their own, or dequantised."""
    x, weight = torch.randn(5, INPUTS), case.weight
    expected = quant_reference.linear(x, weight)
    name = weight.format.name
    kernels = dict.fromkeys(("cpu", "triton"), name != "nvfp4")
    assert quantised_outcomes(weight.format) == {on: "kernels" if has else "torch" for on, has in kernels.items()}
    for make in (TorchBackend, CpuBackend, TritonBackend):
        backend = make("cpu", torch.float32)
        packed = backend.pack_quantized_linear(weight)
        assert error(backend.linear(x, packed), expected) <= QUANTIZED_TOLERANCE["none", torch.float32]
        if kernels.get(backend.name):
            assert packed.nbytes < 1.05 * weight.nbytes * -(-OUTPUTS // 32) * 32 / OUTPUTS
        torch.testing.assert_close(backend.weight_rows(packed, torch.arange(3)), weight.dequantize()[:3])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_kernels_know_another_zero() -> None:
    """Codes of four bits of which 3 stands for 0: the int4 kernels would take 8."""
    form = Format(name="uint4", codes=Codes(bits=4, zero=3), groups=(32,), cpu=1, triton="int4")
    data = torch.randint(256, (OUTPUTS, INPUTS // 2), dtype=torch.uint8)
    weight = QuantizedWeight(format=form, data=data, scale=torch.rand(OUTPUTS, INPUTS // 32), inputs=INPUTS, group=32)
    assert torch.equal(weight.dequantize()[:, :32], (weight.codes()[:, :32].float() - 3) * weight.scale[:, :1])
    x = torch.randn(5, INPUTS)
    for make in (CpuBackend, TritonBackend):
        backend = make("cpu", torch.float32)
        out = backend.linear(x, backend.pack_quantized_linear(weight))
        assert error(out, quant_reference.linear(x, weight)) <= QUANTIZED_TOLERANCE["none", torch.float32]


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_any_width_are_packed(bits: int) -> None:
    codes = torch.randint(1 << bits, (3, 13), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, Codes(bits=bits).row_bytes(13))
    assert torch.equal(unpack(packed, bits)[:, :13], codes)


def test_refusals_name_the_value() -> None:
    weight = mxfp4().weight
    for match, change in {
        "mxfp4 groups have 32 inputs, not 64": {"group": 64},
        "mxfp4 scales are for 1 outputs, not 128 by 32": {"block_out": 128},
        "mxfp4 weights have no zero points": {"zero": torch.zeros(OUTPUTS, 16, dtype=torch.uint8)},
        "mxfp4 weights have no offsets": {"offset": torch.zeros(OUTPUTS, 16)},
        "mxfp4 weights have no outer scales": {"outer_scale": torch.ones(OUTPUTS, 1)},
        "scales must be floating with shape": {"scale": torch.ones(OUTPUTS, 4)},
        "512 inputs take 256 bytes a row, not 255": {"data": weight.data[:, 1:]},
    }.items():
        with pytest.raises(ValueError, match=match):
            QuantizedWeight(**{**vars(weight), **change})
    for match, wrong in {
        "not 9 in torch.uint8": {"bits": 9},
        "not 4 in torch.int8": {"bits": 4, "dtype": torch.int8},
        "no table of 3 entries": {"bits": 2, "table": (0.0, 1.0, 2.0)},
    }.items():
        with pytest.raises(ValueError, match=match):
            Codes(**wrong)
