"""Grouped-query attention with gradients, written out because torch's own is slow on a CPU.

Queries lie position by position with the R heads of a key/value head side by side, so that a block of positions is one
matrix against that head's keys: nothing is repeated, and gradients of keys add up inside a product.

Shape suffixes: N sequences, L positions, H query heads, G key/value heads, R = H/G, C channels of one head,
S = H + 2G heads of the fused projection, J = H + G heads that are normed and rotated, X = N*G, M = L*R.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .functions import reciprocal_rms

QUERY_BLOCK = 64  # positions per block; keys behind a block's last query are never multiplied


def rope_table(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, float32 (L, C/2) each, for the half-split rotary embedding."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


class _NormRotate(torch.autograd.Function):
    """Queries, keys and values out of a fused projection: norm per head, the norm's weight, rotation, layout."""

    @staticmethod
    def forward(ctx, qkv_NLSC, q_weight_C, k_weight_C, cos, sin, kv_heads: int, eps: float):
        n, length, heads, channels = qkv_NLSC.shape
        rotated = qkv_NLSC[:, :, : heads - kv_heads]
        scale = reciprocal_rms(rotated, eps)
        normed_NLJC = (rotated * scale).to(qkv_NLSC.dtype)
        ctx.save_for_backward(normed_NLJC, scale, q_weight_C, k_weight_C, cos, sin)
        ctx.kv_heads = kv_heads
        outs = []
        parts = normed_NLJC.split((heads - 2 * kv_heads, kv_heads), 2)
        for part, weight_C in zip(parts, (q_weight_C, k_weight_C), strict=True):
            out = part.new_empty(n, kv_heads, length, part.shape[2] // kv_heads, channels)
            # The weight goes into the tables, which are smaller than the heads by a factor of N * J.
            straight = torch.cat((cos, cos), -1) * weight_C
            crossed = torch.cat((-sin, sin), -1) * weight_C.roll(channels // 2)
            _rotate(part, straight.to(part.dtype), crossed.to(part.dtype), out.transpose(1, 2))
            outs.append(out)
        return *outs, qkv_NLSC[:, :, heads - kv_heads :].transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        *grads, grad_v = grad_outputs
        normed_NLJC, scale, q_weight_C, k_weight_C, cos, sin = ctx.saved_tensors
        n, length, heads, channels = normed_NLJC.shape
        kv_heads = ctx.kv_heads
        straight, crossed = torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1)
        turned_NLJC = torch.empty_like(normed_NLJC)
        parts = turned_NLJC.split((heads - kv_heads, kv_heads), 2)
        for part, grad in zip(parts, grads, strict=True):
            _rotate(grad.transpose(1, 2), straight.to(grad.dtype), crossed.to(grad.dtype), part)
        weights = q_weight_C.expand(heads - kv_heads, -1), k_weight_C.expand(kv_heads, -1)
        weight_JC = torch.cat(weights).to(scale.dtype)
        turned_NLJC, wide_NLJC = turned_NLJC.to(scale.dtype), normed_NLJC.to(scale.dtype)
        product = (turned_NLJC * wide_NLJC).view(-1, heads * channels)
        grad_weight_JC = product.sum(0).view(heads, channels)
        # One product sums every head's channels: reductions over so few are slow one by one.
        sums = torch.block_diag(*weight_JC.unsqueeze(2).unbind(0)) / -channels
        pull = (product @ sums).view_as(scale)
        grad_qkv = normed_NLJC.new_empty(n, length, heads + kv_heads, channels)
        grad_x = (turned_NLJC * weight_JC).addcmul_(wide_NLJC, pull)
        torch.mul(grad_x, scale, out=grad_qkv[:, :, :heads])
        grad_qkv[:, :, heads:].copy_(grad_v.transpose(1, 2))
        grad_q_weight, grad_k_weight = (g.sum(0) for g in grad_weight_JC.split((heads - kv_heads, kv_heads)))
        dtype = q_weight_C.dtype
        return grad_qkv, grad_q_weight.to(dtype), grad_k_weight.to(dtype), None, None, None, None


def _rotate(x: torch.Tensor, straight: torch.Tensor, crossed: torch.Tensor, out: torch.Tensor) -> None:
    """``out = x * straight + swapped halves of x * crossed``.

    Arguments:
        x, out: (N, L, H, C), or (N, L, G, R, C); one of them may be the first and the other the second.
        straight, crossed: (L, C).
    """
    if x.dim() < out.dim():
        x = x.unflatten(2, out.shape[2:4])
    elif out.dim() < x.dim():
        out = out.unflatten(2, x.shape[2:4])
    half = x.shape[-1] // 2
    crossed = crossed[:, None, None]
    # Written out for every head, the table is read in long runs.
    torch.mul(x, straight[:, None, None].expand(x.shape[1:]).contiguous(), out=out)
    out[..., :half].addcmul_(x[..., half:], crossed[..., :half])
    out[..., half:].addcmul_(x[..., :half], crossed[..., half:])


def norm_and_rotate(
    qkv_NLSC: torch.Tensor,
    q_weight_C: torch.Tensor,
    k_weight_C: torch.Tensor,
    table: tuple[torch.Tensor, torch.Tensor],
    kv_heads: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys normed per head and rotated, and values, as :func:`causal_attention` takes them.

    Arguments:
        qkv_NLSC: fused projection: query heads, key heads, value heads.
        q_weight_C, k_weight_C: weights of the two norms.
        table: of :func:`rope_table`.
        kv_heads, eps: G; epsilon of the norms.

    Returns: (N, G, L, R, C), (N, G, L, C), (N, G, L, C), contiguous, in the projection's dtype.
    """
    cos, sin = table
    q, k, v = _NormRotate.apply(qkv_NLSC, q_weight_C, k_weight_C, cos, sin, kv_heads, eps)
    return q, k.squeeze(3), v


class _BlockCausalAttention(torch.autograd.Function):
    """Causal attention in blocks of positions. Keeps the probabilities: windows are short, recomputing is slow."""

    @staticmethod
    def forward(ctx, q_XMC: torch.Tensor, k_XLC: torch.Tensor, v_XLC: torch.Tensor, scale: float) -> torch.Tensor:
        length = k_XLC.shape[1]
        ratio = q_XMC.shape[1] // length
        out_XMC, kept = torch.empty_like(q_XMC), []
        future = torch.full((QUERY_BLOCK, QUERY_BLOCK), float("-inf"), dtype=q_XMC.dtype, device=q_XMC.device).triu_(1)
        future = future.repeat_interleave(ratio, 0)
        for start in range(0, length, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, length)
            rows = slice(start * ratio, end * ratio)
            scores = _product(q_XMC[:, rows], k_XLC[:, :end].transpose(1, 2), scale)
            # Adding is several times faster than filling under a mask.
            scores[:, :, start:].add_(future[: (end - start) * ratio, : end - start])
            probs = torch.softmax(scores, -1, out=scores)
            out_XMC[:, rows] = torch.bmm(probs, v_XLC[:, :end])
            kept.append(probs)
        ctx.save_for_backward(q_XMC, k_XLC, v_XLC, *kept)
        ctx.scale, ctx.ratio = scale, ratio
        return out_XMC

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q_XMC, k_XLC, v_XLC, *kept = ctx.saved_tensors
        grad_XMC = grad_outputs[0]
        grad_q = torch.empty_like(q_XMC)
        grad_k, grad_v = torch.zeros_like(k_XLC), torch.zeros_like(v_XLC)
        row = 0
        for probs in kept:
            rows, end = slice(row, row + probs.shape[1]), probs.shape[2]
            row += probs.shape[1]
            grad = grad_XMC[:, rows]
            grad_v[:, :end] += torch.bmm(probs.transpose(1, 2), grad)
            grad_scores = torch.bmm(grad, v_XLC[:, :end].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(  # pyright: ignore[reportPrivateImportUsage]
                grad_scores, probs, -1, probs.dtype
            )
            grad_q[:, rows] = _product(grad_scores, k_XLC[:, :end], ctx.scale)
            grad_k[:, :end] += _product(grad_scores.transpose(1, 2), q_XMC[:, rows], ctx.scale)
        return grad_q, grad_k, grad_v, None


def _product(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """``scale * a @ b`` of batches, without a pass for the scale."""
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


def causal_attention(q_NGLRC: torch.Tensor, k_NGLC: torch.Tensor, v_NGLC: torch.Tensor) -> torch.Tensor:
    """Causal attention with scale ``C ** -0.5``; every key/value head serves R query heads.

    Arguments:
        q_NGLRC: rotated queries of N sequences; k_NGLC, v_NGLC: keys and values; all contiguous.

    Returns: (N, L, H * C), the heads of a group side by side. On a GPU this is torch's fused attention.
    """
    if q_NGLRC.is_cuda:
        q_NHLC = q_NGLRC.transpose(2, 3).flatten(1, 2)
        out_NHLC = F.scaled_dot_product_attention(q_NHLC, k_NGLC, v_NGLC, is_causal=True, enable_gqa=True)
        return out_NHLC.transpose(1, 2).flatten(2)
    q_XMC = q_NGLRC.flatten(2, 3).flatten(0, 1)
    out_XMC = _BlockCausalAttention.apply(q_XMC, k_NGLC.flatten(0, 1), v_NGLC.flatten(0, 1), q_XMC.shape[-1] ** -0.5)
    return out_XMC.view_as(q_NGLRC).transpose(1, 2).flatten(2)
