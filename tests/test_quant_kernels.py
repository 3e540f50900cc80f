"""Products with quantised weights against their oracle: every format, backend and instruction set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from dynamoe.kernels.api import rounding
from dynamoe.kernels.api.formats import FP8_PER_GROUP, INT8_PER_GROUP, UNQUANTIZED, ActivationScheme
from dynamoe.kernels.api.quantized_weight import QuantizedWeight
from dynamoe.kernels.api.tolerance import QUANTIZED_TOLERANCE, error
from dynamoe.kernels.api.types import Routing
from dynamoe.kernels.cpu.backend import CpuBackend
from dynamoe.kernels.reference import quantized as quant_reference
from dynamoe.kernels.torch.backend import TorchBackend
from dynamoe.kernels.triton.backend import TritonBackend
from dynamoe.kernels.triton.device import H100
from dynamoe.kernels.triton.rounding import plan_rows
from k_blocks import k_weight

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Quantize = Callable[[torch.Tensor], QuantizedWeight]


def _with_offsets(weight: torch.Tensor) -> QuantizedWeight:
    """As GGUF's Q4_1: a scale and a smallest value, both 16 bits."""
    int4 = rounding.quantize_int4(weight, group=32, symmetric=False)
    return replace(int4, zero=None, scale=int4.scale.half(), offset=int4.offsets().half())


FORMATS: dict[str, tuple[Quantize, ActivationScheme]] = {
    "int8": (rounding.quantize_int8, UNQUANTIZED),
    "w8a8": (rounding.quantize_int8, INT8_PER_GROUP),
    "int8 g32": (lambda w: rounding.quantize_int8(w, group=32), UNQUANTIZED),
    "int4 g32 with offsets": (_with_offsets, UNQUANTIZED),
    "int4 g64": (lambda w: rounding.quantize_int4(w, group=64), UNQUANTIZED),
    "int4 g128 asymmetric": (lambda w: rounding.quantize_int4(w, group=128, symmetric=False), UNQUANTIZED),
    "w4a8 g32 with offsets": (_with_offsets, ActivationScheme("int8", 32)),
    "w4a8 g64": (lambda w: rounding.quantize_int4(w, group=64), ActivationScheme("int8", 64)),
    "w4a8 g128 asymmetric": (
        lambda w: rounding.quantize_int4(w, group=128, symmetric=False),
        ActivationScheme("int8", 128),
    ),
    "fp8": (rounding.quantize_fp8, UNQUANTIZED),
    "fp8 blocks": (lambda w: rounding.quantize_fp8(w, block=True), FP8_PER_GROUP),
    **{kind.lower(): (partial(k_weight, kind), UNQUANTIZED) for kind in ("Q4_K", "Q5_K", "Q6_K")},
}
LINEAR_EDGES = {
    "one of everything": (1, 1, 1),
    "odd inputs": (5, 64, 37),
    "ragged default model": (4, 100, 576),
    "one more row than a tile": (13, 40, 96),
    "several chunks of rows": (200, 40, 1030),
}
# rows, experts, experts per row, width, hidden size
EXPERT_EDGES = {
    "one row": (1, 4, 2, 96, 576),
    "nothing is a multiple": (7, 5, 3, 41, 75),
    "many rows": (70, 3, 2, 96, 64),
    "interpreted": (4, 3, 2, 20, 70),
}


@pytest.fixture(params=list(FORMATS))
def form(request: pytest.FixtureRequest) -> str:
    return request.param


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, scheme: ActivationScheme) -> None:
    assert actual.shape == expected.shape
    assert error(actual, expected) <= QUANTIZED_TOLERANCE[scheme.kind, dtype]


