"""Losses behind the LM head, without keeping logits: each block of rows gives its losses and their gradients at once.

The gradient of a cross-entropy is known as soon as its logits are, so it is formed in the forward pass, while the
block is still in the cache (as in Liger-Kernel's fused linear cross-entropy, Hsu et al. 2024).

Shape suffixes: T tokens, D hidden size, V vocabulary, B rows of a block.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .functions import wide

_BLOCK_LOGITS = 2**20


class _Head:
    """One set of states in front of the head: its gradients, block by block, as sums over tokens."""

    def __init__(self, states_TD: torch.Tensor, weight_VD: torch.Tensor) -> None:
        self.states_TD, self.weight_VD = states_TD, weight_VD
        self.grad_TD = torch.empty_like(states_TD)
        self.grad_VD = torch.zeros_like(weight_VD, dtype=wide(weight_VD.dtype))

    def log_probs(self, rows: slice) -> torch.Tensor:
        """Log-probabilities of a block, (B, V)."""
        logits_BV = torch.mm(self.states_TD[rows], self.weight_VD.t()).to(self.grad_VD.dtype)
        return torch.log_softmax(logits_BV, -1, out=logits_BV)

    def pull(self, rows: slice, grad_BV: torch.Tensor) -> None:
        """Take the gradient of a block's logits."""
        grad_BV = grad_BV.to(self.weight_VD.dtype)
        torch.mm(grad_BV, self.weight_VD, out=self.grad_TD[rows])
        if self.grad_VD.dtype == grad_BV.dtype:
            self.grad_VD.addmm_(grad_BV.t(), self.states_TD[rows])
        else:
            self.grad_VD += grad_BV.t() @ self.states_TD[rows]


class _HeadLosses(torch.autograd.Function):
    """Mean losses of the full model and of one exit."""

    @staticmethod
    def forward(ctx, final_TD, exit_TD, weight_VD, targets_T, distillation: float):
        final = _Head(final_TD, weight_VD)
        at_exit = None if exit_TD is None else _Head(exit_TD, weight_VD)
        sums = final.grad_VD.new_zeros(2)
        tokens, block = targets_T.shape[0], max(1, _BLOCK_LOGITS // weight_VD.shape[0])
        for start in range(0, tokens, block):
            rows = slice(start, start + block)
            labels_B1 = targets_T[rows, None]
            log_probs_BV = final.log_probs(rows)
            sums[0] -= log_probs_BV.gather(1, labels_B1).sum()
            probs_BV = log_probs_BV.exp_()
            if at_exit is not None:
                log_probs_BV = at_exit.log_probs(rows)
                sums[1] -= (1 - distillation) * log_probs_BV.gather(1, labels_B1).sum()
                sums[1] -= distillation * torch.dot(probs_BV.flatten(), log_probs_BV.flatten())
                grad_BV = log_probs_BV.exp_().sub_(probs_BV, alpha=distillation)
                at_exit.pull(rows, _subtract(grad_BV, labels_B1, 1 - distillation))
            final.pull(rows, _subtract(probs_BV, labels_B1, 1.0))
        heads = [head for head in (final, at_exit) if head is not None]
        ctx.save_for_backward(*(h.grad_TD for h in heads), *(h.grad_VD for h in heads))
        ctx.tokens = tokens
        return (sums / tokens).unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors
        grads_TD, grads_VD = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        shares = [grad / ctx.tokens for grad in grad_outputs]
        states = [(g * share).to(g.dtype) for g, share in zip(grads_TD, shares, strict=False)]
        weight = torch.stack([g * share for g, share in zip(grads_VD, shares, strict=False)]).sum(0)
        return states[0], states[1] if len(states) > 1 else None, weight.to(states[0].dtype), None, None


def _subtract(probs_BV: torch.Tensor, labels_B1: torch.Tensor, amount: float) -> torch.Tensor:
    return probs_BV.scatter_add_(1, labels_B1, probs_BV.new_full((1, 1), -amount).expand_as(labels_B1))


def head_losses(
    final_TD: torch.Tensor,
    exit_TD: torch.Tensor | None,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    distillation: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cross-entropy of the full model, and that of an exit against the true tokens and the full model's distribution.

    Arguments:
        final_TD, exit_TD: states that the LM head multiplies, in the dtype of ``weight_VD``; None for no exit.
        weight_VD: LM head.
        targets_T: int64 true next tokens.
        distillation: weight of the full model's distribution in the exit's loss, 0 … 1.

    Returns: float32 scalars; the second is None without an exit.
    """
    full, at_exit = _HeadLosses.apply(final_TD, exit_TD, weight_VD, targets_T, distillation)
    return full, None if exit_TD is None else at_exit
