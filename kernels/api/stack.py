"""A model's layers and exits as one thing that a backend may run at once, instead of operation by operation.

Shape suffixes as in ``types.py``; N exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from .router_spec import RouterSpec
from .stack_states import StackState
from .types import AttentionBatch, ExpertBudget, ExpertWeights, KVLayer, KVProjection, LinearWeights, ProbeWeights


class NotStacked(Exception):
    """Why a model's layers run operation by operation."""


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
    """Adds what the last block left to the residual stream and norms the sum for the blocks behind.

    Arguments:
        weight_D: in the model's dtype, or float32; then rows are normed in float32 and rounded once.
        bias_D: float32, of a layer norm.
        centred: a layer norm, whose weight is float32, instead of a root-mean-square norm.
    """

    weight_D: torch.Tensor
    bias_D: torch.Tensor | None = None
    centred: bool = False

    def is_plain(self, dtype: torch.dtype) -> bool:
        """Whether it is a root-mean-square norm of a model's dtype."""
        return not self.centred and self.weight_D.dtype == dtype


@dataclass(frozen=True, kw_only=True)
class StackOutNorm(StackNorm):
    """Norms what the last block left."""


@dataclass(frozen=True, kw_only=True)
class StackRead:
    """Adds what the last block left to the residual stream; the blocks behind read the sum as it is."""


@dataclass(frozen=True, kw_only=True)
class StackAdd:
    """Adds what the last block left to the residual stream; the blocks behind read what that block read."""


@dataclass(frozen=True, kw_only=True)
class StackScale:
    """Adds what the last block left to the residual stream, and multiplies the sum by a number, float32, (1,)."""

    factor: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class StackGrowth:
    """Queries at position p are multiplied by ``1 + rate · log(1 + floor((p + offset) / period))``."""

    rate: float
    period: int
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class StackAttention:
    """Grouped-query attention over the rows that are read, over the layer's cache.

    Arguments:
        qkv: queries, keys and values in one projection.
        q_norm, k_norm: in the model's dtype, or float32, see :class:`StackNorm`.
        norm_per_head: norms of queries and keys, where there are any, go over each head, not over the full width.
        scale: factor on the scores.
        window: how many positions a row sees, its own included; None sees all.
        sinks_H, softcap: see :func:`reference.paged_attention`.
        table: number of the table that it rotates with, among those that a step brings.
        clip: queries, keys and values are clipped to ± this value, behind norms over the full width, in front of
            norms per head.
        gate: a projection of the rows that are read; the heads' outputs are multiplied by its sigmoid.
        norm_after_rotation: the norms per head come behind the rotation.
        growth: of the queries, behind norms.
        chunk: positions that see each other; None: all do.
        values: channels of a value; None: as many as a key has.
        value_scale: factor on the values.
        value_norm: float32, of each head's value.
        values_are_keys: values are what the keys' projection makes, not normed as keys and not rotated.
        gated_queries: in the projection each head's queries lie in front of its gate; the heads' outputs are multiplied
            by the gates' sigmoid.
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
    table: int = 0
    softcap: float | None = None
    clip: float | None = None
    gate: LinearWeights | None = None
    norm_after_rotation: bool = False
    growth: StackGrowth | None = None
    chunk: int | None = None
    values: int | None = None
    value_scale: float = 1.0
    value_norm: torch.Tensor | None = None
    values_are_keys: bool = False
    gated_queries: bool = False

    def has_plain_keys(self, dtype: torch.dtype) -> bool:
        """Whether keys and values are made as :meth:`TorchBackend.project_kv` makes them, in a model's dtype."""
        values = self.values not in (None, self.head_dim) or self.value_scale != 1.0 or self.value_norm is not None
        norms = any(norm is not None and norm.dtype != dtype for norm in (self.q_norm, self.k_norm))
        return not (values or norms or self.values_are_keys or self.norm_after_rotation or self.clip is not None)