def check_linear(backend: TorchBackend, form: str, edge: str, *, bitwise: bool = True) -> None:
    rows, outputs, inputs = LINEAR_EDGES[edge]
    quantize, scheme = FORMATS[form]
    weight, bias = quantize(torch.randn(outputs, inputs)), torch.randn(outputs).to(backend.dtype)
    x = torch.randn(rows, inputs + 3).to(backend.dtype)[:, :inputs]
    if rows > 1:
        x[1] = 0.0
    packed = backend.pack_quantized_linear(weight, bias, scheme)
    expected = quant_reference.linear(x, weight, bias, scheme)
    assert_near(backend.linear(x, packed), expected, backend.dtype, scheme)
    assert_near(backend.logits_linear(x, packed), expected, backend.dtype, scheme)
    ids = torch.randint(outputs, (9,))
    rows_of_weight = backend.weight_rows(packed, ids)
    torch.testing.assert_close(rows_of_weight, weight.dequantize()[ids].to(backend.dtype))
    assert torch.equal(backend.embed(packed, ids, 12.0), rows_of_weight.float() * 12.0)
    generator = torch.Generator().manual_seed(1)
    stream = torch.randn(rows, inputs, generator=generator)
    norm = torch.rand(inputs, generator=generator).to(backend.dtype)
    logits = backend.logits_linear(backend.rms_norm(stream, norm, 1e-5), packed) / 6.0
    assert torch.equal(backend.logits(stream, norm, 1e-5, packed, 6.0), logits)
    for start in {outputs // 3, outputs // 32 * 32} - {outputs}:
        tail = backend.linear_tail(packed, start)
        assert tail.out_features == outputs - start
        part, whole = backend.linear(x, tail), backend.linear(x, packed)[:, start:]
        assert torch.equal(part, whole) if bitwise else torch.allclose(part, whole, rtol=1e-4, atol=1e-3)
        assert torch.equal(backend.weight_rows(tail, ids - ids), backend.weight_rows(packed, ids - ids + start))


def check_experts(backend: TorchBackend, form: str, edge: str) -> None:
    rows, num_experts, top_k, width, hidden = EXPERT_EDGES[edge]
    quantize, scheme = FORMATS[form]
    gate, up = (quantize(torch.randn(num_experts, width, hidden) / hidden**0.5) for _ in range(2))
    down = quantize(torch.randn(num_experts, hidden, width) / width**0.5)
    biases = [torch.randn(num_experts, size).to(backend.dtype) / 4 for size in (width, width, hidden)]
    x = torch.randn(rows, hidden).to(backend.dtype)
    ids_TK = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(rows)]).int()
    counts_T = torch.randint(0, top_k + 1, (rows,)).int() if rows > 1 else None
    routing = Routing(expert_ids_TK=ids_TK, weights_TK=torch.rand(rows, top_k), counts_T=counts_T)
    packed = backend.pack_quantized_experts(gate, up, down, "silu", *biases, scheme=scheme)
    expected = quant_reference.experts(x, gate, up, down, routing, "silu", *biases, scheme=scheme)
    assert_near(backend.experts(x, packed, routing), expected, backend.dtype, scheme)
    everything = quant_reference.all_on(x, num_experts)
    expected = quant_reference.experts(x, gate, up, down, everything, "silu", *biases, scheme=scheme)
    assert_near(backend.all_experts(x, packed), expected, backend.dtype, scheme)


@pytest.mark.parametrize("edge", LINEAR_EDGES)
def test_cpu_linear(cpu_backend: CpuBackend, form: str, edge: str):
    check_linear(cpu_backend, form, edge)


@pytest.mark.parametrize("edge", EXPERT_EDGES)
def test_cpu_experts(cpu_backend: CpuBackend, form: str, edge: str):
    check_experts(cpu_backend, form, edge)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_backend(form: str, dtype: torch.dtype):
    # torch's own product does not promise part of a matrix the bits of the whole.
    check_linear(TorchBackend("cpu", dtype), form, "ragged default model", bitwise=dtype != torch.float32)
    check_experts(TorchBackend("cpu", dtype), form, "nothing is a multiple")


