"""Differentiable operations written out because torch's own are slow on a CPU in bfloat16: attention and RMS norm.

Shape suffixes: X sequences times heads, L positions, C channels of one head, D normed dimension, V vocabulary,
T tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

QUERY_BLOCK = 64  # queries per block; keys behind a block's last query are never multiplied


class _BlockCausalAttention(torch.autograd.Function):
    """Causal attention in blocks of queries. Keeps the probabilities: windows are short, recomputing is slow."""

    @staticmethod
    def forward(ctx, q_XLC: torch.Tensor, k_XLC: torch.Tensor, v_XLC: torch.Tensor, scale: float) -> torch.Tensor:
        length = q_XLC.shape[1]
        out_XLC, kept = torch.empty_like(q_XLC), []
        future = torch.ones(QUERY_BLOCK, QUERY_BLOCK, dtype=torch.bool, device=q_XLC.device).triu_(1)
        for start in range(0, length, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, length)
            scores = torch.bmm(q_XLC[:, start:end] * scale, k_XLC[:, :end].transpose(1, 2))
            scores[:, :, start:end].masked_fill_(future[: end - start, : end - start], float("-inf"))
            probs = scores.softmax(-1)
            out_XLC[:, start:end] = torch.bmm(probs, v_XLC[:, :end])
            kept.append(probs)
        ctx.save_for_backward(q_XLC, k_XLC, v_XLC, *kept)
        ctx.scale = scale
        return out_XLC

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_XLC,) = grad_outputs
        q_XLC, k_XLC, v_XLC, *kept = ctx.saved_tensors
        grad_q = torch.empty_like(q_XLC)
        grad_k, grad_v = torch.zeros_like(k_XLC), torch.zeros_like(v_XLC)
        for block, probs in enumerate(kept):
            start = block * QUERY_BLOCK
            end = start + probs.shape[1]
            grad = grad_XLC[:, start:end]
            grad_v[:, :end] += torch.bmm(probs.transpose(1, 2), grad)
            grad_probs = torch.bmm(grad, v_XLC[:, :end].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(  # pyright: ignore[reportPrivateImportUsage]
                grad_probs, probs, -1, probs.dtype
            )
            grad_q[:, start:end] = torch.bmm(grad_scores, k_XLC[:, :end]) * ctx.scale
            grad_k[:, :end] += torch.bmm(grad_scores.transpose(1, 2), q_XLC[:, start:end]) * ctx.scale
        return grad_q, grad_k, grad_v, None


def causal_attention(q_NHLC: torch.Tensor, k_NGLC: torch.Tensor, v_NGLC: torch.Tensor) -> torch.Tensor:
    """Causal attention with scale ``C ** -0.5``; every G serves H / G query heads.

    Arguments:
        q_NHLC: rotated queries of N sequences; k_NGLC, v_NGLC: keys and values.

    Returns: (N, H, L, C). On a GPU this is torch's fused attention.
    """
    groups = q_NHLC.shape[1] // k_NGLC.shape[1]
    if groups > 1:
        k_NGLC, v_NGLC = k_NGLC.repeat_interleave(groups, 1), v_NGLC.repeat_interleave(groups, 1)
    if q_NHLC.is_cuda:
        return F.scaled_dot_product_attention(q_NHLC, k_NGLC, v_NGLC, is_causal=True)
    q, k, v = (t.contiguous().flatten(0, 1) for t in (q_NHLC, k_NGLC, v_NGLC))
    return _BlockCausalAttention.apply(q, k, v, q_NHLC.shape[-1] ** -0.5).unflatten(0, q_NHLC.shape[:2])


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and one number per row, not the float32 intermediates."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        rstd = x.float().square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, rstd)
        return (x * rstd).mul_(weight_D).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        x, weight_D, rstd = ctx.saved_tensors
        normed = x * rstd
        grad32 = grad.float()
        grad_weight = (grad32 * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        grad32 = grad32 * weight_D
        pull = (grad32 * normed).mean(-1, keepdim=True)
        return grad32.sub_(normed.mul_(pull)).mul_(rstd).to(x.dtype), grad_weight, None


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, reduced in float32, returned in the input's dtype."""
    return _RMSNorm.apply(x, weight_D, eps)
