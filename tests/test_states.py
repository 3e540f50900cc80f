"""Recurrent states: what one row reads and writes, and that no cut into steps and no neighbour changes a bit."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from dynamoe.dynamic.engine.state_slots import StateSlots
from dynamoe.kernels.api.types import AttentionBatch
from dynamoe.kernels.reference import elementwise
from dynamoe.kernels.reference.states import recurrence, short_convolution
from dynamoe.kernels.torch.backend import TorchBackend

LENGTHS, SLOTS = (37, 1, 12), (3, 0, 2)
CUTS = ((0, 37), (0, 1, 2, 3, 20, 37), (0, 16, 32, 37))


def state_batch(runs: list[tuple[int, int, int]]) -> AttentionBatch:
    """Rows of sequences: (slot, rows, tokens with these)."""
    slots, counts, lengths = (torch.tensor(numbers) for numbers in zip(*runs, strict=True))
    none = torch.empty(0, dtype=torch.int64)
    return AttentionBatch(
        positions_T=none,
        slots_T=none,
        query_start_S1=F.pad(counts.cumsum(0), (1, 0)).int(),
        context_len_S=lengths.int(),
        block_table_SM=none,
        max_query_len=int(counts.max()),
        max_context_len=int(lengths.max()),
        state_slots_S=slots,
    )


class Recurrence:
    """Random inputs of one sequence, run in pieces."""

    def __init__(self, length: int, delta_rule: bool, seed: int, sizes: tuple[int, int, int, int] = (2, 4, 16, 24)):
        groups, heads, keys, values = sizes
        generator = torch.Generator().manual_seed(seed)
        shapes = (length, groups, keys), (length, groups, keys), (length, heads, values), (length, heads)
        self.inputs = [torch.randn(shape, generator=generator) for shape in (*shapes, (length, heads))]
        self.inputs[3:] = [elementwise.sigmoid(part) for part in self.inputs[3:]]
        self.delta_rule = delta_rule
        self.state_shape = (heads, keys, values)

    def rows(self, first: int, end: int) -> list[torch.Tensor]:
        return [part[first:end] for part in self.inputs]


def nan_states(*shape: int) -> torch.Tensor:
    return torch.full((5, *shape), float("nan"))


@pytest.mark.parametrize("delta_rule", [True, False], ids=["delta", "plain"])
def test_recurrence_is_that_of_the_formula(delta_rule: bool) -> None:
    case = Recurrence(21, delta_rule, 0)
    q, k, v, decay, step = case.inputs
    states = nan_states(*case.state_shape)
    out_THV = recurrence(*case.inputs, states, state_batch([(1, 21, 21)]), delta_rule=delta_rule)
    if delta_rule:
        q, k = F.normalize(q, dim=-1) * q.shape[-1] ** -0.5, F.normalize(k, dim=-1)
    for head in range(v.shape[1]):
        memory = torch.zeros(case.state_shape[1:])
        for row in range(21):
            key, value = k[row, head // 2], v[row, head]
            memory = decay[row, head] * memory
            seen = memory.T @ key if delta_rule else 0
            memory = memory + step[row, head] * torch.outer(key, value - seen)
            torch.testing.assert_close(out_THV[row, head], memory.T @ q[row, head // 2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(states[1, head], memory, rtol=1e-4, atol=1e-5)


def test_the_delta_rule_is_that_of_transformers() -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    case = Recurrence(70, True, 1)
    q, k, v, decay, step = (part[None] for part in case.inputs)
    expected, memory = torch_chunk_gated_delta_rule(
        q, k, v, g=decay.log(), beta=step, use_qk_l2norm_in_kernel=True, output_final_state=True
    )
    states = nan_states(*case.state_shape)
    out_THV = recurrence(*case.inputs, states, state_batch([(4, 70, 70)]), delta_rule=True)
    torch.testing.assert_close(out_THV, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states[4], memory[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: "-".join(map(str, cut)))
@pytest.mark.parametrize("delta_rule", [True, False], ids=["delta", "plain"])
def test_no_cut_and_no_neighbour_changes_a_recurrence(cut: tuple[int, ...], delta_rule: bool) -> None:
    cases = [Recurrence(length, delta_rule, seed) for seed, length in enumerate(LENGTHS)]
    states = nan_states(*cases[0].state_shape)
    alone = [
        recurrence(*case.inputs, states, state_batch([(slot, length, length)]), delta_rule=delta_rule)
        for case, slot, length in zip(cases, SLOTS, LENGTHS, strict=True)
    ]
    whole, states = states, nan_states(*cases[0].state_shape)
    found: list[list[torch.Tensor]] = [[] for _ in cases]
    for first, end in pairwise(cut):
        pieces = [(s, min(first, length), min(end, length)) for s, length in enumerate(LENGTHS) if first < length]
        batch = state_batch([(SLOTS[s], last - start, last) for s, start, last in pieces])
        inputs = [torch.cat(parts) for parts in zip(*(cases[s].rows(a, b) for s, a, b in pieces), strict=True)]
        out_THV = recurrence(*inputs, states, batch, delta_rule=delta_rule)
        for (s, _, _), rows in zip(pieces, out_THV.split([b - a for _, a, b in pieces]), strict=True):
            found[s].append(rows)
    for expected, rows in zip(alone, found, strict=True):
        assert torch.equal(torch.cat(rows), expected)
    assert torch.equal(states[list(SLOTS)], whole[list(SLOTS)])
    assert states[[1, 4]].isnan().all(), "slots of others were written"


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: "-".join(map(str, cut)))
def test_convolution_is_torchs_and_no_cut_changes_it(cut: tuple[int, ...], activation: str) -> None:
    x_TX, weight_WX, bias_X = torch.randn(37, 40), torch.randn(4, 40), torch.randn(40)
    tails, pieces = nan_states(3, 40), []
    for first, end in pairwise(cut):
        batch = state_batch([(2, end - first, end)])
        pieces.append(short_convolution(x_TX[first:end], weight_WX, bias_X, tails, batch, activation))
    expected = F.conv1d(x_TX.T[None], weight_WX.T[:, None], bias_X, padding=3, groups=40)[0, :, :37].T
    expected = F.silu(expected) if activation == "silu" else expected
    torch.testing.assert_close(torch.cat(pieces), expected, rtol=1e-4, atol=1e-5)
    whole = short_convolution(x_TX, weight_WX, bias_X, nan_states(3, 40), state_batch([(0, 37, 37)]), activation)
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(tails[2], x_TX[-3:])


@pytest.mark.parametrize("name", ["sigmoid", "silu", "softplus"])
def test_functions_of_numbers_do_not_see_the_other_rows(name: str) -> None:
    function, torchs = getattr(elementwise, name), getattr(F, name)
    x_TX = torch.randn(37, 6) * 5
    rows = torch.cat([function(x_TX[row : row + 1].clone()) for row in range(37)])
    assert torch.equal(rows, function(x_TX))
    torch.testing.assert_close(function(x_TX), torchs(x_TX))
    extremes = torch.tensor([-200.0, -90.0, 0.0, 90.0, 200.0])
    torch.testing.assert_close(function(extremes), torchs(extremes))


def test_a_slot_is_copied_before_it_is_used_again() -> None:
    slots = StateSlots(3)
    first = slots.take()
    copy = slots.take_copy(first)
    slots.release(first)
    assert slots.copies() == [(first, copy)]
    assert slots.copies() == []
    assert {slots.take(), slots.take()} == {0, 1, 2} - {copy}


def test_a_batch_without_slots_is_refused() -> None:
    backend, case = TorchBackend("cpu", torch.float32), Recurrence(1, True, 0)
    batch = state_batch([(0, 1, 1)])
    object.__setattr__(batch, "state_slots_S", None)
    with pytest.raises(AssertionError, match="states"):
        backend.recurrence(*case.inputs, nan_states(*case.state_shape), batch, delta_rule=True)
