"""Weights that the C++ kernels round while a model is loaded: the bits of plain torch, for every method."""

from __future__ import annotations

import pytest
import torch
from dynamoe.dynamic.model.quantization import methods
from dynamoe.kernels.api.codes import nibbles, pack_int4
from dynamoe.kernels.api.rounding import Rounding
from dynamoe.kernels.cpu.backend import CpuBackend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def backend() -> CpuBackend:
    return CpuBackend("cpu", torch.float32)


def special() -> torch.Tensor:
    """Rows whose largest weights, ties, zeros and denormals are hard to round."""
    tie = torch.arange(-127, 128) + 0.5
    rows = [
        torch.zeros(300),
        torch.full((300,), -0.0),
        torch.full((300,), 1e-40),
        torch.linspace(-1e-38, 3e-38, 300),
        torch.cat((tie, torch.full((45,), 127.0))),
        torch.cat((tie / 17, torch.full((45,), -7.5))),
        torch.full((300,), 65504.0),
        torch.logspace(-12, 4, 300),
        -torch.logspace(-40, 30, 300, base=2),
        torch.linspace(1, 2, 300),  # of one sign only
        torch.linspace(-2, -1, 300),
        torch.randn(300).mul(1e38),
        torch.linspace(-1, 1, 300) * 3e38,  # twice that is infinite
    ]
    return torch.stack(rows)


WEIGHTS = {
    "even": lambda: torch.randn(130, 256),
    "ragged": lambda: torch.randn(37, 301) * torch.rand(37, 1),
    "one input": lambda: torch.randn(5, 1),
    "long rows": lambda: torch.randn(3, 1700),
    "experts": lambda: torch.randn(3, 20, 72),
    "halves of experts": lambda: torch.randn(3, 40, 72)[:, 20:],
    "neurons side by side": lambda: torch.randn(20, 3 * 72).view(20, 3, 72).transpose(0, 1),
    "transposed": lambda: torch.randn(3, 72, 40).transpose(1, 2),
    "special": special,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_method_gives_the_bits_of_torch(name: str, dtype: torch.dtype, backend: CpuBackend) -> None:
    largest = torch.finfo(dtype).max
    weight = WEIGHTS[name]().clamp(-largest, largest).to(dtype)
    for method in methods().values():
        assert isinstance(method.quantize, Rounding)
        wanted, found = method.quantize(weight), backend.quantize(method.quantize, weight)
        assert backend._rounded(method.quantize, weight) is not None
        assert (found.format, found.shape, found.group, found.block_out) == (
            *(wanted.format, wanted.shape),
            *(wanted.group, wanted.block_out),
        )
        assert found.tensors().keys() == wanted.tensors().keys()
        for part, tensor in wanted.tensors().items():
            assert found.tensors()[part].dtype == tensor.dtype
            assert torch.equal(found.tensors()[part].view(torch.uint8), tensor.view(torch.uint8)), (method, part)


def test_every_float8_is_rounded_alike(backend: CpuBackend) -> None:
    """All of bfloat16's finite numbers up to the format's largest, so that its scale is 1."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    row = bits[bits.isfinite() & (bits.abs() <= 448)]
    fp8 = methods()["fp8"].quantize
    wanted, found = fp8(row[None]), backend.quantize(fp8, row[None])
    assert wanted.scale.item() == 1
    assert torch.equal(found.data.view(torch.uint8), wanted.data.view(torch.uint8))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["int8", "int4-asym", "fp8-block"])
def test_weights_that_are_not_finite_are_refused(method: str, wrong: float, backend: CpuBackend) -> None:
    weight = torch.randn(2, 40, 600)
    weight[1, 39, 599] = wrong
    with pytest.raises(ValueError, match="1 of 24000 are not"):
        backend.quantize(methods()[method].quantize, weight)


def test_others_are_rounded_by_torch(backend: CpuBackend) -> None:
    double = torch.randn(4, 64, dtype=torch.float64)
    int8 = methods()["int8"].quantize
    assert torch.equal(backend.quantize(int8, double).data, int8(double).data)
    assert torch.equal(backend.quantize(lambda w: int8(w * 2), double).scale, int8(double * 2).scale)
    with pytest.raises(ValueError, match="must be floating"):
        backend.quantize(int8, torch.ones(4, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="must be floating"):
        backend.quantize(int8, torch.ones(4, 0))


@pytest.mark.parametrize("run", [2, 16, 32])
def test_halves_of_bytes_in_order(run: int, backend: CpuBackend) -> None:
    blocks = torch.randint(256, (7, 5, 3 + 2 * run), dtype=torch.uint8)[..., 3:]
    found = torch.ops.dynamoe_cpu.pack_halves(blocks, run)
    assert torch.equal(found, pack_int4(nibbles(blocks, run).flatten(1)))
