"""Norms with gradients, in few passes over memory: on a CPU these passes, not arithmetic, are what a small layer costs.

Shape suffixes: D normed dimension; ``...`` any leading dimensions.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums over a dtype are kept in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def reciprocal_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """``1 / sqrt(mean x² + eps)`` over the last dimension, float32 (..., 1)."""
    # A norm reads x once and writes nothing of its size, unlike the mean of the squares.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x.dtype))
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _ForkNormed(torch.autograd.Function):
    """The input and the input normed. Their gradients are added here, which saves the pass that would add them."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        scale = reciprocal_rms(x, eps)
        normed = (x * scale).to(x.dtype)
        ctx.save_for_backward(normed, scale)
        return x.view_as(x), normed

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        kept, scale = ctx.saved_tensors
        grad, grad_normed, normed = (t.to(scale.dtype) for t in (*grad_outputs, kept))
        pull = torch.linalg.vecdot(grad_normed, normed).div_(-normed.shape[-1])[..., None]
        grad_x = torch.addcmul(grad, grad_normed, scale)
        return grad_x.addcmul_(normed, pull.mul_(scale)).to(kept.dtype), None


def fork_normed(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` for the residual, and ``x / rms(x)`` for the sublayer; the norm's weight is left to the next product.

    Arguments:
        x: (..., D), float32 or bfloat16; reduced in float32.

    Returns: both in the dtype of ``x``.
    """
    return _ForkNormed.apply(x, eps)


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, reduced in float32, returned in the input's dtype."""
    return (fork_normed(x, eps)[1] * weight_D).to(x.dtype)