def numpy_products_ignore_their_place() -> bool:
    """Whether a column of NumPy's product, which the interpreter computes with, has the same bits wherever it is. On
    some processors it has not; a part of a matrix then has other bits than the whole, whatever the kernel does."""
    draw = np.random.default_rng(0)
    for rows, inputs, outputs in ((16, 32, 32), (16, 64, 64), (16, 32, 64), (16, 128, 32)):
        x, weight = (draw.standard_normal(shape).astype(np.float32) for shape in ((rows, inputs), (inputs, outputs)))
        order = draw.permutation(outputs)
        if not np.array_equal((x @ weight)[:, order], x @ weight[:, order]):
            return False
    return True


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted kernels run without a GPU")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # lanes that the interpreter computes and a mask discards
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_interpreted(form: str, dtype: torch.dtype):
    backend = TritonBackend("cpu", dtype)
    check_linear(backend, form, "odd inputs", bitwise=dtype != torch.float32 or numpy_products_ignore_their_place())
    check_experts(backend, form, "interpreted")


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted kernels run without a GPU")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_triton_interpreted_as_on_hardware_with_fp8():
    backend = TritonBackend("cpu", torch.bfloat16)
    backend.planner.device = H100
    check_linear(backend, "fp8 blocks", "odd inputs")
    check_experts(backend, "fp8 blocks", "interpreted")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 130, 2000])  # a group that is nearly empty, more groups than a program takes
