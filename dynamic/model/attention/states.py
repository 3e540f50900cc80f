"""What kinds of layers that keep recurrent states have in common: they have no keys and values.

Rows that skip such a layer advance its states as if it had read the residual stream at their exit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ....kernels.api.types import AttentionBatch, KVLayer, KVProjection, LinearWeights
from ....kernels.api.uncommon import STATES
from ....kernels.torch.backend import TorchBackend
from ...checkpoint.config_reader import ConfigReader
from .kind import AttentionContext, AttentionSpec, AttentionWeights, Shape


@dataclass(frozen=True, kw_only=True)
class StateWeights(AttentionWeights, ABC):
    """See :class:`AttentionWeights`."""

    @property
    @abstractmethod
    def reading(self) -> tuple[LinearWeights, ...]:
        """The projections that read the layer's input; the first one is the largest."""

    @property
    def propagated_bytes(self) -> int:
        return sum(linear.nbytes for linear in self.reading)


@dataclass(frozen=True, kw_only=True)
class StateProjection(KVProjection):
    """What advances the states of rows that skip a layer: all of it but its output.

    Arguments:
        weights: of the layer.
    """

    weights: StateWeights


@dataclass(frozen=True, kw_only=True)
class StateSpec(AttentionSpec):
    """See :class:`AttentionSpec`. What a layer remembers is in :meth:`state_shapes`."""

    @property
    def uncommon(self) -> set[str]:
        return {STATES}

    @property
    def rotary_channels(self) -> int:
        return 0

    @property
    def keeps_keys(self) -> bool:
        return False

    @abstractmethod
    def state_shapes(self) -> tuple[Shape, ...]: ...

    def cache_shapes(self, page_size: int, dtype: torch.dtype) -> tuple[Shape, ...]:
        return ()

    @abstractmethod
    def advance(
        self, weights: Any, x_TD: torch.Tensor, kv: KVLayer, batch: AttentionBatch, context: AttentionContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Let normed rows (T, D) into the states of their sequences; what they read there, and the output's gate."""

    def projection(self, norm_D: torch.Tensor | None, weights: Any, backend: TorchBackend) -> KVProjection:
        return StateProjection(norm_D=norm_D, kv=weights.reading[0], k_norm=None, weights=weights)

    def propagate(
        self,
        projections: Sequence[KVProjection],
        x_RD: torch.Tensor,
        kv: Sequence[KVLayer],
        batch: AttentionBatch,
        context: AttentionContext,
    ) -> None:
        for projection, layer in zip(projections, kv, strict=True):
            assert isinstance(projection, StateProjection)
            read_RD = context.backend.read_by(projection, x_RD, context.norm_eps)
            self.advance(projection.weights, read_RD, layer, batch, context)


def check_activation(config: ConfigReader) -> None:
    """Raises CheckpointError for a ``hidden_act`` that these layers' convolutions do not have."""
    if (name := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise config.error("hidden_act", name, "silu, in a model with recurrent states")


def with_decay_rate(parts: Mapping[str, LinearWeights | torch.Tensor], axes: str) -> dict[str, Any]:
    """The parts of a layer with ``decay_rate`` of those axes, below zero, instead of ``log_decay``."""
    fields: dict[str, Any] = dict(parts)
    fields[f"decay_rate_{axes}"] = -torch.exp(fields.pop(f"log_decay_{axes}"))
    return fields


def with_taps_first(parts: Mapping[str, LinearWeights | torch.Tensor], name: str) -> dict[str, Any]:
    """The parts of a layer with the weight of its convolution, (X, 1, W) in checkpoints, as (W, X)."""
    weight_X1W = parts[name]
    assert isinstance(weight_X1W, torch.Tensor)
    return {**parts, name: weight_X1W[:, 0].T.contiguous()}
