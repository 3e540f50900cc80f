"""A mixture of gated experts with gradients: rows sorted by expert, one GEMM per expert over contiguous rows.

No padding and no capacity limit. Dispatch and combine are permutations, so their gradients are gathers too and every
sum has a fixed order: training is deterministic.

Shape suffixes: T tokens, D hidden size, E experts, K experts per token, F width of one expert, R = T*K sorted rows,
O output and I input features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


class _GatedExperts(torch.autograd.Function):
    """``weight * down_e(silu(gate_e x) * up_e x)`` of rows that lie expert by expert, ``counts[e]`` for expert e.

    One function, because its parts share what they keep, and write their gradients where the next part reads them.
    """

    @staticmethod
    def forward(ctx, x_RD, gate_up_EID, down_EDF, weights_R1, counts: list[int]) -> torch.Tensor:
        gate_up_RI = _grouped(x_RD, gate_up_EID.transpose(1, 2), counts)
        gate_RF, up_RF = gate_up_RI.chunk(2, -1)
        active_RF = F.silu(gate_RF)
        inner_RF = active_RF * up_RF
        # Scaling the F inner channels instead of the D outputs is the same product on fewer numbers.
        scaled_RF = inner_RF * weights_R1
        ctx.save_for_backward(x_RD, gate_up_EID, down_EDF, weights_R1, gate_up_RI, active_RF, inner_RF, scaled_RF)
        ctx.counts = counts
        return _grouped(scaled_RF, down_EDF.transpose(1, 2), counts)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_RD = grad_outputs[0].contiguous()
        x_RD, gate_up_EID, down_EDF, weights_R1, gate_up_RI, active_RF, inner_RF, scaled_RF = ctx.saved_tensors
        gate_RF, up_RF = gate_up_RI.chunk(2, -1)
        grad_down = _weight_gradient(grad_RD, scaled_RF, ctx.counts)
        grad_RF = _grouped(grad_RD, down_EDF, ctx.counts)
        grad_weights = torch.linalg.vecdot(grad_RF, inner_RF)[:, None]
        grad_RF.mul_(weights_R1)
        grad_gate_up = torch.empty_like(gate_up_RI)
        grad_gate, grad_up = grad_gate_up.chunk(2, -1)
        torch.mul(active_RF, grad_RF, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_RF.mul_(up_RF), gate_RF, grad_input=grad_gate)
        grad_x = _grouped(grad_gate_up, gate_up_EID, ctx.counts)
        return grad_x, _weight_gradient(grad_gate_up, x_RD, ctx.counts), grad_down, grad_weights, None


def _grouped(x_RA: torch.Tensor, matrix_EAB: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The rows of every expert times its matrix, (R, B)."""
    y_RB = x_RA.new_empty(x_RA.shape[0], matrix_EAB.shape[2])
    for x, matrix, y in zip(x_RA.split(counts), matrix_EAB.unbind(0), y_RB.split(counts), strict=True):
        torch.mm(x, matrix, out=y)
    return y_RB


def _weight_gradient(grad_RO: torch.Tensor, x_RI: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Gradient of every expert's matrix, (E, O, I); zero for an expert without rows."""
    grad_EOI = x_RI.new_empty(len(counts), grad_RO.shape[1], x_RI.shape[1])
    for grad, x, out in zip(grad_RO.split(counts), x_RI.split(counts), grad_EOI.unbind(0), strict=True):
        torch.mm(grad.t(), x, out=out)
    return grad_EOI


class _Move(torch.autograd.Function):
    """Copies every token to its K sorted rows, or with ``back`` adds the K rows of every token, slot by slot.

    Each is the other's gradient.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor, top_k: int, back: bool):
        ctx.save_for_backward(order_R, inverse_R)
        ctx.top_k, ctx.back = top_k, back
        if back:  # without gathering the rows first
            return F.embedding_bag(inverse_R.view(-1, top_k), x, mode="sum")
        return x.index_select(0, order_R // top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = _Move.apply(grad_outputs[0], *ctx.saved_tensors, ctx.top_k, not ctx.back)
        return grad, None, None, None, None


def mixture(
    x_TD: torch.Tensor,
    gate_up_EID: torch.Tensor,
    down_EDF: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
) -> torch.Tensor:
    """``sum_k weight_k * down_e(silu(gate_e x) * up_e x)``, differentiable in tokens, experts and router weights.

    The same function as :func:`kernels.reference.operations.experts` with ``silu``; that is the oracle of the tests.

    Arguments:
        x_TD: tokens, float32 or bfloat16; the matrices must have the same dtype.
        gate_up_EID: gate and up projections stacked, I = 2F rows per expert.
        down_EDF: down projections.
        expert_ids_TK: chosen experts, int64.
        weights_TK: router weights, float32.

    Returns: (T, D) in the dtype of ``x_TD``.
    """
    top_k = expert_ids_TK.shape[1]
    order_R, inverse_R, counts_E = arranged(expert_ids_TK.flatten(), gate_up_EID.shape[0])
    rows_RD = dispatch(x_TD, order_R, inverse_R, top_k)
    weights_R1 = weights_TK.flatten()[order_R].to(x_TD.dtype)[:, None]
    y_RD = gated_experts(rows_RD, gate_up_EID, down_EDF, weights_R1, counts_E.tolist())
    return combine(y_RD, order_R, inverse_R, top_k)


def arranged(expert_ids_R: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The order that sorts rows by expert, its inverse, and how many rows each expert has, (E,); all int64."""
    order_R = expert_ids_R.argsort(stable=True)
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    return order_R, inverse_R, torch.bincount(expert_ids_R, minlength=num_experts)


def dispatch(x_TD: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor, top_k: int) -> torch.Tensor:
    """Every token once per slot, sorted by expert, (R, D)."""
    return _Move.apply(x_TD, order_R, inverse_R, top_k, False)


def combine(y_RD: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor, top_k: int) -> torch.Tensor:
    """The sum of every token's sorted rows, (T, D)."""
    return _Move.apply(y_RD, order_R, inverse_R, top_k, True)


def gated_experts(
    x_RD: torch.Tensor, gate_up_EID: torch.Tensor, down_EDF: torch.Tensor, weights_R1: torch.Tensor, counts: list[int]
) -> torch.Tensor:
    """Weighted outputs of rows that lie expert by expert, (R, D).

    Arguments:
        counts: rows of each expert.
    """
    return _GatedExperts.apply(x_RD, gate_up_EID, down_EDF, weights_R1, counts)


def load_balancing_loss(probs_TE: torch.Tensor, expert_ids_TK: torch.Tensor) -> torch.Tensor:
    """``E * sum_e f_e p_e``: 1 when experts share the load evenly, E when one expert takes everything.

    f_e is the share of the T*K slots that went to expert e (no gradient), p_e the mean router probability of e.

    Arguments:
        probs_TE: softmax of the router's logits, float32.
        expert_ids_TK: chosen experts, any integer dtype.

    Returns: float32 scalar. Source: Switch Transformer, Fedus et al. 2021, eq. 4, over K slots.
    """
    num_experts = probs_TE.shape[1]
    load_E = torch.bincount(expert_ids_TK.flatten().long(), minlength=num_experts).float()
    return num_experts * torch.dot(load_E / load_E.sum(), probs_TE.mean(0))
