"""Layers that run in one call of the C++ kernels give the bits that their operations give one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dynamoe.dynamic.model.decoder import Decoder
from dynamoe.dynamic.model.kv_cache import allocate_layers
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.exits.segments import Segment
from dynamoe.kernels.api.types import AttentionBatch, ExpertBudget, KVLayer, StateLayer

PAGE = 4
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},  # dense, with biases
    "mistral": {"sliding_window": 5},
    "qwen3": {},  # norms of each head
    "mixtral": {},
    "olmoe": {},  # norms of the full width
    "granitemoe": {"residual_multiplier": 0.3},
    "qwen3_moe": {},
    "qwen2_moe": {},  # a shared expert with a gate
    "granitemoeshared": {"residual_multiplier": 0.3},
    "glm4_moe": {"n_group": 4, "topk_group": 2},  # a selection bias, groups, logits in float32
    "ernie4_5_moe": {},  # the least sum of weights
}


def one_by_one(decoder: Decoder) -> Decoder:
    plain = copy.copy(decoder)
    plain.stack = None
    return plain


def batch_of(starts: list[int], counts: list[int]) -> AttentionBatch:
    """Sequences of ``starts`` tokens that get ``counts`` more; each has 8 pages of its own, in falling order, and two
    slots of states, in one of which those of longer ones are kept as they are behind these rows."""
    pages = [[8 * s + 7 - p for p in range(8)] for s in range(len(starts))]
    positions = [start + i for start, count in zip(starts, counts, strict=True) for i in range(count)]
    owners = [s for s, count in enumerate(counts) for _ in range(count)]
    slots = [pages[s][p // PAGE] * PAGE + p % PAGE for s, p in zip(owners, positions, strict=True)]
    boundaries = [sum(counts[:n]) for n in range(len(counts) + 1)]
    lengths = [start + count for start, count in zip(starts, counts, strict=True)]
    return AttentionBatch(
        positions_T=torch.tensor(positions),
        slots_T=torch.tensor(slots),
        query_start_S1=torch.tensor(boundaries, dtype=torch.int32),
        context_len_S=torch.tensor(lengths, dtype=torch.int32),
        block_table_SM=torch.tensor(pages, dtype=torch.int32),
        max_query_len=max(counts),
        max_context_len=max(lengths),
        state_slots_S=torch.arange(len(starts)) * 2,
        kept_slots_S=torch.tensor([2 * s + 1 if length > 9 else -1 for s, length in enumerate(lengths)]),
    )


def budget_of(rows: int, layers: int, generator: torch.Generator) -> ExpertBudget:
    """Random limits; every third row has none."""
    keep_TL = torch.rand(rows, layers, generator=generator)
    cap_TL = torch.randint(1, 4, (rows, layers), dtype=torch.int32, generator=generator)
    keep_TL[::3], cap_TL[::3] = 1.0, 99
    return ExpertBudget(keep_TL=keep_TL, cap_TL=cap_TL, skipped_T=torch.zeros(rows, dtype=torch.int64))


def steps(decoder: Decoder, limited: bool = False) -> tuple[list[torch.Tensor], list[KVLayer]]:
    """A prefill and two decodes, in two segments, with the routers' entropy, and with budgets if they are asked for."""
    kv = allocate_layers(decoder.spec, 24, PAGE, decoder.kv_dtype, torch.device("cpu"), num_states=6)
    for layer in kv:
        for states in layer.states if isinstance(layer, StateLayer) else ():
            states.fill_(float("nan"))
        for pages in (layer.keys_BGPC, layer.values_BGPC):
            pages.view(torch.uint8).fill_(255)  # NaN in every floating dtype, and NaN as the scale of codes
    found, layers = [], decoder.spec.num_layers
    generator = torch.Generator().manual_seed(0)
    for starts, counts in (([0, 0, 0], [9, 1, 14]), ([9, 1, 14], [1, 1, 1]), ([10, 2, 15], [1, 5, 1])):
        tokens_T = torch.randint(3, 300, (sum(counts),), generator=generator)
        x_TD, entropy_T = decoder.embed(tokens_T), torch.zeros(len(tokens_T))
        budget = budget_of(len(tokens_T), layers, generator) if limited else None
        for segment in (range(1), range(1, layers)):
            batch = batch_of(starts, counts)
            x_TD = decoder.run_segment(Segment(index=0, layers=segment), x_TD, kv, batch, entropy_T, budget)
            found += [x_TD.clone(), entropy_T.clone()]  # the next segment overwrites them
            found += [] if budget is None else [budget.skipped_T.clone()]
    return found, kv


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stack_equals_its_operations(make_checkpoint: Callable[..., Path], family: str, dtype: str) -> None:
    path = make_checkpoint(family, num_hidden_layers=3, **FAMILIES[family])
    decoder = load_decoder(path, dtype=dtype, backend="cpu")
    assert decoder.stack is not None
    assert_equal_steps(decoder, limited=False)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "llama", "glm4_moe"])
