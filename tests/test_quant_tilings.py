"""Tilings of Triton's products with quantised weights: each against the oracle, how they are chosen, how tuned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from dynamoe.kernels.api import rounding
from dynamoe.kernels.api.formats import FP8_PER_GROUP, INT8_PER_GROUP, MXFP4, UNQUANTIZED, ActivationScheme
from dynamoe.kernels.api.quantized_weight import QuantizedWeight
from dynamoe.kernels.api.router_spec import RouterSpec
from dynamoe.kernels.api.tolerance import QUANTIZED_TOLERANCE, error
from dynamoe.kernels.api.types import Routing
from dynamoe.kernels.reference import quantized as quant_reference
from dynamoe.kernels.triton.backend import TritonBackend
from dynamoe.kernels.triton.device import A100, H100, LISTED, MI300X, DeviceProperties
from dynamoe.kernels.triton.launch import Launch
from dynamoe.kernels.triton.quant_tilings import quant_tilings
from dynamoe.kernels.triton.quantized import QuantConfig
from dynamoe.kernels.triton.quantized_layers import (
    LinearCall,
    LinearProblem,
    QuantExpertsCall,
    QuantProblem,
    QuantProduct,
    QuantTiles,
)
from dynamoe.kernels.triton.stored_weight import WeightKind
from dynamoe.kernels.triton.tune import tune_experts, tune_linear
from dynamoe.kernels.triton.tuning import TuningCache, shared_bytes
from dynamoe.kernels.triton.variants import Planner
from k_blocks import k_weight

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # lanes that the interpreter computes and a mask discards
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Quantize = Callable[[torch.Tensor], QuantizedWeight]


def mxfp4(weight: torch.Tensor) -> QuantizedWeight:
    """Random codes and powers of two of the shape of a weight."""
    *lead, inputs = weight.shape
    exponents = torch.randint(124, 128, (*lead, -(-inputs // 32)), dtype=torch.uint8)
    codes = MXFP4.codes.pack(torch.randint(16, weight.shape, dtype=torch.uint8))
    scale = exponents.view(torch.float8_e8m0fnu)
    return QuantizedWeight(format=MXFP4, data=codes, scale=scale, inputs=inputs, group=32)


FORMATS: dict[str, tuple[Quantize, ActivationScheme]] = {
    "int8": (rounding.quantize_int8, UNQUANTIZED),
    "w8a8": (rounding.quantize_int8, INT8_PER_GROUP),
    "int4": (partial(rounding.quantize_int4, group=64), UNQUANTIZED),
    "int4 with zero points": (partial(rounding.quantize_int4, group=32, symmetric=False), UNQUANTIZED),
    "w4a8": (partial(rounding.quantize_int4, group=32, symmetric=False), ActivationScheme("int8", 32)),
    "mxfp4": (mxfp4, UNQUANTIZED),
    "q4_k": (partial(k_weight, "Q4_K"), UNQUANTIZED),
    "q5_k": (partial(k_weight, "Q5_K"), UNQUANTIZED),
    "q6_k": (partial(k_weight, "Q6_K"), UNQUANTIZED),
    "fp8": (partial(rounding.quantize_fp8, block=True), FP8_PER_GROUP),
}
_SMALL = QuantConfig(block_m=16, block_n=32, block_k=32, num_warps=4, num_stages=2)
TILINGS = {
    "weights on the left": replace(_SMALL, swap=True),
    "descriptors": replace(_SMALL, tma=True),
    "descriptors, weights on the left": replace(_SMALL, tma=True, swap=True),
    "depth in parts": replace(_SMALL, splits=2),
    "depth in parts, weights on the left, descriptors": replace(_SMALL, splits=4, swap=True, tma=True),
}
EDGES = {
    # name: (rows, experts, experts per row, width, hidden size)
    "one row": (1, 4, 2, 64, 128),
    "no size is a multiple of a block, no descriptor addresses rows": (7, 5, 3, 41, 75),
    "K = E, more rows than a tile": (17, 2, 2, 32, 64),
    "more parts than steps, experts without rows": (3, 9, 1, 32, 32),
}
# Each tiling, format and edge at least once; all of them together are for the slow run.
SOME = (
    ("weights on the left", "int8", "K = E, more rows than a tile"),
    ("weights on the left", "w4a8", "one row"),
    ("descriptors", "int4", "K = E, more rows than a tile"),
    ("descriptors", "mxfp4", "no size is a multiple of a block, no descriptor addresses rows"),
    ("descriptors, weights on the left", "fp8", "one row"),
    ("depth in parts", "q4_k", "one row"),
    ("depth in parts", "w8a8", "more parts than steps, experts without rows"),
    ("depth in parts, weights on the left, descriptors", "q6_k", "K = E, more rows than a tile"),
    ("depth in parts, weights on the left, descriptors", "int4 with zero points", "one row"),
    ("descriptors", "q5_k", "more parts than steps, experts without rows"),
)


def run(launches: Sequence[Launch]) -> None:
    for launch in launches:
        launch.run()


def check(tiling: str, form: str, edge: str, device: DeviceProperties = A100) -> None:
    """A mixture; of one row, also a dense product with its first matrix."""
    rows, num_experts, top_k, width, hidden = EDGES[edge]
    backend, (quantize, scheme), config = TritonBackend(DEVICE, torch.float32), FORMATS[form], TILINGS[tiling]
    gate, up = (quantize(torch.randn(num_experts, width, hidden) / hidden**0.5) for _ in range(2))
    down = quantize(torch.randn(num_experts, hidden, width) / width**0.5)
    config = replace(config, block_k=min(config.block_k, gate.group or 32))
    biases = [torch.randn(num_experts, size) / 4 for size in (width, width, hidden)]
    x_TD = torch.randn(rows, hidden)
    ids_TK = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(rows)]).int()
    counts_T = torch.randint(0, top_k + 1, (rows,)).int() if rows > 1 else None
    routing = Routing(expert_ids_TK=ids_TK, weights_TK=torch.rand(rows, top_k), counts_T=counts_T)
    expected = quant_reference.experts(x_TD, gate, up, down, routing, "silu", *biases, scheme=scheme)
    packed = backend.pack_quantized_experts(gate, up, down, "silu", *biases, scheme=scheme)
    call = QuantExpertsCall.of(x_TD, packed.data, routing, "silu", torch.zeros(1, dtype=torch.int32))
    out_TD, launches = QuantTiles().plan(call, {"gate_up": config, "down": config}, device)
    run(launches)
    names = [launch.name for launch in launches]
    assert names.count("quant_sum_kernel") == (2 if config.splits > 1 else 0)
    assert error(out_TD, expected) <= QUANTIZED_TOLERANCE[scheme.kind, torch.float32]

    if rows > 1:
        return
    linear = backend.pack_quantized_linear(gate.expert(0), biases[0][0], scheme)
    product = LinearCall.of(x_TD, linear.data, torch.float32)
    out_TO, launches = QuantProduct().plan(product, {"linear": config}, device)
    run(launches)
    expected = quant_reference.linear(x_TD, gate.expert(0), biases[0][0], scheme)
    assert error(out_TO, expected) <= QUANTIZED_TOLERANCE[scheme.kind, torch.float32]


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted kernels run without a GPU")
@pytest.mark.parametrize(("tiling", "form", "edge"), SOME)
def test_some(tiling: str, form: str, edge: str) -> None:
    check(tiling, form, edge)


def test_some_are_at_least_one_of_each() -> None:
    for place, names in enumerate((TILINGS, FORMATS, EDGES)):
        assert {case[place] for case in SOME} == set(names)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted kernels run without a GPU")
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tiling", TILINGS)
def test_all(tiling: str, form: str, edge: str) -> None:
    check(tiling, form, edge)
    check(tiling, form, edge, H100)  # multiplies e4m3


KINDS = {
    "int8": (WeightKind("int8", 0), UNQUANTIZED),
    "w8a8": (WeightKind("int8", 0), INT8_PER_GROUP),
    "int4": (WeightKind("int4", 128, offsets=True), UNQUANTIZED),
    "w4a8": (WeightKind("int4", 64), ActivationScheme("int8", 64)),
    "mxfp4": (WeightKind("mxfp4", 32), UNQUANTIZED),
    "q4_k": (WeightKind("int4", 32, 256, offsets=True), UNQUANTIZED),
    "q6_k": (WeightKind("int6", 16, 256), UNQUANTIZED),
    "fp8": (WeightKind("fp8", 128), FP8_PER_GROUP),
}


def mixture(name: str, tokens: int, sizes: tuple[int, int, int, int] = (128, 8, 2048, 768)) -> QuantProblem:
    kind, scheme = KINDS[name]
    num_experts, top_k, hidden, width = sizes
    return QuantProblem(tokens, num_experts, top_k, hidden, width, "silu", torch.bfloat16, (kind, kind, kind), scheme)


@pytest.mark.parametrize("device", LISTED.values(), ids=LISTED)
@pytest.mark.parametrize("name", KINDS)
def test_every_format_has_several_tilings_that_fit(name: str, device: DeviceProperties) -> None:
    kind, scheme = KINDS[name]
    for tokens in (1, 64, 8192):
        for ranked in QuantTiles().tilings(mixture(name, tokens), device, 12):
            assert ranked["gate_up"][0].block_m == ranked["down"][0].block_m
            for problem, configs in zip(
                mixture(name, tokens).products(ranked["gate_up"][0].block_m), ranked.values(), strict=True
            ):
                assert len(set(configs)) == len(configs) > 1
                assert configs[0] == quant_tilings(problem, device, 1)[0]
                for config in configs:
                    assert shared_bytes(problem, config, device) <= device.shared_bytes
                    for group in (kind.group, scheme.group):
                        assert not group or group % config.block_k == 0
                    assert not config.tma or (device.has_tma and kind.bits in (4, 8))
                    assert not config.swap or (device.has_tma and config.block_n >= 64)


def linear(name: str, rows: int, outputs: int, inputs: int, device: DeviceProperties) -> QuantConfig:
    problem = LinearProblem(rows, outputs, inputs, *KINDS[name], torch.bfloat16)
    return QuantProduct().tilings(problem, device, 1)[0]["linear"][0]


def test_what_the_rule_chooses() -> None:
    many, few = (QuantTiles().tilings(mixture("int4", tokens), H100, 1)[0] for tokens in (8192, 64))
    assert [(c.block_m, c.tma, c.splits) for (c,) in many.values()] == [(64, True, 1)] * 2
    assert [(c.block_m, c.tma, c.splits) for (c,) in few.values()] == [(16, False, 1)] * 2
    # 32 tiles of 64 outputs leave most of a device idle; the depth has 32 steps.
    assert [linear("int4", rows, 2048, 2048, H100).splits for rows in (1, 16, 32, 64)] == [4, 4, 2, 1]
    assert linear("int4", 1, 2048, 256, H100).splits == 1  # four steps
    assert linear("int4", 1, 128, 16384, H100).splits == 8
    assert linear("int4", 1, 151936, 2048, H100).splits == 1  # tiles enough
    assert not linear("q6_k", 4096, 2048, 2048, H100).tma  # codes lie across bytes
    assert not linear("int4", 4096, 2048, 2048, A100).tma
    assert not linear("int8", 4096, 2048, 2040, H100).tma  # rows that begin between multiples of 16 bytes
    gated = [QuantTiles().tilings(mixture("q4_k", 8192), device, 1)[0]["gate_up"][0] for device in (A100, MI300X)]
    assert [config.block_n for config in gated] == [32, 16]


def test_gate_and_up_of_different_kinds_are_refused() -> None:
    """Equal formats are not enough: a kernel reads the scales of both alike."""
    kind, other = WeightKind("int4", 32, 256, offsets=True), WeightKind("int4", 32, offsets=True)
    problem = mixture("int4", 4)._replace(kinds=(kind, other, kind))
    assert QuantTiles().refuses(problem, H100) == "gate and up in different formats"
    assert QuantTiles().refuses(problem._replace(kinds=(kind, kind, other)), H100) is None


def cache(path: Path) -> TuningCache:
    return TuningCache("test", directory=path, shipped=path / "none")


def test_tuning_measures_quantised_products_and_routing_brings_their_tables(tmp_path: Path) -> None:
    backend = TritonBackend(DEVICE, torch.float32, cache(tmp_path))
    gate, up, down = (
        rounding.quantize_int4(torch.randn(6, *sizes), group=32) for sizes in ((64, 32), (64, 32), (32, 64))
    )
    packed = backend.pack_quantized_experts(gate, up, down, "silu")
    tried: dict[str, set[tuple]] = {}

    def measure(launches: Sequence[Launch]) -> float:
        first = launches[0]
        found = first.constexprs.get("BLOCK_M"), first.constexprs.get("BLOCK_N"), first.num_warps
        tried.setdefault(first.part, set()).add(found)
        return 1.0 if found[:2] == (32, 64) else 2.0

    arguments = (packed.data, 2, "silu", [32], backend._ticket())
    tune_experts(backend.planner, *arguments, measure=measure, candidates=6, dtype=torch.float32)
    assert len(tried["gate_up"]) > 4
    assert len(tried["down"]) > 4
    problem = QuantProblem.of(packed.data, "silu", torch.float32).of_rows(20, 2)  # shares what was measured for 32
    choice = Planner(backend.planner.device, cache(tmp_path)).choice(QuantExpertsCall, problem)
    assert [(c.block_m, c.block_n) for c in choice.tilings.values()] == [(32, 64)] * 2
    routing = backend.route(torch.randn(20, 6), RouterSpec(num_experts=6, top_k=2))
    assert routing.index.block_m == 32
    x_TD = torch.randn(20, 32)
    expected = quant_reference.experts(x_TD, gate, up, down, routing, "silu")
    assert error(backend.experts(x_TD, packed, routing), expected) <= QUANTIZED_TOLERANCE["none", torch.float32]

    head = backend.pack_quantized_linear(rounding.quantize_int8(torch.randn(64, 512)))
    tune_linear(backend.planner, head.data, [1], torch.float32, lambda launches: 1.0 / len(launches), candidates=40)
    problem = LinearCall.of(torch.randn(1, 512), head.data, torch.float32).problem()
    assert backend.planner.choice(LinearCall, problem).tilings["linear"].splits > 1  # two launches are the fastest here
