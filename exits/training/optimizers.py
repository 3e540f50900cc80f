"""Optimisers: AdamW for everything, or Muon for matrices with AdamW for the rest; and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

# Coefficients of the quintic Newton-Schulz iteration (Jordan et al. 2024); they push singular values towards 1.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5


def orthogonalize(update_XAB: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrix to each of X matrices, roughly, in the update's dtype.

    Arguments:
        update_XAB: (X, A, B) float32; iterated in bfloat16 on a GPU and in float32 on a CPU, where that is no slower.
    """
    a, b, c = _NEWTON_SCHULZ
    x = update_XAB / (update_XAB.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if x.is_cuda:
        x = x.bfloat16()
    tall = x.shape[1] > x.shape[2]
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = torch.bmm(x.transpose(1, 2), x) if tall else torch.bmm(x, x.transpose(1, 2))
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        x = torch.bmm(x, polynomial) if tall else torch.bmm(polynomial, x)
    return x.to(update_XAB.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024). Leading dimensions of a parameter are a batch of matrices.

    Arguments:
        params: tensors of two or more dimensions.
        lr: root-mean-square size of an update (scaled as in Liu et al. 2025, so that AdamW's rates carry over).
        momentum: of the Nesterov momentum.
        weight_decay: decoupled.
    """

    def __init__(
        self, params: Iterable[torch.nn.Parameter], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape[-2:], []).append(p)
            for (rows, columns), params in by_shape.items():
                updates = [self._momentum(p, group["momentum"]).reshape(-1, rows, columns) for p in params]
                scale = 0.2 * math.sqrt(max(rows, columns))
                done = orthogonalize(torch.cat(updates)).split([u.shape[0] for u in updates])
                for p, update in zip(params, done, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.view_as(p), alpha=-group["lr"] * scale)

    def _momentum(self, p: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        assert p.grad is not None
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(state["momentum"], momentum)


def make_optimizers(
    model: torch.nn.Module, name: str, learning_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """The optimisers of a model's trainable parameters.

    Arguments:
        name: ``adamw``, or ``muon``: matrices inside the layers by Muon; embeddings, norms, routers, adapters by AdamW.

    Raises:
        ValueError: for another name.
    """
    if name not in ("adamw", "muon"):
        raise ValueError(f"optimizer must be adamw or muon, not {name!r}")
    matrices, plain, bare = [], [], []
    for key, p in model.named_parameters():
        if not p.requires_grad:
            continue
        outside = any(part in key for part in ("embedding", "router", "adapter"))
        if p.ndim >= 2 and name == "muon" and not outside:
            matrices.append(p)
        else:
            (plain if p.ndim >= 2 and "embedding" not in key else bare).append(p)
    groups = [{"params": plain, "weight_decay": weight_decay}, {"params": bare, "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True))
    if matrices:
        optimizers.append(Muon(matrices, lr=learning_rate, weight_decay=weight_decay))
    return optimizers


def cosine_rate(step: int, total_steps: int, warmup_steps: int, final: float) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine down to ``final``."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
