"""Layers with recurrent states: the recurrence, a program per head and some columns; selective scans; convolutions.

Shape suffixes as in ``kernels/reference/states.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

import triton
import triton.language as tl

from ..api.types import AttentionBatch
from ..reference.states import L2_EPS
from .device import DeviceProperties
from .launch import Launch, cdiv, next_power_of_2, require_contiguous, require_contiguous_channels
from .variants import Call, OpVariant, Planned, Tilings, register

COLUMNS = 16  # of a state, per program
CHANNELS = 128  # of a convolution, per program
SCANNED = 64  # channels of a selective scan, per program
ROWS = 16  # of a convolution, per program


@triton.jit
def _first_run(slots_ptr, run):
    """The first of the runs that are parts of one sequence, which follow each other and have one slot."""
    slot = tl.load(slots_ptr + run)
    first = run
    while tl.load(slots_ptr + first - 1, mask=first > 0, other=-2) == slot:
        first -= 1
    return first


@triton.jit
def _begins(query_start_ptr, context_len_ptr, run):
    count = tl.load(query_start_ptr + run + 1) - tl.load(query_start_ptr + run)
    return tl.load(context_len_ptr + run) == count


@triton.jit(do_not_specialize=["num_runs"])
def recurrence_kernel(
    q_ptr, k_ptr, v_ptr, decay_ptr, step_ptr, states_ptr, out_ptr, slots_ptr, kept_ptr, query_start_ptr,
    context_len_ptr, num_runs, q_stride_t, k_stride_t, v_stride_t, scale, eps,
    H: tl.constexpr, PER_GROUP: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr, V: tl.constexpr,
    BLOCK_V: tl.constexpr, DELTA: tl.constexpr, BY_CHANNEL: tl.constexpr,
):  # fmt: skip
    """All rows of a sequence, one after the other; the columns of the state stay in registers."""
    run = tl.program_id(0)
    slot = tl.load(slots_ptr + run)
    if tl.load(slots_ptr + run - 1, mask=run > 0, other=-1) == slot:
        return  # the program of the sequence's first run computes this one too
    head = tl.program_id(1)
    c = tl.arange(0, C_PAD)
    ok_C = c < C
    v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    ok_V = v < V
    ok_CV = ok_C[:, None] & ok_V[None, :]
    at_CV = c[:, None] * V + v[None, :]
    begins = _begins(query_start_ptr, context_len_ptr, run)
    state_at = states_ptr + (slot * H + head) * C * V
    state_CV = tl.load(state_at + at_CV, mask=ok_CV & (begins == 0), other=0.0)
    q_at = q_ptr + head // PER_GROUP * C + c
    k_at = k_ptr + head // PER_GROUP * C + c
    v_at = v_ptr + head * V + v
    going = slot >= 0
    while going:
        first = tl.load(query_start_ptr + run).to(tl.int64)
        count = tl.load(query_start_ptr + run + 1) - tl.load(query_start_ptr + run)
        for number in tl.range(0, count):
            row = first + number
            q_C = tl.load(q_at + row * q_stride_t, mask=ok_C, other=0.0)
            k_C = tl.load(k_at + row * k_stride_t, mask=ok_C, other=0.0)
            value_V = tl.load(v_at + row * v_stride_t, mask=ok_V, other=0.0)
            if DELTA:
                q_C = q_C * tl.rsqrt(tl.sum(q_C * q_C, axis=0) + eps) * scale
                k_C = k_C * tl.rsqrt(tl.sum(k_C * k_C, axis=0) + eps)
            if BY_CHANNEL:
                state_CV *= tl.load(decay_ptr + (row * H + head) * C + c, mask=ok_C, other=0.0)[:, None]
            else:
                state_CV *= tl.load(decay_ptr + row * H + head)
            if DELTA:
                value_V -= tl.sum(state_CV * k_C[:, None], axis=0)
            value_V *= tl.load(step_ptr + row * H + head)
            state_CV += k_C[:, None] * value_V[None, :]
            tl.store(out_ptr + (row * H + head) * V + v, tl.sum(state_CV * q_C[:, None], axis=0), mask=ok_V)
        if kept_ptr is not None:
            kept = tl.load(kept_ptr + run)
            tl.store(states_ptr + (kept * H + head) * C * V + at_CV, state_CV, mask=ok_CV & (kept >= 0))
        run += 1
        going = tl.load(slots_ptr + run, mask=run < num_runs, other=-1) == slot
    tl.store(state_at + at_CV, state_CV, mask=ok_CV)


@triton.jit(do_not_specialize=["num_runs"])
def selective_scan_kernel(
    q_ptr, k_ptr, v_ptr, step_ptr, rate_ptr, states_ptr, out_ptr, slots_ptr, kept_ptr, query_start_ptr,
    context_len_ptr, num_runs, q_stride_t, k_stride_t, v_stride_t, step_stride_t,
    C: tl.constexpr, C_PAD: tl.constexpr, X: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """All rows of a sequence, one after the other; the states of some channels stay in registers."""
    run = tl.program_id(0)
    slot = tl.load(slots_ptr + run)
    if tl.load(slots_ptr + run - 1, mask=run > 0, other=-1) == slot:
        return  # the program of the sequence's first run computes this one too
    c = tl.arange(0, C_PAD)
    ok_C = c < C
    x = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    ok_X = x < X
    ok_CX = ok_C[:, None] & ok_X[None, :]
    at_CX = c[:, None] * X + x[None, :]
    begins = _begins(query_start_ptr, context_len_ptr, run)
    state_at = states_ptr + slot * C * X
    state_CX = tl.load(state_at + at_CX, mask=ok_CX & (begins == 0), other=0.0)
    rate_CX = tl.load(rate_ptr + at_CX, mask=ok_CX, other=0.0)
    going = slot >= 0
    while going:
        first = tl.load(query_start_ptr + run).to(tl.int64)
        count = tl.load(query_start_ptr + run + 1) - tl.load(query_start_ptr + run)
        for number in tl.range(0, count):
            row = first + number
            q_C = tl.load(q_ptr + row * q_stride_t + c, mask=ok_C, other=0.0)
            k_C = tl.load(k_ptr + row * k_stride_t + c, mask=ok_C, other=0.0)
            step_X = tl.load(step_ptr + row * step_stride_t + x, mask=ok_X, other=0.0)
            value_X = tl.load(v_ptr + row * v_stride_t + x, mask=ok_X, other=0.0) * step_X
            state_CX = tl.exp(rate_CX * step_X[None, :]) * state_CX + k_C[:, None] * value_X[None, :]
            tl.store(out_ptr + row * X + x, tl.sum(state_CX * q_C[:, None], axis=0), mask=ok_X)
        if kept_ptr is not None:
            kept = tl.load(kept_ptr + run)
            tl.store(states_ptr + kept * C * X + at_CX, state_CX, mask=ok_CX & (kept >= 0))
        run += 1
        going = tl.load(slots_ptr + run, mask=run < num_runs, other=-1) == slot
    tl.store(state_at + at_CX, state_CX, mask=ok_CX)


@triton.jit
def short_convolution_kernel(
    x_ptr, weight_ptr, bias_ptr, tails_ptr, out_ptr, slots_ptr, query_start_ptr, context_len_ptr, x_stride_t,
    X: tl.constexpr, TAPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_X: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Some rows of a run, some channels. Rows in front of the sequence's first in this step are in its tail."""
    run = tl.program_id(0)
    start = tl.load(query_start_ptr + run)
    end = tl.load(query_start_ptr + run + 1)
    row_T = start + tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    ok_T = row_T < end
    channel = tl.program_id(2) * BLOCK_X + tl.arange(0, BLOCK_X)
    ok_X = channel < X
    first_run = _first_run(slots_ptr, run)
    first = tl.load(query_start_ptr + first_run)
    begins = _begins(query_start_ptr, context_len_ptr, first_run)
    tail_at = tails_ptr + tl.load(slots_ptr + run) * (TAPS - 1) * X
    sum_TX = tl.zeros((BLOCK_T, BLOCK_X), dtype=tl.float32)
    for tap in tl.static_range(TAPS):
        source_T = row_T - (TAPS - 1) + tap
        here_TX = (ok_T & (source_T >= first))[:, None] & ok_X[None, :]
        x_TX = tl.load(x_ptr + source_T.to(tl.int64)[:, None] * x_stride_t + channel[None, :], mask=here_TX, other=0.0)
        before_TX = (ok_T & (source_T < first) & (begins == 0))[:, None] & ok_X[None, :]
        in_tail_T = source_T - first + TAPS - 1
        x_TX += tl.load(tail_at + in_tail_T[:, None] * X + channel[None, :], mask=before_TX, other=0.0)
        weight_X = tl.load(weight_ptr + tap * X + channel, mask=ok_X, other=0.0)
        sum_TX += x_TX * weight_X[None, :]
    if bias_ptr is not None:
        sum_TX += tl.load(bias_ptr + channel, mask=ok_X, other=0.0)[None, :]
    if SILU:
        sum_TX = sum_TX / (1.0 + tl.exp(-sum_TX))
    out_at = out_ptr + row_T.to(tl.int64)[:, None] * X + channel[None, :]
    tl.store(out_at, sum_TX, mask=ok_T[:, None] & ok_X[None, :])