@pytest.mark.parametrize("scheme", [ActivationScheme("int8", 32), INT8_PER_GROUP, FP8_PER_GROUP], ids=str)
def test_triton_rounds_rows_as_the_oracle_does(scheme: ActivationScheme, width: int, dtype: torch.dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(6, width + 5).to(device, dtype)[:, :width]
    x[1], x[2], x[3] = 0.0, x[2] * 1e4, x[3] * 1e-4
    rounded, (launch,) = plan_rows(x, scheme)
    launch.run()
    codes = rounded.codes if scheme.kind == "int8" else rounded.codes.view(torch.float8_e4m3fn)
    assert scheme.group is not None
    scales = rounded.scales.repeat_interleave(scheme.group, 1)[:, :width]
    assert torch.equal(codes.float() * scales, quant_reference.round_rows(x, scheme))


def test_a_row_that_is_not_finite_stays_so_on_triton():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for scheme in (INT8_PER_GROUP, FP8_PER_GROUP):
        x = torch.ones(3, 300, device=device)
        x[0, 5], x[2, 299] = torch.nan, torch.inf
        rounded, (launch,) = plan_rows(x, scheme)
        launch.run()
        assert rounded.scales.isnan().tolist() == [[True, False, False], [False] * 3, [False, False, True]]


def test_a_row_does_not_depend_on_the_rows_beside_it(cpu_backend: CpuBackend, form: str):
    backend = cpu_backend
    quantize, scheme = FORMATS[form]
    linear = backend.pack_quantized_linear(quantize(torch.randn(70, 300)), None, scheme)
    x = torch.randn(29, 300).to(backend.dtype)
    together = backend.linear(x, linear)
    for first, last in ((0, 1), (1, 4), (4, 11), (11, 29)):
        assert torch.equal(backend.linear(x[first:last], linear), together[first:last])

    gate, up, down = (quantize(torch.randn(4, 48, 48) / 7) for _ in range(3))
    experts = backend.pack_quantized_experts(gate, up, down, "silu", scheme=scheme)
    x = torch.randn(29, 48).to(backend.dtype)
    ids_TK = torch.stack([torch.randperm(4)[:2] for _ in range(29)]).int()
    weights_TK = torch.rand(29, 2)
    together = backend.experts(x, experts, Routing(expert_ids_TK=ids_TK, weights_TK=weights_TK))
    for first, last in ((0, 1), (1, 4), (4, 29)):
        part = Routing(expert_ids_TK=ids_TK[first:last], weights_TK=weights_TK[first:last])
        assert torch.equal(backend.experts(x[first:last], experts, part), together[first:last])


def test_packed_sizes_are_those_of_the_codes_and_scales():
    backend = CpuBackend("cpu", torch.bfloat16)
    weight = torch.randn(512, 1024)
    plain = 2 * weight.numel()
    for form, share in {
        "int8": 0.505,
        "int8 g32": 0.532,
        "int4 g64": 0.267,
        "int4 g128 asymmetric": 0.283,
        "fp8": 0.505,
    }.items():
        quantize, scheme = FORMATS[form]
        assert backend.pack_quantized_linear(quantize(weight), None, scheme).nbytes <= share * plain


# Not those whose scales are for several rows, or of a width of their own.
@pytest.mark.parametrize("form", [name for name in FORMATS if "blocks" not in name and "_k" not in name])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_of_16_bits_give_the_same_bits_as_wide_ones(cpu_backend: CpuBackend, form: str, dtype: torch.dtype):
    quantize, scheme = FORMATS[form]
    weight = quantize(torch.randn(70, 300))
    weight = replace(weight, scale=weight.scale.to(dtype))
    if getattr(weight, "offset", None) is not None:
        weight = replace(weight, offset=weight.offset.to(dtype))
    wide_scale = weight.scale.float()
    wide_scale[0] = 1 / 3  # no number of 16 bits, so that all become wide
    narrow, wide = (
        cpu_backend.pack_quantized_linear(w, None, scheme) for w in (weight, replace(weight, scale=wide_scale))
    )
    assert narrow.nbytes < wide.nbytes
    x = torch.randn(14, 300).to(cpu_backend.dtype)
    assert torch.equal(cpu_backend.linear(x, narrow)[:, 1:], cpu_backend.linear(x, wide)[:, 1:])
    ids = torch.arange(1, 70)
    assert torch.equal(cpu_backend.weight_rows(narrow, ids), cpu_backend.weight_rows(wide, ids))


@pytest.mark.parametrize(
    "scale", [0.0, 2.0**-14, 65504.0, 2.0**-15, 2.0**-24, 2.0**-126, 2.0**-20 + 2.0**-30, 1e5, torch.inf]
)
def test_scales_at_the_ends_of_16_bits(scale: float):
    weight = replace(rounding.quantize_int8(torch.randn(3, 8)), scale=torch.tensor([[1.0], [scale], [-scale]]))
    weight.data[1:] = 1
    packed = CpuBackend("cpu", torch.float32).pack_quantized_linear(weight, None, UNQUANTIZED)
    rows = CpuBackend("cpu", torch.float32).weight_rows(packed, torch.arange(3))
    assert torch.equal(rows, weight.dequantize())


def test_a_row_that_is_not_finite_stays_so(cpu_backend: CpuBackend, form: str):
    quantize, scheme = FORMATS[form]
    linear = cpu_backend.pack_quantized_linear(quantize(torch.randn(40, 96)), None, scheme)
    x = torch.randn(3, 96).to(cpu_backend.dtype)
    x[1, 50] = float("nan")
    out = cpu_backend.linear(x, linear)
    assert out[1].isnan().all()
    assert out[0].isfinite().all()
    assert out[2].isfinite().all()


def test_refusals():
    backend = CpuBackend("cpu", torch.float32)
    int4, int8 = rounding.quantize_int4(torch.randn(2, 3, 64)), rounding.quantize_int8(torch.randn(2, 3, 64))
    with pytest.raises(ValueError, match="int8 activations of int4 weights share scales by 64, not by 128"):
        backend.pack_quantized_linear(int4.expert(0), None, INT8_PER_GROUP)
    with pytest.raises(ValueError, match="int8 activations do not go with fp8 weights"):
        backend.pack_quantized_linear(rounding.quantize_fp8(torch.randn(3, 64)), None, INT8_PER_GROUP)
    with pytest.raises(ValueError, match="one scale per output of int8 weights, not with groups of 32"):
        backend.pack_quantized_linear(rounding.quantize_int8(torch.randn(3, 64), group=32), None, INT8_PER_GROUP)
    with pytest.raises(ValueError, match="one format"):
        backend.pack_quantized_experts(int4, int8, rounding.quantize_int8(torch.randn(2, 64, 3)), "silu")
    with pytest.raises(ValueError, match="do not fit together"):
        backend.pack_quantized_experts(int4, int4, int4, "silu")
    broken = rounding.quantize_fp8(torch.randn(4, 4))
    broken.data.view(torch.uint8)[1, 1] = 0x7F
    with pytest.raises(ValueError, match="holds NaN"):
        backend.pack_quantized_linear(broken)
