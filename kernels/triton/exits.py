"""One launch at an exit: probe every row, then sort the rows into those that continue and those that exit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

import triton
import triton.language as tl

from ..api.types import ProbeWeights
from ..reference.exits import PROBE_EPS
from .device import DeviceProperties
from .launch import Launch, next_power_of_2, require_contiguous
from .shapes import Steps, WarmUpShape, meta
from .variants import Call, OpVariant, Planned, Planner, RowProblem, Tilings, register

ORDER_BLOCK = 256
Decision = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@triton.jit
def _inverse_size(x_ptr, row, width, eps, D_PAD: tl.constexpr):
    d = tl.arange(0, D_PAD)
    x_D = tl.load(x_ptr + row * width + d, mask=d < width, other=0.0)
    return tl.rsqrt(tl.sum(x_D * x_D, axis=0) / width + eps)


@triton.jit
def _products(x_ptr, weight_ptr, row, width, inputs, J: tl.constexpr, J_PAD: tl.constexpr, BLOCK: tl.constexpr):
    """The row's products with J rows of weights, in blocks of the width."""
    j = tl.arange(0, J_PAD)
    sums_J = tl.zeros((J_PAD,), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        d = first + tl.arange(0, BLOCK)
        x_D = tl.load(x_ptr + row * width + d, mask=d < width, other=0.0)
        ok_JD = (j < J)[:, None] & (d < width)[None, :]
        weight_JD = tl.load(weight_ptr + j[:, None] * inputs + d[None, :], mask=ok_JD, other=0.0)
        sums_J += tl.sum(weight_JD * x_D[None, :], axis=1)
    return sums_J


@triton.jit
def _exits(logits_ptr, thresholds_ptr, row_R, ok_R):
    threshold_R = tl.load(thresholds_ptr + row_R, mask=ok_R, other=0.0)
    # Other programs wrote these, perhaps into lines that this one's first-level cache holds.
    logit_R = tl.load(logits_ptr + row_R, mask=ok_R, other=0.0, cache_modifier=".cg")
    return (logit_R >= threshold_R) & (threshold_R < float("inf"))


@triton.jit
def _order(logits_ptr, thresholds_ptr, order_ptr, continuing_ptr, num_rows, ROWS: tl.constexpr):
    """Two passes over the rows: count those that continue, then give every row its place."""
    continuing = 0
    for first in range(0, num_rows, ROWS):
        row = first + tl.arange(0, ROWS)
        ok_R = row < num_rows
        exits_R = _exits(logits_ptr, thresholds_ptr, row, ok_R)
        continuing += tl.sum((ok_R & (exits_R == 0)).to(tl.int32), axis=0)
    next_on, next_off = 0, continuing
    for first in range(0, num_rows, ROWS):
        row = first + tl.arange(0, ROWS)
        ok_R = row < num_rows
        exits_R = _exits(logits_ptr, thresholds_ptr, row, ok_R)
        on_R = (ok_R & (exits_R == 0)).to(tl.int32)
        off_R = (ok_R & exits_R).to(tl.int32)
        place_R = tl.where(on_R == 1, next_on + tl.cumsum(on_R, axis=0), next_off + tl.cumsum(off_R, axis=0)) - 1
        tl.store(order_ptr + place_R, row.to(tl.int64), mask=ok_R)
        next_on += tl.sum(on_R, axis=0)
        next_off += tl.sum(off_R, axis=0)
    tl.store(continuing_ptr, continuing)


@triton.jit(do_not_specialize=["num_rows"])
def exit_decide_kernel(
    x_ptr, previous_ptr, entropy_ptr, weight_ptr, bias_ptr, out_ptr, out_bias_ptr, thresholds_ptr, logits_ptr,
    order_ptr, continuing_ptr, ticket_ptr, num_rows, width, eps,
    J: tl.constexpr, J_PAD: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program per row; the last one to finish orders all rows. The ticket is back at zero afterwards."""
    row = tl.program_id(0).to(tl.int64)
    inputs = width
    if previous_ptr is not None:
        inputs += width
    if entropy_ptr is not None:
        inputs += 1
    j = tl.arange(0, J_PAD)
    inner_J = tl.load(bias_ptr + j, mask=j < J, other=0.0)
    inner_J += _inverse_size(x_ptr, row, width, eps, D_PAD) * _products(
        x_ptr, weight_ptr, row, width, inputs, J, J_PAD, BLOCK
    )
    if previous_ptr is not None:
        inner_J += _inverse_size(previous_ptr, row, width, eps, D_PAD) * _products(
            previous_ptr, weight_ptr + width, row, width, inputs, J, J_PAD, BLOCK
        )
    if entropy_ptr is not None:
        weight_J = tl.load(weight_ptr + j * inputs + inputs - 1, mask=j < J, other=0.0)
        inner_J += weight_J * tl.load(entropy_ptr + row)
    if out_ptr is not None:
        out_J = tl.load(out_ptr + j, mask=j < J, other=0.0)
        logit = tl.load(out_bias_ptr) + tl.sum(out_J * inner_J * tl.sigmoid(inner_J), axis=0)
    else:
        logit = tl.sum(inner_J, axis=0)
    tl.store(logits_ptr + row, logit)
    tl.debug_barrier()
    ticket = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
    if ticket == tl.num_programs(0) - 1:
        _order(logits_ptr, thresholds_ptr, order_ptr, continuing_ptr, num_rows, ROWS)
        tl.store(ticket_ptr, 0)


@dataclass(frozen=True)
class ExitCall(Call[Decision]):
    """:func:`exit_reference.exit_decide` of contiguous tensors: logits (float32, (T,)), order (int64, (T,)), and the
    number of rows that continue (int32, (1,)).

    Arguments:
        ticket: int32, one element, zero between launches of a stream.
    """

    operation = "exit_decide"

    x_TD: torch.Tensor
    probe: ProbeWeights
    thresholds_T: torch.Tensor
    previous_TD: torch.Tensor | None
    router_entropy_T: torch.Tensor | None
    ticket: torch.Tensor

    def problem(self) -> RowProblem:
        return RowProblem.of(self.x_TD)

    @classmethod
    def of_layer(cls, layer: WarmUpShape, steps: Steps, dtype: torch.dtype, planner: Planner) -> Iterator[ExitCall]:
        for inner, two_layers, previous, router_entropy in layer.probes:
            probe = ProbeWeights(
                weight_JX=meta(inner, layer.hidden_size * (1 + previous) + router_entropy),
                bias_J=meta(inner),
                out_J=meta(inner) if two_layers else None,
                out_bias=meta() if two_layers else None,
                previous=previous,
                router_entropy=router_entropy,
            )
            for tokens in steps.tokens:
                x_TD, rows_T = meta(tokens, layer.hidden_size), meta(tokens)
                yield cls(x_TD, probe, rows_T, x_TD, rows_T, meta(1, dtype=torch.int32))


@register
class RowExit(OpVariant[ExitCall, RowProblem]):
    """A program per row; the last one to finish orders them."""

    call, name, kernels = ExitCall, "rows", (exit_decide_kernel,)

    def plan(self, call: ExitCall, tilings: Tilings, device: DeviceProperties) -> Planned[Decision]:
        x_TD, probe = call.x_TD, call.probe
        require_contiguous(x_TD=x_TD, thresholds_T=call.thresholds_T, previous_TD=call.previous_TD)
        num_rows, width = x_TD.shape
        inner = probe.weight_JX.shape[0]
        logits_T = torch.empty(num_rows, device=x_TD.device)
        order_T = torch.empty(num_rows, dtype=torch.int64, device=x_TD.device)
        continuing = torch.empty(1, dtype=torch.int32, device=x_TD.device)
        launch = Launch(
            kernel=exit_decide_kernel,
            grid=(num_rows,),
            args={
                "x_ptr": x_TD,
                "previous_ptr": call.previous_TD if probe.previous else None,
                "entropy_ptr": call.router_entropy_T if probe.router_entropy else None,
                "weight_ptr": probe.weight_JX,
                "bias_ptr": probe.bias_J,
                "out_ptr": probe.out_J,
                "out_bias_ptr": probe.out_bias,
                "thresholds_ptr": call.thresholds_T,
                "logits_ptr": logits_T,
                "order_ptr": order_T,
                "continuing_ptr": continuing,
                "ticket_ptr": call.ticket,
                "num_rows": num_rows,
                "width": width,
                "eps": PROBE_EPS,
            },
            constexprs={
                "J": inner,
                "J_PAD": next_power_of_2(inner),
                "D_PAD": next_power_of_2(width),
                "BLOCK": min(256, next_power_of_2(width)),
                "ROWS": ORDER_BLOCK,
            },
            num_warps=4,
        )
        return (logits_T, order_T, continuing), [launch]