@dataclass(frozen=True, kw_only=True)
class StackApart:
    """Norms where a mixture, and its router, read the residual stream itself beside a shared expert over the rows that
    are read.

    Arguments:
        router: in front of the router, in the model's dtype; router_eps: its epsilon.
        mixture: in front of the mixture.
        mixture_out, shared_out: of what each leaves.
    """

    router: torch.Tensor
    router_eps: float
    mixture: StackNorm
    mixture_out: StackNorm
    shared_out: StackNorm


@dataclass(frozen=True, kw_only=True)
class StackLatentAttention:
    """Multi-head latent attention over the rows that are read, over the layer's cache of latents.

    Arguments:
        latent, plain_dim, rotated_dim, value_dim: channels of a latent, of the parts of a query, of a head's values.
        q_a, q_norm: what queries are made of where that is not those rows themselves.
        key_up, value_up: of every head, see :meth:`.LatentOperations.pack_head_linear`.
        norm_eps: of ``q_norm`` and ``kv_norm``.
        interleaved: see :func:`reference.rope`.
        Others as for :class:`StackAttention`.
    """

    num_heads: int
    latent: int
    plain_dim: int
    rotated_dim: int
    value_dim: int
    q_a: LinearWeights | None
    q_norm: torch.Tensor | None
    q: LinearWeights
    kv_a: LinearWeights
    kv_norm: torch.Tensor
    key_up: LinearWeights
    value_up: LinearWeights
    o: LinearWeights
    norm_eps: float
    scale: float
    interleaved: bool
    window: int | None
    table: int = 0

    @property
    def linears(self) -> tuple[LinearWeights, ...]:
        """Those of all heads together."""
        return (*(() if self.q_a is None else (self.q_a,)), self.q, self.kv_a, self.o)


@dataclass(frozen=True, kw_only=True)
class StackExperts:
    """A mixture of experts over the rows that are read.

    Arguments:
        router, rule: how experts are chosen; None where each has weight 1. A weight on the input needs a rule that
            chooses one expert.
        contribution_scale_E: what a budget ranks experts by, see :func:`.budget_reference.limit_experts`.
        selection_bias_E, expert_scale_E: what the rule takes beside logits.
        always_on: so many experts in front of those that are chosen have weight 1 for every row.
        shared, shared_gate: an expert that every row uses beside them, and the logit of its weight's sigmoid.
        shared_scale: factor on what it leaves.
        apart: None where all read the same rows.
    """

    ffn: ExpertWeights
    router: LinearWeights | None
    rule: RouterSpec | None
    contribution_scale_E: torch.Tensor | None = None
    selection_bias_E: torch.Tensor | None = None
    expert_scale_E: torch.Tensor | None = None
    always_on: int = 0
    shared: ExpertWeights | None = None
    shared_gate: LinearWeights | None = None
    shared_scale: float = 1.0
    apart: StackApart | None = None


StackMixer = StackAttention | StackLatentAttention | StackState
StackBlock = StackNorm | StackRead | StackAdd | StackScale | StackMixer | StackExperts


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

    num_exits: int

    def share(self, group: SharedGroup) -> None:
        """Heads and neurons are parts of those that some processes have together: attention's and the experts' results
        are added up among them. Layers without exits only."""
        ...

    def run(
        self,
        layers: range,
        x_TD: torch.Tensor,
        kv: Sequence[KVLayer],
        tables: Sequence[torch.Tensor],
        batch: AttentionBatch,
        router_entropy_T: torch.Tensor | None = None,
        budget: ExpertBudget | None = None,
    ) -> torch.Tensor:
        """Run layers that follow one another.

        Arguments:
            x_TD: the residual stream, float32; it may be overwritten.
            kv: the cache of every layer of the model.
            tables: of rotations, which layers name by number, see :func:`.rope_table`; all of one length.
            router_entropy_T: float32; if given, takes the mean entropy of these layers' routers, in nats.
            budget: how many experts the rows may use; None is all that the router chose.

        Returns: the residual stream behind them.
        """
        ...

    def run_with_exits(
        self,
        x_TD: torch.Tensor,
        kv: Sequence[KVLayer],
        tables: Sequence[torch.Tensor],
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
