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


class _GroupedLinear(torch.autograd.Function):
    """Rows ``splits[e-1]:splits[e]`` of x times the transposed weight of expert e."""

    @staticmethod
    def forward(ctx, x_RI: torch.Tensor, weight_EOI: torch.Tensor, counts: list[int]) -> torch.Tensor:
        ctx.save_for_backward(x_RI, weight_EOI)
        ctx.counts = counts
        y_RO = x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])
        for x, w, y in zip(x_RI.split(counts), weight_EOI.unbind(0), y_RO.split(counts), strict=True):
            torch.mm(x, w.t(), out=y)
        return y_RO

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_RO,) = grad_outputs
        x_RI, weight_EOI = ctx.saved_tensors
        grad_RO = grad_RO.contiguous()
        grad_x = torch.empty_like(x_RI) if ctx.needs_input_grad[0] else None
        grad_w = torch.empty_like(weight_EOI) if ctx.needs_input_grad[1] else None
        xs, grads = x_RI.split(ctx.counts), grad_RO.split(ctx.counts)
        if grad_x is not None:
            for grad, w, out in zip(grads, weight_EOI.unbind(0), grad_x.split(ctx.counts), strict=True):
                torch.mm(grad, w, out=out)
        if grad_w is not None:
            for grad, x, out in zip(grads, xs, grad_w.unbind(0), strict=True):
                torch.mm(grad.t(), x, out=out)
        return grad_x, grad_w, None


class _Dispatch(torch.autograd.Function):
    """Copy every token to its K sorted rows; the gradient gathers them back and adds them slot by slot."""

    @staticmethod
    def forward(ctx, x_TD: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor, top_k: int) -> torch.Tensor:
        ctx.save_for_backward(inverse_R)
        ctx.top_k = top_k
        return x_TD.index_select(0, order_R // top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_RD,) = grad_outputs
        (inverse_R,) = ctx.saved_tensors
        return grad_RD.index_select(0, inverse_R).unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


class _Combine(torch.autograd.Function):
    """Add the K rows of every token; the gradient copies each token's gradient to its rows."""

    @staticmethod
    def forward(ctx, y_RD: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor, top_k: int) -> torch.Tensor:
        ctx.save_for_backward(order_R)
        ctx.top_k = top_k
        return y_RD.index_select(0, inverse_R).unflatten(0, (-1, top_k)).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_TD,) = grad_outputs
        (order_R,) = ctx.saved_tensors
        return grad_TD.index_select(0, order_R // ctx.top_k), None, None, None


def mixture(
    x_TD: torch.Tensor,
    gate_up_EID: torch.Tensor,
    down_EDF: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
) -> torch.Tensor:
    """``sum_k weight_k * down_e(silu(gate_e x) * up_e x)``, differentiable in tokens, experts and router weights.

    The same function as :func:`kernels.reference.experts` with ``silu``; that is the oracle of the tests.

    Arguments:
        x_TD: tokens, float32 or bfloat16; the matrices must have the same dtype.
        gate_up_EID: gate and up projections stacked, I = 2F rows per expert.
        down_EDF: down projections.
        expert_ids_TK: chosen experts, int64.
        weights_TK: router weights, float32.

    Returns: (T, D) in the dtype of ``x_TD``.
    """
    num_experts, top_k = gate_up_EID.shape[0], expert_ids_TK.shape[1]
    flat_R = expert_ids_TK.flatten()
    order_R = flat_R.argsort(stable=True)
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    counts = torch.bincount(flat_R, minlength=num_experts).tolist()
    rows_RD = _Dispatch.apply(x_TD, order_R, inverse_R, top_k)
    gate_RF, up_RF = _GroupedLinear.apply(rows_RD, gate_up_EID, counts).chunk(2, -1)
    # Scaling the F inner channels instead of the D outputs is the same product on fewer numbers.
    scaled_RF = F.silu(gate_RF) * up_RF * weights_TK.flatten()[order_R].to(x_TD.dtype)[:, None]
    return _Combine.apply(_GroupedLinear.apply(scaled_RF, down_EDF, counts), order_R, inverse_R, top_k)