@triton.jit(do_not_specialize=["num_runs"])
def convolution_tails_kernel(
    x_ptr, tails_ptr, slots_ptr, kept_ptr, query_start_ptr, context_len_ptr, num_runs, x_stride_t,
    X: tl.constexpr, TAPS: tl.constexpr, TAIL_PAD: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """The last rows of a sequence and, where they are kept, of its parts. Runs behind the convolution."""
    run = tl.program_id(0)
    slot = tl.load(slots_ptr + run)
    if tl.load(slots_ptr + run - 1, mask=run > 0, other=-1) == slot:
        return
    first = tl.load(query_start_ptr + run)
    begins = _begins(query_start_ptr, context_len_ptr, run)
    w = tl.arange(0, TAIL_PAD)
    ok_W = w < TAPS - 1
    channel = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    ok_X = channel < X
    ok_WX = ok_W[:, None] & ok_X[None, :]
    tail_WX = tl.zeros((TAIL_PAD, BLOCK_X), dtype=tl.float32)
    going = slot >= 0
    while going:
        source_W = tl.load(query_start_ptr + run + 1) - (TAPS - 1) + w
        here_WX = ok_WX & (source_W >= first)[:, None]
        tail_WX = tl.load(
            x_ptr + source_W.to(tl.int64)[:, None] * x_stride_t + channel[None, :], mask=here_WX, other=0.0
        )
        before_WX = ok_WX & ((source_W < first) & (begins == 0))[:, None]
        at_WX = (source_W - first + TAPS - 1)[:, None] * X + channel[None, :]
        tail_WX += tl.load(tails_ptr + slot * (TAPS - 1) * X + at_WX, mask=before_WX, other=0.0)
        if kept_ptr is not None:
            kept = tl.load(kept_ptr + run)
            kept_at = tails_ptr + kept * (TAPS - 1) * X + w[:, None] * X + channel[None, :]
            tl.store(kept_at, tail_WX, mask=ok_WX & (kept >= 0))
        run += 1
        going = tl.load(slots_ptr + run, mask=run < num_runs, other=-1) == slot
    tl.debug_barrier()  # a row that is read for one place of the tail may be another thread's to write
    tl.store(tails_ptr + slot * (TAPS - 1) * X + w[:, None] * X + channel[None, :], tail_WX, mask=ok_WX)


class StateProblem(NamedTuple):
    """Sizes of states; nothing else decides what runs."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class RecurrenceCall(Call[torch.Tensor]):
    """See :func:`.states.recurrence`. Rows of queries, keys and values may lie apart."""

    operation = "recurrence"

    q_TGC: torch.Tensor
    k_TGC: torch.Tensor
    v_THV: torch.Tensor
    decay_TH: torch.Tensor
    step_TH: torch.Tensor
    states_NHCV: torch.Tensor
    batch: AttentionBatch
    delta_rule: bool

    def problem(self) -> StateProblem:
        return StateProblem(tuple(self.states_NHCV.shape[1:]))


@register
class RowByRow(OpVariant[RecurrenceCall, StateProblem]):
    """A program for each sequence, head and block of columns."""

    call, name, kernels = RecurrenceCall, "rows", (recurrence_kernel,)

    def plan(self, call: RecurrenceCall, tilings: Tilings, device: DeviceProperties) -> Planned[torch.Tensor]:
        heads, keys, values = call.states_NHCV.shape[1:]
        parts = {"q": call.q_TGC, "k": call.k_TGC, "v": call.v_THV}
        require_contiguous(states_NHCV=call.states_NHCV, decay_TH=call.decay_TH, step_TH=call.step_TH)
        require_contiguous_channels(q_TGC=call.q_TGC, k_TGC=call.k_TGC, v_THV=call.v_THV)
        for name, part in parts.items():
            if part.shape[1] > 1 and part.stride(1) != part.shape[2]:
                raise ValueError(f"the heads of {name} must lie side by side; its strides are {part.stride()}")
        out_THV = torch.empty(call.v_THV.shape, dtype=torch.float32, device=call.v_THV.device)
        places = _places(call.batch)
        runs, c_pad = call.batch.num_sequences, next_power_of_2(keys)
        launch = Launch(
            kernel=recurrence_kernel,
            grid=(runs, heads, cdiv(values, COLUMNS)),
            args={
                **{f"{name}_ptr": part for name, part in parts.items()},
                "decay_ptr": call.decay_TH,
                "step_ptr": call.step_TH,
                "states_ptr": call.states_NHCV,
                "out_ptr": out_THV,
                **places,
                "num_runs": runs,
                **{f"{name}_stride_t": part.stride(0) for name, part in parts.items()},
                "scale": keys**-0.5,
                "eps": L2_EPS,
            },
            constexprs={
                "H": heads,
                "PER_GROUP": heads // call.q_TGC.shape[1],
                "C": keys,
                "C_PAD": c_pad,
                "V": values,
                "BLOCK_V": COLUMNS,
                "DELTA": call.delta_rule,
                "BY_CHANNEL": call.decay_TH.dim() == 3,
            },
            num_warps=max(1, min(4, c_pad * COLUMNS // 512)),
        )
        return out_THV, [launch]


@dataclass(frozen=True)
class ScanCall(Call[torch.Tensor]):
    """See :func:`.states.selective_scan`. Rows of what the channels share, and of what they do not, may lie apart."""

    operation = "selective_scan"

    q_TC: torch.Tensor
    k_TC: torch.Tensor
    v_TX: torch.Tensor
    step_TX: torch.Tensor
    rate_CX: torch.Tensor
    states_NCX: torch.Tensor
    batch: AttentionBatch

    def problem(self) -> StateProblem:
        return StateProblem(tuple(self.rate_CX.shape))


@register
class ChannelByChannel(OpVariant[ScanCall, StateProblem]):
    """A program for each sequence and block of channels."""

    call, name, kernels = ScanCall, "rows", (selective_scan_kernel,)

    def plan(self, call: ScanCall, tilings: Tilings, device: DeviceProperties) -> Planned[torch.Tensor]:
        require_contiguous(rate_CX=call.rate_CX, states_NCX=call.states_NCX)
        require_contiguous_channels(q_TC=call.q_TC, k_TC=call.k_TC, v_TX=call.v_TX, step_TX=call.step_TX)
        parts = {"q": call.q_TC, "k": call.k_TC, "v": call.v_TX, "step": call.step_TX}
        size, channels = call.rate_CX.shape
        out_TX = torch.empty(call.v_TX.shape, dtype=torch.float32, device=call.v_TX.device)
        runs, c_pad = call.batch.num_sequences, next_power_of_2(size)
        launch = Launch(
            kernel=selective_scan_kernel,
            grid=(runs, cdiv(channels, SCANNED)),
            args={
                **{f"{name}_ptr": part for name, part in parts.items()},
                "rate_ptr": call.rate_CX,
                "states_ptr": call.states_NCX,
                "out_ptr": out_TX,
                **_places(call.batch),
                "num_runs": runs,
                **{f"{name}_stride_t": part.stride(0) for name, part in parts.items()},
            },
            constexprs={"C": size, "C_PAD": c_pad, "X": channels, "BLOCK_X": SCANNED},
            num_warps=max(1, min(4, c_pad * SCANNED // 512)),
        )
        return out_TX, [launch]


@dataclass(frozen=True)
class ConvolutionCall(Call[torch.Tensor]):
    """See :func:`.states.short_convolution`. Rows may lie apart."""

    operation = "short_convolution"

    x_TX: torch.Tensor
    weight_WX: torch.Tensor
    bias_X: torch.Tensor | None
    tails_NWX: torch.Tensor
    batch: AttentionBatch
    activation: str

    def problem(self) -> StateProblem:
        return StateProblem(tuple(self.weight_WX.shape))


@register
class RunsOfRows(OpVariant[ConvolutionCall, StateProblem]):
    """All rows at once, then the sequences' last rows."""

    call, name, kernels = ConvolutionCall, "rows", (short_convolution_kernel, convolution_tails_kernel)

    def plan(self, call: ConvolutionCall, tilings: Tilings, device: DeviceProperties) -> Planned[torch.Tensor]:
        require_contiguous(weight_WX=call.weight_WX, bias_X=call.bias_X, tails_NWX=call.tails_NWX)
        require_contiguous_channels(x_TX=call.x_TX)
        taps, channels = call.weight_WX.shape
        out_TX = torch.empty(call.x_TX.shape, dtype=torch.float32, device=call.x_TX.device)
        places, runs = _places(call.batch), call.batch.num_sequences
        kept = places.pop("kept_ptr")
        block_t = min(ROWS, next_power_of_2(call.batch.max_query_len))
        block_x = min(CHANNELS, next_power_of_2(channels))
        common = {"x_ptr": call.x_TX, "tails_ptr": call.tails_NWX, **places, "x_stride_t": call.x_TX.stride(0)}
        sizes = {"X": channels, "TAPS": taps, "BLOCK_X": block_x}
        convolve = Launch(
            kernel=short_convolution_kernel,
            grid=(runs, cdiv(call.batch.max_query_len, block_t), cdiv(channels, block_x)),
            args={**common, "weight_ptr": call.weight_WX, "bias_ptr": call.bias_X, "out_ptr": out_TX},
            constexprs={**sizes, "BLOCK_T": block_t, "SILU": call.activation == "silu"},
        )
        keep = Launch(
            kernel=convolution_tails_kernel,
            grid=(runs, cdiv(channels, block_x)),
            args={**common, "kept_ptr": kept, "num_runs": runs},
            constexprs={**sizes, "TAIL_PAD": next_power_of_2(taps - 1)},
        )
        return out_TX, [convolve, keep]


def _places(batch: AttentionBatch) -> dict[str, torch.Tensor | None]:
    assert batch.state_slots_S is not None, "the batch does not say where its sequences' states are"
    require_contiguous(state_slots_S=batch.state_slots_S, kept_slots_S=batch.kept_slots_S)
    return {
        "slots_ptr": batch.state_slots_S,
        "kept_ptr": batch.kept_slots_S,
        "query_start_ptr": batch.query_start_S1,
        "context_len_ptr": batch.context_len_S,
    }
