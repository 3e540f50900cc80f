"""Recurrent states: what one row reads and writes, and that no cut into steps and no neighbour changes a bit."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dynamoe.dynamic.engine.state_slots import StateSlots
from dynamoe.dynamic.engine.state_snapshots import LEAST_STRIDE, StateSnapshots
from dynamoe.kernels.api.tolerance import TOLERANCE, error
from dynamoe.kernels.api.types import AttentionBatch
from dynamoe.kernels.cpu import build as cpu_build
from dynamoe.kernels.cpu.backend import CpuBackend
from dynamoe.kernels.reference import elementwise
from dynamoe.kernels.reference import states as oracle
from dynamoe.kernels.torch.backend import TorchBackend
from dynamoe.kernels.triton.backend import TritonBackend
from dynamoe.kernels.triton.variants import interpreted

pytestmark = pytest.mark.usefixtures("poisoned_memory")
LENGTHS, SLOTS = (21, 1, 12), (3, 0, 2)
CUTS = ((0, 21), (0, 1, 2, 3, 19, 21), (0, 8, 16, 21))
SIZES = {  # groups, heads, channels of a key and of a value
    "small": (2, 4, 16, 24),
    "one number": (1, 1, 1, 1),
    "channels that no vector divides": (1, 3, 33, 7),
    "more columns than go together": (3, 3, 20, 150),
    "as in Qwen3-Next": (1, 2, 128, 128),
}
FORMS = ("delta", "plain", "delta, by channel", "plain, by channel", "scan")
forms = pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[pytest.mark.slow] if form == "plain, by channel" else []) for form in FORMS]
)


@pytest.fixture(params=["torch", "triton", *cpu_build.isas()])
def backend(request: pytest.FixtureRequest) -> TorchBackend:
    """torch's operations, Triton's interpreter, and the C++ kernels on each instruction set that this processor has."""
    torch.manual_seed(0)
    if request.param == "torch":
        return TorchBackend("cpu", torch.float32)
    if request.param == "triton":
        return TritonBackend("cpu", torch.float32) if interpreted() else pytest.skip("Triton compiles for a GPU")
    try:
        return CpuBackend("cpu", torch.float32, request.param)
    except ValueError as error:
        pytest.skip(str(error))


def state_batch(runs: list[tuple[int, int, int]], kept: list[int] | None = None) -> AttentionBatch:
    """Rows of sequences: (slot, rows, tokens with these), and where each one's states are kept."""
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
        kept_slots_S=None if kept is None else torch.tensor(kept),
    )


class Recurrence:
    """Random inputs of one sequence, run in pieces: linear attention, or a state space as large."""

    def __init__(self, length: int, form: str, seed: int, sizes: tuple[int, int, int, int] = SIZES["small"]):
        groups, heads, keys, values = sizes
        self.delta_rule, self.scans = form.startswith("delta"), form == "scan"
        generator = torch.Generator().manual_seed(seed)
        if self.scans:
            shapes = [(length, keys)] * 2 + [(length, heads * values)] * 2
            self.state_shape: tuple[int, ...] = (keys, heads * values)
            self.rate_CX = -torch.rand(self.state_shape, generator=torch.Generator().manual_seed(7))
        else:
            decay = (length, heads, keys) if form.endswith("by channel") else (length, heads)
            shapes = [(length, groups, keys)] * 2 + [(length, heads, values), decay, (length, heads)]
            self.state_shape = (heads, keys, values)
        self.inputs = [torch.randn(shape, generator=generator) for shape in shapes]
        self.inputs[3:] = [elementwise.sigmoid(part) for part in self.inputs[3:]]

    def rows(self, first: int, end: int) -> list[torch.Tensor]:
        return [part[first:end] for part in self.inputs]

    def run(
        self, backend: Any, inputs: list[torch.Tensor], states: torch.Tensor, batch: AttentionBatch
    ) -> torch.Tensor:
        """What rows read, on a backend or by the oracle."""
        if self.scans:
            return backend.selective_scan(*inputs, self.rate_CX.to(states.dtype), states, batch)
        return backend.recurrence(*inputs, states, batch, delta_rule=self.delta_rule)


def nan_states(*shape: int) -> torch.Tensor:
    return torch.full((5, *shape), float("nan"))