def test_a_stack_with_budgets_equals_its_operations(
    make_checkpoint: Callable[..., Path], family: str, dtype: str, calibrated: bool
) -> None:
    decoder = load_decoder(make_checkpoint(family, num_hidden_layers=3), dtype=dtype, backend="cpu")
    if calibrated and family != "llama":
        generator = torch.Generator().manual_seed(1)
        scales = [torch.rand(layer.ffn.num_experts, generator=generator) for layer in decoder.layers]
        decoder.layers = tuple(
            replace(layer, contribution_scale_E=scale_E) for layer, scale_E in zip(decoder.layers, scales, strict=True)
        )
        decoder.stack = decoder.make_stack()
    found = assert_equal_steps(decoder, limited=True)
    assert (int(found[-1].sum()) > 0) == (family != "llama")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stack_over_codes_equals_its_operations(make_checkpoint: Callable[..., Path], dtype: str) -> None:
    path = make_checkpoint("mixtral", num_hidden_layers=3)
    decoder = load_decoder(path, dtype=dtype, backend="cpu", kv_cache_dtype="int8")
    assert_equal_steps(decoder, limited=False)


@pytest.mark.parametrize("method", ["int8", "w8a8", "int4-g32-asym", "fp8-block"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2", "glm4_moe", "qwen2_moe"])
def test_a_stack_of_quantised_layers_equals_its_operations(
    make_checkpoint: Callable[..., Path], family: str, method: str
) -> None:
    decoder = load_decoder(make_checkpoint(family, num_hidden_layers=3), backend="cpu", quantization=method)
    assert decoder.stack is not None
    assert_equal_steps(decoder, limited=family != "qwen2")


def assert_equal_steps(decoder: Decoder, limited: bool) -> list[torch.Tensor]:
    found, kv = steps(decoder, limited)
    expected, expected_kv = steps(one_by_one(decoder), limited)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(kv, expected_kv, strict=True):
        if isinstance(ours, StateLayer):
            assert isinstance(theirs, StateLayer)
            for states, wanted in zip(ours.states, theirs.states, strict=True):
                assert torch.equal(states.nan_to_num(7.0), wanted.nan_to_num(7.0))
            assert [states.isnan().any().item() for states in ours.states[0]] == [slot == 3 for slot in range(6)]
            continue
        assert torch.equal(ours.keys_BGPC.nan_to_num(7.0), theirs.keys_BGPC.nan_to_num(7.0))
        assert torch.equal(ours.values_BGPC.nan_to_num(7.0), theirs.values_BGPC.nan_to_num(7.0))
    return found


def test_backends_without_a_stack_run_operation_by_operation(make_checkpoint: Callable[..., Path]) -> None:
    assert load_decoder(make_checkpoint("mixtral"), backend="torch", device="cpu").stack is None


def test_arguments_that_do_not_fit_are_refused(make_checkpoint: Callable[..., Path]) -> None:
    decoder = load_decoder(make_checkpoint("mixtral"), dtype="float32", backend="cpu")
    kv = allocate_layers(decoder.spec, 24, PAGE, decoder.dtype, torch.device("cpu"))
    assert decoder.stack is not None
    x_TD, batch, tables = decoder.embed(torch.tensor([5, 6, 7])), batch_of([0], [3]), decoder.distinct_tables
    layers = range(decoder.spec.num_layers)
    with pytest.raises(ValueError, match="x must be float32"):
        decoder.stack.run(layers, x_TD[:, 1:], kv, tables, batch)
    with pytest.raises(ValueError, match="keys and values of every layer"):
        decoder.stack.run(layers, x_TD, kv[1:], tables, batch)
    with pytest.raises(ValueError, match="one entry per row"):
        decoder.stack.run(layers, x_TD[:2], kv, tables, batch)
    with pytest.raises(IndexError, match="rotary table"):
        decoder.stack.run(layers, x_TD, kv, [tables[0][:2]], batch)
    with pytest.raises(ValueError, match=r"layers 0 … 99"):
        decoder.stack.run(range(99), x_TD, kv, tables, batch)
    short = ExpertBudget(
        keep_TL=torch.ones(3, 1), cap_TL=torch.ones(3, 1).int(), skipped_T=torch.zeros(3, dtype=torch.int64)
    )
    with pytest.raises(ValueError, match="each of 3 rows and 3 layers"):
        decoder.stack.run(layers, x_TD, kv, tables, batch, budget=short)
    with pytest.raises(ValueError, match="exits and 3 rows"):
        decoder.stack.run_with_exits(x_TD, kv, tables, batch, torch.zeros(1, 3))
