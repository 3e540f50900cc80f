"""Adapters and probes on a frozen backbone, trained from hidden states that were computed once.

Shape suffixes: R rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from ...kernels.api.ranges import check_ranges
from ..exit_head import ExitHeadAdapter
from ..probes import Probe, ProbeSpec

Logits = Callable[[torch.Tensor], torch.Tensor]  # (R, D) in front of the final norm → float32 (R, V)


@dataclass(frozen=True, kw_only=True)
class ExitStates:
    """What a frozen model computed for R rows; the same rows everywhere.

    Arguments:
        hidden_RD: residual stream by layers executed: one per exit, and 0 for the embedding.
        router_entropy_R: by exit, mean entropy of the routers since the exit before, in nats; empty for dense models.
        final_RD: residual stream after the last layer.
        group_R: number of the document or request that a row belongs to, int64; splits keep groups whole.
    """

    hidden_RD: dict[int, torch.Tensor]
    router_entropy_R: dict[int, torch.Tensor] = field(default_factory=dict)
    final_RD: torch.Tensor
    group_R: torch.Tensor

    @property
    def exit_layers(self) -> tuple[int, ...]:
        return tuple(sorted(layer for layer in self.hidden_RD if layer))

    def previous(self, layer: int) -> torch.Tensor:
        """The state at the exit before this one; the embedding before the first."""
        return self.hidden_RD[max(other for other in self.hidden_RD if other < layer)]

    def take(self, rows: torch.Tensor) -> ExitStates:
        """The same for some rows (int64 indices or a mask)."""
        return ExitStates(
            hidden_RD={layer: x[rows] for layer, x in self.hidden_RD.items()},
            router_entropy_R={layer: x[rows] for layer, x in self.router_entropy_R.items()},
            final_RD=self.final_RD[rows],
            group_R=self.group_R[rows],
        )

    def split(self, shares: tuple[float, ...], seed: int = 0) -> list[ExitStates]:
        """Parts with about these shares of the groups; a group is never divided.

        Raises:
            ValueError: when there are fewer groups than parts.
        """
        groups = self.group_R.unique()
        if groups.numel() < len(shares):
            raise ValueError(f"{groups.numel()} documents cannot be split into {len(shares)} parts")
        order = groups[torch.randperm(groups.numel(), generator=torch.Generator().manual_seed(seed))]
        bounds = torch.tensor([0.0, *shares]).cumsum(0) / sum(shares) * order.numel()
        cuts = bounds.round().long().tolist()
        parts = [order[start:stop] for start, stop in pairwise(cuts)]
        return [self.take(torch.isin(self.group_R, part)) for part in parts]


@dataclass(frozen=True, kw_only=True)
class HeadTraining:
    """How adapters and probes are trained.

    Arguments:
        steps: optimiser steps of each.
        batch_rows: rows per step.
        learning_rate: of Adam, falling to zero in half a cosine.
        weight_decay: decoupled.
        seed: of initial weights and batches.
    """

    steps: int = 600
    batch_rows: int = 1024
    learning_rate: float = 3e-3
    weight_decay: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(self, "steps", "batch_rows", least=1)
        check_ranges(self, "learning_rate", above=0)
        check_ranges(self, "weight_decay", least=0)
        check_ranges(self, "seed", least=0, below=2**63)


@torch.no_grad()
def choices(x_RD: torch.Tensor, logits: Logits, chunk: int = 4096) -> torch.Tensor:
    """The best token of every row, int64, without keeping all logits."""
    return torch.cat([logits(part).argmax(-1) for part in x_RD.split(chunk)])


def fit_adapter(
    adapter: ExitHeadAdapter,
    layer: int,
    states: ExitStates,
    logits: Logits,
    config: HeadTraining,
    watch: Callable[[int], None] | None = None,
) -> None:
    """Train an adapter in place, so that its exit's distribution follows the full model's (KL divergence).

    Arguments:
        layer: layers executed before the exit.
        logits: final norm and LM head of the frozen model, differentiable in its argument.
        watch: called with the number of steps done.
    """
    hidden_RD = states.hidden_RD[layer]

    def loss(rows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher_RV = logits(states.final_RD[rows])
        divergence: torch.Tensor = _Divergence.apply(logits(adapter(hidden_RD[rows])), teacher_RV)  # type: ignore[assignment]
        return divergence

    _descend(list(adapter.parameters()), hidden_RD.shape[0], loss, config, watch)


def fit_probe(spec: ProbeSpec, layer: int, states: ExitStates, correct_R: torch.Tensor, config: HeadTraining) -> Probe:
    """Train a probe to detect rows whose early token is the full model's.

    Arguments:
        correct_R: 1 where it is, from :func:`exit_labels`.

    Returns: the probe, in evaluation mode. Its weights are those of the last step; calibrate it on other rows.
    """
    probe = Probe(spec, states.hidden_RD[layer].shape[1], torch.Generator().manual_seed(config.seed))

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(probe_logits(probe, layer, states, rows), correct_R[rows])

    _descend(list(probe.parameters()), correct_R.numel(), loss, config)
    return probe.eval()


def probe_logits(
    probe: Probe, layer: int, states: ExitStates, rows: torch.Tensor | slice = slice(None)
) -> torch.Tensor:
    """A probe's logits on some rows of the states, or on all of them, (R,)."""
    previous = states.previous(layer)[rows] if probe.spec.previous else None
    entropy = states.router_entropy_R[layer][rows] if probe.spec.router_entropy else None
    return probe(states.hidden_RD[layer][rows], previous, entropy)


def exit_labels(
    adapter: ExitHeadAdapter, layer: int, states: ExitStates, logits: Logits, full_R: torch.Tensor
) -> torch.Tensor:
    """1.0 where the exit's best token is the full model's, (R,).

    Arguments:
        full_R: the full model's :func:`choices` on these states, which all exits share.
    """
    with torch.no_grad():
        early = choices(adapter(states.hidden_RD[layer]), logits)
    return (early == full_R).float()


class _Divergence(torch.autograd.Function):
    """Mean KL divergence of the student from the teacher. With a large vocabulary the passes over the logits are most
    of a step; torch's own chain makes twice as many."""

    @staticmethod
    def forward(ctx: Any, student_RV: torch.Tensor, teacher_RV: torch.Tensor) -> torch.Tensor:
        student_RV, teacher_RV = student_RV.log_softmax(-1), teacher_RV.log_softmax(-1)
        wanted_RV = teacher_RV.exp()
        rows = student_RV.shape[0]
        loss = torch.dot(teacher_RV.sub_(student_RV).flatten(), wanted_RV.flatten()) / rows
        ctx.save_for_backward(student_RV.exp_().sub_(wanted_RV).div_(rows))
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.saved_tensors[0] * gradients[0], None


def _descend(
    parameters: list[torch.nn.Parameter],
    rows: int,
    loss: Callable[[torch.Tensor], torch.Tensor],
    config: HeadTraining,
    watch: Callable[[int], None] | None = None,
) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    generator = torch.Generator().manual_seed(config.seed)
    for step in range(config.steps):
        batch = torch.randint(rows, (min(rows, config.batch_rows),), generator=generator)
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
        schedule.step()
        if watch is not None:
            watch(step + 1)