@pytest.mark.parametrize("form", FORMS[:-1])
def test_recurrence_is_that_of_the_formula(form: str) -> None:
    case = Recurrence(21, form, 0)
    q, k, v, decay, step = case.inputs
    states = nan_states(*case.state_shape)
    out_THV = case.run(oracle, case.inputs, states, state_batch([(1, 21, 21)]))
    if case.delta_rule:
        q, k = F.normalize(q, dim=-1) * q.shape[-1] ** -0.5, F.normalize(k, dim=-1)
    for head in range(v.shape[1]):
        memory = torch.zeros(case.state_shape[1:])
        for row in range(21):
            key, value = k[row, head // 2], v[row, head]
            memory = decay[row, head].reshape(-1, 1) * memory
            seen = memory.T @ key if case.delta_rule else 0
            memory = memory + step[row, head] * torch.outer(key, value - seen)
            torch.testing.assert_close(out_THV[row, head], memory.T @ q[row, head // 2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(states[1, head], memory, rtol=1e-4, atol=1e-5)


def test_a_scan_is_that_of_the_formula() -> None:
    case, states = Recurrence(21, "scan", 0), nan_states(16, 96)
    q_TC, k_TC, v_TX, step_TX = case.inputs
    out_TX = case.run(oracle, case.inputs, states, state_batch([(1, 21, 21)]))
    for channel in range(96):
        memory_C = torch.zeros(16)
        for row in range(21):
            step = step_TX[row, channel]
            memory_C = torch.exp(step * case.rate_CX[:, channel]) * memory_C + step * v_TX[row, channel] * k_TC[row]
            torch.testing.assert_close(out_TX[row, channel], memory_C @ q_TC[row], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(states[1, :, channel], memory_C, rtol=1e-4, atol=1e-5)


def test_the_delta_rule_is_that_of_transformers() -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    case = Recurrence(70, "delta", 1)
    q, k, v, decay, step = (part[None] for part in case.inputs)
    expected, memory = torch_chunk_gated_delta_rule(
        q, k, v, g=decay.log(), beta=step, use_qk_l2norm_in_kernel=True, output_final_state=True
    )
    states = nan_states(*case.state_shape)
    out_THV = case.run(oracle, case.inputs, states, state_batch([(4, 70, 70)]))
    torch.testing.assert_close(out_THV, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states[4], memory[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@forms
def test_every_backend_computes_the_oracles_recurrence(backend: TorchBackend, size: str, form: str) -> None:
    """A sequence that begins, one that goes on, one without rows; states that are kept; rows that lie apart."""
    cases = [Recurrence(length, form, seed, SIZES[size]) for seed, length in enumerate((19, 6, 0))]
    inputs = [torch.cat(parts) for parts in zip(*(case.inputs for case in cases), strict=True)]
    apart = [F.pad(part.flatten(1), (3, 2))[:, 3:-2].unflatten(1, part.shape[1:]) for part in inputs]
    batch = state_batch([(3, 19, 19), (0, 6, 9), (2, 0, 4)], kept=[-1, 4, -1])
    states = nan_states(*cases[0].state_shape)
    states[[0, 2]] = torch.randn(2, *cases[0].state_shape)
    exact, before = states.double(), states.clone()
    expected = cases[0].run(oracle, [part.double() for part in inputs], exact, batch)
    found = cases[0].run(backend, apart, states, batch)
    assert error(found, expected) <= TOLERANCE[torch.float32]
    assert error(states[[0, 3]], exact[[0, 3]]) <= TOLERANCE[torch.float32]
    assert torch.equal(states[4], states[0])
    assert torch.equal(states[2], before[2])
    assert states[1].isnan().all()


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: "-".join(map(str, cut)))
@forms
def test_no_cut_and_no_neighbour_changes_a_recurrence(backend: TorchBackend, cut: tuple[int, ...], form: str) -> None:
    cases = [Recurrence(length, form, seed, SIZES["small"]) for seed, length in enumerate(LENGTHS)]
    states = nan_states(*cases[0].state_shape)
    alone = [
        case.run(backend, case.inputs, states, state_batch([(slot, length, length)]))
        for case, slot, length in zip(cases, SLOTS, LENGTHS, strict=True)
    ]
    whole, states = states, nan_states(*cases[0].state_shape)
    found: list[list[torch.Tensor]] = [[] for _ in cases]
    for first, end in pairwise(cut):
        pieces = [(s, min(first, length), min(end, length)) for s, length in enumerate(LENGTHS) if first < length]
        batch = state_batch([(SLOTS[s], last - start, last) for s, start, last in pieces])
        inputs = [torch.cat(parts) for parts in zip(*(cases[s].rows(a, b) for s, a, b in pieces), strict=True)]
        out_THV = cases[0].run(backend, inputs, states, batch)
        for (s, _, _), rows in zip(pieces, out_THV.split([b - a for _, a, b in pieces]), strict=True):
            found[s].append(rows)
    for expected, rows in zip(alone, found, strict=True):
        assert torch.equal(torch.cat(rows), expected)
    assert torch.equal(states[list(SLOTS)], whole[list(SLOTS)])
    assert states[[1, 4]].isnan().all(), "slots of others were written"


@pytest.mark.parametrize("form", ["delta", "plain"])
def test_a_decay_for_each_channel(backend: TorchBackend, form: str) -> None:
    case = Recurrence(9, form, 4)
    q, k, v, decay_TH, step = case.inputs
    batch = state_batch([(1, 5, 5), (1, 4, 9)])
    plain = case.run(backend, case.inputs, nan_states(*case.state_shape), batch)
    every = decay_TH[..., None].expand(-1, -1, q.shape[-1]).contiguous()
    found = case.run(backend, [q, k, v, every, step], nan_states(*case.state_shape), batch)
    assert error(found, plain) <= TOLERANCE[torch.float32]
    every[:, :, 0] *= 0.5
    found = case.run(backend, [q, k, v, every, step], nan_states(*case.state_shape), batch)
    assert error(found, plain) > 1e-3


@forms
def test_parts_of_a_sequence_run_one_after_the_other_and_keep_what_is_between(backend: TorchBackend, form: str) -> None:
    case = Recurrence(20, form, 2)
    states = nan_states(*case.state_shape)
    whole = case.run(backend, case.inputs, states, state_batch([(1, 20, 20)]))
    case.run(backend, case.rows(0, 16), states, state_batch([(2, 16, 16)]))
    parts = state_batch([(0, 5, 5), (0, 11, 16), (0, 4, 20)], kept=[-1, 4, -1])
    assert torch.equal(case.run(backend, case.inputs, states, parts), whole)
    assert torch.equal(states[4], states[2]), "the states behind row 16"
    assert torch.equal(states[0], states[1])
    tails, x_TX, weight_WX = nan_states(3, 40), torch.randn(20, 40), torch.randn(4, 40)
    whole = backend.short_convolution(x_TX, weight_WX, None, tails, state_batch([(1, 20, 20)]))
    assert torch.equal(backend.short_convolution(x_TX, weight_WX, None, tails, parts), whole)
    assert torch.equal(tails[[4, 0]], torch.stack((x_TX[13:16], x_TX[17:])))
    assert tails[[2, 3]].isnan().all()


@pytest.mark.parametrize(("taps", "channels", "biased"), [(2, 1, True), (4, 40, False), (3, 1100, True)])
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: "-".join(map(str, cut)))
def test_convolution_is_torchs_and_no_cut_changes_it(
    backend: TorchBackend, cut: tuple[int, ...], activation: str, taps: int, channels: int, biased: bool
) -> None:
    x_TX, weight_WX = torch.randn(21, channels + 3)[:, 3:], torch.randn(taps, channels)
    bias_X = torch.randn(channels) if biased else None
    tails, pieces = nan_states(taps - 1, channels), []
    for first, end in pairwise(cut):
        batch = state_batch([(2, end - first, end)])
        pieces.append(backend.short_convolution(x_TX[first:end], weight_WX, bias_X, tails, batch, activation))
    inputs, weight, bias = x_TX.T[None].double(), weight_WX.T[:, None].double(), torch.zeros(channels).double()
    bias = bias if bias_X is None else bias_X.double()
    expected = F.conv1d(inputs, weight, bias, padding=taps - 1, groups=channels)[0, :, :21].T
    expected = F.silu(expected) if activation == "silu" else expected
    assert error(torch.cat(pieces), expected) <= TOLERANCE[torch.float32]
    batch = state_batch([(0, 21, 21)])
    whole = backend.short_convolution(x_TX, weight_WX, bias_X, nan_states(taps - 1, channels), batch, activation)
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(tails[2], x_TX[1 - taps :])


def test_threads_do_not_count() -> None:
    backend, size = CpuBackend("cpu", torch.float32), SIZES["channels that no vector divides"]
    case, scan = (Recurrence(9, form, 3, size) for form in FORMS[2::2])
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            states, scanned, tails = nan_states(*case.state_shape), nan_states(*scan.state_shape), nan_states(2, 2500)
            batch = state_batch([(1, 4, 4), (0, 5, 5)])
            x_TX = torch.arange(9 * 2500).view(9, 2500) / 1000
            found.append(
                (
                    case.run(backend, case.inputs, states, batch),
                    scan.run(backend, scan.inputs, scanned, batch),
                    backend.short_convolution(x_TX, x_TX[:3].contiguous(), None, tails, batch, "silu"),
                    states[:2],
                    scanned[:2],
                    tails[:2],
                )
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["sigmoid", "silu", "softplus"])
def test_functions_of_numbers_do_not_see_the_other_rows(name: str) -> None:
    function, torchs = getattr(elementwise, name), getattr(F, name)
    x_TX = torch.randn(37, 6) * 5
    rows = torch.cat([function(x_TX[row : row + 1].clone()) for row in range(37)])
    assert torch.equal(rows, function(x_TX))
    torch.testing.assert_close(function(x_TX), torchs(x_TX))
    extremes = torch.tensor([-200.0, -90.0, 0.0, 90.0, 200.0])
    torch.testing.assert_close(function(extremes), torchs(extremes))


def test_every_backend_computes_the_oracles_steps_and_gates(backend: TorchBackend) -> None:
    """Also at the ends, and whichever rows there are; rows may lie apart."""
    x_TX, gate_TX = (torch.randn(37, 9)[:, :6] * 5 for _ in range(2))
    x_TX[0] = gate_TX[1] = torch.tensor([-200.0, -90.0, 0.0, 90.0, 200.0, 30.0])
    bias_X, rate_X = torch.randn(6), -torch.rand(6)
    steps, exact = backend.time_steps(x_TX, bias_X, rate_X), oracle.time_steps(x_TX.double(), bias_X, rate_X)
    for found, expected in zip(steps, exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-30)
    narrow_TX = x_TX.bfloat16()
    gated = backend.silu_gated(narrow_TX, gate_TX)
    assert gated.dtype == torch.float32
    torch.testing.assert_close(gated, oracle.silu_gated(narrow_TX, gate_TX), rtol=1e-5, atol=1e-30)
    for row in range(37):
        own = slice(row, row + 1)
        assert torch.equal(backend.silu_gated(narrow_TX[own], gate_TX[own]), gated[own])
        for found, whole in zip(backend.time_steps(x_TX[own], bias_X, rate_X), steps, strict=True):
            assert torch.equal(found, whole[own])


def test_a_slot_is_copied_before_it_is_used_again() -> None:
    slots = StateSlots(3)
    first = slots.take()
    copy = slots.take_copy(first)
    slots.release(first)
    assert slots.copies() == [(first, copy)]
    assert slots.copies() == []
    assert {slots.take(), slots.take()} == {0, 1, 2} - {copy}
    slots.release(copy)
    slots.take_copy(9)
    slots.release(copy)
    assert slots.take_copy(7) == copy
    assert slots.copies() == [(7, copy)], "what nobody wants any more is not copied"


def test_snapshots_that_were_not_used_for_longest_go_first() -> None:
    snapshots = StateSnapshots(range(4, 7), page_size=8, longest=100)
    assert snapshots.stride == LEAST_STRIDE * 8
    assert StateSnapshots(range(4), page_size=8, longest=4096).stride == 2048
    taken = [snapshots.take() for _ in range(3)]
    assert sorted(slot for slot in taken if slot is not None) == [4, 5, 6]
    assert snapshots.take() is None, "all are being written"
    for slot, digest in zip(taken, (b"a", b"b", b"a"), strict=True):
        assert slot is not None
        snapshots.publish(slot, 0, digest)
    assert snapshots.find(0, b"a") == taken[0]
    assert snapshots.find(1, b"a") is None, "another KV shard's"
    assert snapshots.take() == taken[2], "what was published twice is free"
    assert snapshots.take() == taken[1]
    assert snapshots.find(0, b"b") is None
    snapshots.forget(0, b"a")
    assert (snapshots.find(0, b"a"), snapshots.take()) == (None, taken[0])


@forms
def test_a_batch_without_slots_is_refused(backend: TorchBackend, form: str) -> None:
    case = Recurrence(1, form, 0)
    batch = state_batch([(0, 1, 1)])
    object.__setattr__(batch, "state_slots_S", None)
    with pytest.raises(AssertionError, match="states"):
        case.run(backend, case.inputs, nan_states(*case.state_shape), batch)
