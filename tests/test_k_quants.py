"""GGUF's K-quants: blocks of bytes as weights, bit by bit those of the gguf package; layers of several formats."""

from __future__ import annotations

import pytest
import torch
from dynamoe.dynamic.checkpoint.k_quants import K_QUANTS, k_quant_weight
from dynamoe.kernels.api import rounding
from dynamoe.kernels.api.format_join import concatenate, stack_experts
from dynamoe.kernels.api.formats import INT8, INT8_PER_GROUP, Q4_K
from dynamoe.kernels.api.quantized_weight import QuantizedWeight
from dynamoe.kernels.api.tolerance import QUANTIZED_TOLERANCE
from dynamoe.kernels.cpu.backend import CpuBackend
from dynamoe.kernels.reference import quantized as quant_reference
from dynamoe.kernels.torch.backend import TorchBackend
from dynamoe.kernels.triton.backend import TritonBackend
from gguf import GGMLQuantizationType, dequantize
from k_blocks import BYTES, k_blocks, k_weight, random_blocks

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# What a weight takes in memory, of what it takes in the file: 6-bit scales have 8.
MEMORY = {"Q4_K": 148 / 144, "Q5_K": 180 / 176, "Q6_K": 1.0}


@pytest.fixture(params=list(K_QUANTS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def theirs(kind: str, raw: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(dequantize(raw.numpy(), GGMLQuantizationType[kind]))


def random_weight(kind: str, outputs: int, inputs: int) -> QuantizedWeight:
    return k_quant_weight(random_blocks(kind, outputs, inputs), kind, (outputs, inputs))


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 256), (37, 768), (9, 1 << 20)])  # the last in several chunks
def test_weights_are_those_of_the_blocks_bit_by_bit(kind: str, outputs: int, inputs: int) -> None:
    raw = random_blocks(kind, outputs, inputs)
    weight = k_quant_weight(raw, kind, (outputs, inputs))
    assert weight.shape == (outputs, inputs)
    assert torch.equal(weight.dequantize(), theirs(kind, raw))
    assert weight.nbytes == pytest.approx(raw.numel() * MEMORY[kind], rel=1e-9)


def test_rounded_weights_are_near(kind: str) -> None:
    """So the encoder of the tests and the decoder agree on what is where."""
    weight_OI = torch.randn(5, 512)
    step = {"Q4_K": 1 / 3, "Q5_K": 1 / 6, "Q6_K": 1 / 12}[kind]
    assert (k_weight(kind, weight_OI).dequantize() - weight_OI).abs().max() < step


def test_parts_of_the_bytes_are_parts_of_the_weight(kind: str) -> None:
    raw, size = random_blocks(kind, 40, 768), BYTES[kind]
    whole = k_quant_weight(raw, kind, (40, 768))
    order = torch.randperm(40)
    assert torch.equal(k_quant_weight(raw[order], kind, (40, 768)).dequantize(), whole.dequantize()[order])
    part = k_quant_weight(raw[3:20, size : 3 * size], kind, (17, 512))
    same = whole.rows(3, 20).columns(256, 768)
    assert {n: t.tolist() for n, t in part.tensors().items()} == {n: t.tolist() for n, t in same.tensors().items()}
    experts = stack_experts([whole.rows(0, 10), whole.rows(10, 20)])
    joined = concatenate([experts.expert(0), experts.expert(1)])
    assert torch.equal(joined.dequantize(), whole.dequantize()[:20])
    with pytest.raises(ValueError, match="inputs from 128 on begin inside a group of 256"):
        whole.columns(128, 512)


@pytest.mark.parametrize("outputs", [1, 32, 70])
def test_cpu_products_with_scales_of_every_kind(cpu_backend: CpuBackend, kind: str, outputs: int) -> None:
    weight = random_weight(kind, outputs, 1024)
    packed = cpu_backend.pack_quantized_linear(weight)
    rows = cpu_backend.weight_rows(packed, torch.arange(outputs))
    assert torch.equal(rows, weight.dequantize().to(cpu_backend.dtype))
    x = torch.randn(17, 1024).to(cpu_backend.dtype)
    x[3] *= 1e4
    together, expected = cpu_backend.logits_linear(x, packed), quant_reference.linear(x, weight)
    # Scales lie orders of magnitude apart, so every product is measured by what it would be of random numbers.
    size = x.float().norm(dim=1, keepdim=True) * weight.dequantize().norm(dim=1) / 32
    assert ((together - expected).abs() <= QUANTIZED_TOLERANCE["none", cpu_backend.dtype] * size).all()
    for count in (1, 2, 7, 16, 17):
        assert torch.equal(cpu_backend.logits_linear(x[:count], packed), together[:count])


def test_packed_weights_take_what_the_file_takes(kind: str) -> None:
    raw = random_blocks(kind, 96, 1024)
    weight = k_quant_weight(raw, kind, (96, 1024))
    backend = CpuBackend("cpu", torch.bfloat16)
    assert backend.pack_quantized_linear(weight).nbytes == pytest.approx(raw.numel() * MEMORY[kind], rel=1e-9)
    experts = stack_experts([k_weight(kind, torch.randn(256, 256)) for _ in range(2)])
    packed = backend.pack_quantized_experts(experts, experts, experts, "silu")
    assert packed.nbytes == pytest.approx(6 * 256 * BYTES[kind] * MEMORY[kind], rel=1e-9)


