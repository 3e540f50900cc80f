"""A row's result is bitwise the same alone, among others, in chunks of a prompt, and on any number of threads."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from dynamoe.kernels.api import rounding
from dynamoe.kernels.api.formats import FP8_PER_GROUP, INT8_PER_GROUP, UNQUANTIZED, ActivationScheme
from dynamoe.kernels.api.router_spec import RouterSpec
from dynamoe.kernels.api.types import AttentionBatch, KVLayer, Routing
from dynamoe.kernels.cpu.backend import CpuBackend

CUTS = ((0, 1, 2, 3, 7, 20, 33, 61, 150), (0, 149, 150), (0, 75, 150), (0, 150))


@pytest.fixture
def backend(cpu_backend: CpuBackend) -> CpuBackend:
    return cpu_backend


def in_parts(run, cuts: tuple[int, ...]) -> torch.Tensor:
    return torch.cat([run(slice(first, last)) for first, last in itertools.pairwise(cuts)])


def assert_same_in_all_parts(run) -> None:
    """``run(rows)`` for slices of 150 rows, together and in parts, with one thread and with three."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results += [in_parts(run, cuts) for cuts in CUTS]
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize(("outputs", "inputs"), [(96, 64), (100, 577), (33, 2050)])
def test_linear(backend: CpuBackend, outputs: int, inputs: int):
    packed = backend.pack_linear(torch.randn(outputs, inputs).to(backend.dtype), torch.randn(outputs))
    x = torch.randn(150, inputs).to(backend.dtype)
    assert_same_in_all_parts(lambda rows: backend.linear(x[rows], packed))
    assert_same_in_all_parts(lambda rows: backend.logits_linear(x[rows], packed))


@pytest.mark.parametrize("counts", [False, True])
def test_experts(backend: CpuBackend, counts: bool):
    e, f, d, k = 8, 40, 72, 3
    packed = backend.pack_experts(
        *(torch.randn(s).to(backend.dtype) for s in ((e, f, d), (e, f, d), (e, d, f))), "silu"
    )
    x = torch.randn(150, d).to(backend.dtype)
    spec = RouterSpec(num_experts=e, top_k=k, renormalize=True)
    routing = backend.route(torch.randn(150, e), spec)
    counts_T = torch.randint(k + 1, (150,)).int() if counts else None

    def run(rows: slice) -> torch.Tensor:
        part = Routing(
            expert_ids_TK=routing.expert_ids_TK[rows],
            weights_TK=routing.weights_TK[rows],
            counts_T=None if counts_T is None else counts_T[rows],
        )
        return backend.experts(x[rows], packed, part)

    assert_same_in_all_parts(run)
    assert_same_in_all_parts(lambda rows: backend.all_experts(x[rows], packed))


QUANTIZED: dict[str, tuple[Callable[..., Any], ActivationScheme]] = {
    "int8": (rounding.quantize_int8, UNQUANTIZED),
    "int8 in groups": (partial(rounding.quantize_int8, group=32), UNQUANTIZED),
    "w8a8": (rounding.quantize_int8, INT8_PER_GROUP),
    "int4": (rounding.quantize_int4, UNQUANTIZED),
    "w4a8": (rounding.quantize_int4, ActivationScheme("int8", 64)),
    "fp8 blocks": (partial(rounding.quantize_fp8, block=True), FP8_PER_GROUP),
}


@pytest.mark.parametrize("form", QUANTIZED)
def test_quantised_weights(backend: CpuBackend, form: str):
    quantize, scheme = QUANTIZED[form]
    linear = backend.pack_quantized_linear(quantize(torch.randn(33, 300)), torch.randn(33), scheme)
    x = torch.randn(150, 300).to(backend.dtype)
    assert_same_in_all_parts(lambda rows: backend.linear(x[rows], linear))
    e, f, d, k = 8, 40, 72, 3
    gate, up, down = (quantize(torch.randn(s)) for s in ((e, f, d), (e, f, d), (e, d, f)))
    packed = backend.pack_quantized_experts(gate, up, down, "silu", scheme=scheme)
    routing = backend.route(torch.randn(150, e), RouterSpec(num_experts=e, top_k=k, renormalize=True))

    def run(rows: slice) -> torch.Tensor:
        part = Routing(expert_ids_TK=routing.expert_ids_TK[rows], weights_TK=routing.weights_TK[rows])
        return backend.experts(x[rows, :d], packed, part)

    assert_same_in_all_parts(run)


def test_row_operations(backend: CpuBackend):
    x, residual = (torch.randn(150, 577).to(backend.dtype) for _ in range(2))
    weight = torch.randn(577).to(backend.dtype)
    assert_same_in_all_parts(lambda rows: backend.rms_norm(x[rows], weight, 1e-6))
    assert_same_in_all_parts(lambda rows: backend.add_rms_norm(x[rows], residual[rows].clone(), weight, 1e-6, 0.3)[0])
    spec = RouterSpec(num_experts=577, top_k=9)
    assert_same_in_all_parts(lambda rows: backend.route(x[rows], spec).weights_TK)


@pytest.mark.parametrize("window", [None, 90, 300])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (4, 4), (16, 2)])
def test_attention_with_its_cache(backend: CpuBackend, heads: int, kv_heads: int, window: int | None):
    """Prompts written and attended to in chunks, behind 600 tokens that were there before, beside another sequence."""
    channels, page, before, rows_of_prompt = 64, 16, 600, 150
    pages = -(-(before + rows_of_prompt) // page)
    table = torch.randperm(2 * pages).int().view(2, pages)
    q, k, v = (torch.randn(rows_of_prompt, h, channels).to(backend.dtype) for h in (heads, kv_heads, kv_heads))
    cos_sin = torch.randn(before + rows_of_prompt, channels)
    old = [torch.randn(2 * pages, kv_heads, page, channels).to(backend.dtype) for _ in range(2)]
    layer = KVLayer(keys_BGPC=old[0], values_BGPC=old[1])

    def batch(rows: slice, beside: bool) -> AttentionBatch:
        positions = before + torch.arange(rows.start, rows.stop)
        slots = table[0][positions // page].long() * page + positions % page
        count = len(positions)
        if beside:  # one more row, of a sequence that was decoding
            positions = torch.cat((positions, torch.tensor([17])))
            slots = torch.cat((slots, table[1, 1:2].long() * page + 1))
        ends = [0, count, count + 1] if beside else [0, count]
        lengths = [int(positions[count - 1]) + 1, 18] if beside else [int(positions[-1]) + 1]
        return AttentionBatch(
            positions_T=positions,
            slots_T=slots,
            query_start_S1=torch.tensor(ends, dtype=torch.int32),
            context_len_S=torch.tensor(lengths, dtype=torch.int32),
            block_table_SM=table[: len(lengths)],
            max_query_len=count,
            max_context_len=max(lengths),
        )

    def run(rows: slice, beside: bool) -> torch.Tensor:
        parts = [torch.cat((t[rows], t[:1])) if beside else t[rows] for t in (q, k, v)]
        this = batch(rows, beside)
        rotated = backend.rope_and_write(*parts, cos_sin, this, layer)
        return backend.attention(rotated, layer, this, scale=0.125, window=window)[: rows.stop - rows.start]

    assert_same_in_all_parts(lambda rows: torch.cat((run(rows, False), run(rows, True)), -1))
