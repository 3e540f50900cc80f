"""A model's layers and exits as one thing that a backend may run at once, instead of operation by operation.

Shape suffixes as in ``types.py``; N exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from .router_spec import RouterSpec
from .types import AttentionBatch, ExpertBudget, ExpertWeights, KVLayer, KVProjection, LinearWeights, ProbeWeights


@dataclass(frozen=True, kw_only=True)
class StackShape:
    """What all layers have in common.

    Arguments:
        residual_scale: factor on what a block adds to the residual stream.
    """

    hidden_size: int
    norm_eps: float
    residual_scale: float


@dataclass(frozen=True, kw_only=True)
class StackNorm:
    """Adds what the last block left to the residual stream and norms the sum. A layer begins with one."""

    weight_D: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class StackAttention:
    """Grouped-query attention over the normed rows, over the layer's cache.

    Arguments:
        qkv: queries, keys and values in one projection.
        norm_per_head: norms of queries and keys, where there are any, go over each head, not over the full width.
        scale: factor on the scores.
        window: how many positions a row sees, its own included; None sees all.
        sinks_H: see :func:`reference.paged_attention`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv: LinearWeights
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    norm_per_head: bool
    o: LinearWeights
    scale: float
    window: int | None
    sinks_H: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class StackExperts:
    """A mixture of experts over the normed rows.

    Arguments:
        router, rule: how experts are chosen; None where each has weight 1.
        contribution_scale_E: what a budget ranks experts by, see :func:`.budget_reference.limit_experts`.
        selection_bias_E, expert_scale_E: what the rule takes beside logits.
        shared, shared_gate: an expert that every row uses beside them, and the logit of its weight's sigmoid.
    """

    ffn: ExpertWeights
    router: LinearWeights | None
    rule: RouterSpec | None
    contribution_scale_E: torch.Tensor | None = None
    selection_bias_E: torch.Tensor | None = None
    expert_scale_E: torch.Tensor | None = None
    shared: ExpertWeights | None = None
    shared_gate: LinearWeights | None = None


StackBlock = StackNorm | StackAttention | StackExperts


class SharedGroup(Protocol):
    """Processes that exchange through memory that they share; ``handle`` belongs to the backend's kernels."""

    handle: Any


@dataclass(frozen=True, kw_only=True)
class StackExit:
    """An exit between two layers.

    Arguments:
        down, up: factors of the exit head's adapter.
        probe: None where no row can exit.
        projections: keys and values of the layers behind it.
    """

    after_layers: int
    down: LinearWeights
    up: LinearWeights
    probe: ProbeWeights | None
    projections: Sequence[KVProjection]


class StackResult(NamedTuple):
    """What became of the rows of a step.

    Arguments:
        out_TD: float32, what each row hands to the LM head; the tensor that came in if no row exited.
        counts: int64, one after the other what the properties below show. The next call may overwrite it.
    """

    out_TD: torch.Tensor
    counts: torch.Tensor

    @property
    def depths_T(self) -> torch.Tensor:
        """Layers that ran for each row."""
        return self.counts[: len(self.out_TD)]

    @property
    def decisions_N2(self) -> torch.Tensor:
        """Rows with a finite threshold that reached each exit, and how many of them went on."""
        launched = (len(self.counts) - len(self.out_TD) - 1) // 3 + 1
        return self.counts[len(self.out_TD) : -launched].view(-1, 2)


class Stack(Protocol):
    """Layers and exits in a backend's hands. Results are bitwise those of its single operations."""

    def share(self, group: SharedGroup) -> None:
        """Heads and neurons are parts of those that some processes have together: attention's and the experts' results
        are added up among them. Layers without exits only."""
        ...

    def run(
        self,
        layers: range,
        x_TD: torch.Tensor,
        kv: Sequence[KVLayer],
        cos_sin_LC: torch.Tensor,
        batch: AttentionBatch,
        router_entropy_T: torch.Tensor | None = None,
        budget: ExpertBudget | None = None,
    ) -> torch.Tensor:
        """Run layers that follow one another.

        Arguments:
            x_TD: the residual stream, float32; it may be overwritten.
            kv: the cache of every layer of the model.
            router_entropy_T: float32; if given, takes the mean entropy of these layers' routers, in nats.
            budget: how many experts the rows may use; None is all that the router chose.

        Returns: the residual stream behind them.
        """
        ...

    def run_with_exits(
        self,
        x_TD: torch.Tensor,
        kv: Sequence[KVLayer],
        cos_sin_LC: torch.Tensor,
        batch: AttentionBatch,
        thresholds_NT: torch.Tensor,
        budget: ExpertBudget | None = None,
    ) -> StackResult:
        """Run all layers; rows exit where their probe's logit reaches their threshold.

        The keys and values of the layers that a row skips are made of its state at the exit before any row continues;
        see :meth:`TorchBackend.project_kv`.

        Arguments:
            thresholds_NT: float32; +inf keeps a row, -inf makes it exit.
            Others as for :meth:`run`. A sequence of several rows continues or exits as a whole.
        """
        ...