def test_small_float16_scales_stay_narrow() -> None:
    """Those of Q8_0 blocks of small weights are subnormal numbers, beside others of 11 bits that bfloat16 has not."""
    weight_OI = torch.randn(64, 256) * torch.tensor([1.0, 1e-3]).repeat(32)[:, None]
    scale = (weight_OI.unflatten(1, (8, 32)).abs().amax(-1) / 127).half()
    assert (scale[1::2] < 2.0**-14).all()
    data = torch.randint(-127, 128, (64, 256), dtype=torch.int8)
    weight = QuantizedWeight(format=INT8, data=data, scale=scale, group=32)
    backend = CpuBackend("cpu", torch.float32)
    packed = backend.pack_quantized_linear(weight)
    assert packed.nbytes == weight.nbytes == 64 * 256 * 34 / 32
    assert torch.equal(backend.weight_rows(packed, torch.arange(64)), weight.dequantize())


def joined_parts() -> list[QuantizedWeight]:
    """Queries and keys in one format, values in another; none is a multiple of 32 outputs."""
    return [k_weight("Q4_K", torch.randn(40, 256)), k_weight("Q4_K", torch.randn(24, 256)),
            k_weight("Q6_K", torch.randn(20, 256)), rounding.quantize_int8(torch.randn(9, 256))]  # fmt: skip


def check_joined(backend: TorchBackend) -> None:
    queries, keys, *others = joined_parts()
    runs = [concatenate([queries, keys]), *others]
    bias = torch.randn(93).to(backend.dtype)
    apart = [backend.pack_quantized_linear(w, b) for w, b in zip(runs, bias.split([64, 20, 9]), strict=True)]
    joined = backend.join_linear(*apart)
    assert (joined.out_features, joined.in_features) == (93, 256)
    x = torch.randn(5, 256).to(backend.dtype)
    whole = backend.linear(x, joined)
    assert torch.equal(whole, torch.cat([backend.linear(x, part) for part in apart], 1))
    assert joined.nbytes == sum(part.nbytes for part in apart)
    for start in (0, 40, 64, 70, 84, 90):
        tail = backend.linear_tail(joined, start)
        assert tail.out_features == 93 - start
        torch.testing.assert_close(backend.linear(x, tail), whole[:, start:])
        behind = backend.linear_tail(tail, 2)
        torch.testing.assert_close(backend.linear(x, behind), whole[:, start + 2 :])


def test_cpu_layers_of_several_formats(cpu_backend: CpuBackend, caplog: pytest.LogCaptureFixture) -> None:
    check_joined(cpu_backend)
    quantised = cpu_backend.pack_quantized_linear(joined_parts()[0])
    assert not caplog.records
    for _ in range(2):
        cpu_backend.join_linear(quantised, cpu_backend.pack_linear(torch.randn(8, 256)))
    assert [record.getMessage() for record in caplog.records] == [
        "the cpu backend has no kernel for projections of which some are not quantised: torch's own operations run it"
    ]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("make", [TorchBackend, TritonBackend])
def test_layers_of_several_formats(make: type[TorchBackend]) -> None:
    check_joined(make("cpu", torch.float32))


def test_refusals() -> None:
    raw = random_blocks("Q4_K", 4, 512)
    for bytes_given, shape in ((raw, (4, 256)), (raw, (4, 500)), (raw[:3], (4, 512)), (raw.float(), (4, 512))):
        with pytest.raises(ValueError, match=r"in Q4_K are blocks of 144 bytes for 256 inputs, not torch\."):
            k_quant_weight(bytes_given, "Q4_K", shape)
    broken = k_blocks("Q6_K", torch.randn(4, 512))
    broken[1, 208:210] = torch.tensor([float("inf")]).half().view(torch.uint8)
    with pytest.raises(ValueError, match="1 of 8 scales of Q6_K blocks are not finite"):
        k_quant_weight(broken, "Q6_K", (4, 512))
    backend, weight = CpuBackend("cpu", torch.float32), random_weight("Q4_K", 4, 512)
    with pytest.raises(ValueError, match="int8 activations do not go with q4_k weights"):
        backend.pack_quantized_linear(weight, None, INT8_PER_GROUP)
    one_level = QuantizedWeight(format=Q4_K, data=weight.data, scale=weight.scales(), inputs=512, group=32)
    with pytest.raises(ValueError, match="q4_k weights have two levels of scales and of offsets, not data, scale"):
        backend.pack_quantized_linear(one_level)
    with pytest.raises(ValueError, match=r"outer scales must be torch\.float16 with shape"):
        QuantizedWeight(**{**vars(weight), "outer_scale": weight.outer_scale.float()})  # type: ignore[union-attr]
    up = random_weight("Q6_K", 256, 256)
    gate = stack_experts([random_weight("Q4_K", 256, 256)])
    with pytest.raises(ValueError, match="one format, not q4_k in groups of 32 and q6_k in groups of 16"):
        backend.pack_quantized_experts(gate, stack_experts([up]), gate, "silu")
