"""What kinds of layers that keep recurrent states have in common: they have no keys and values, and cannot be split."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from ....kernels.api.types import LinearWeights
from ...checkpoint.config_reader import ConfigReader
from .kind import AttentionCuts, AttentionLayout, AttentionSpec, Shape


@dataclass(frozen=True, kw_only=True)
class StateSpec(AttentionSpec):
    """See :class:`AttentionSpec`. What a layer remembers is in :meth:`state_shapes`."""

    @property
    def rotary_channels(self) -> int:
        return 0

    @abstractmethod
    def state_shapes(self) -> tuple[Shape, ...]: ...

    def cache_shapes(self, page_size: int, dtype: torch.dtype) -> tuple[Shape, ...]:
        return ()

    def part(self, parts: int, part: int) -> Self:
        if parts > 1:
            raise ValueError(f"parallel.tensor={parts}: layers of kind {self.kind!r} are not shared out")
        return self

    def cuts(self, layout: AttentionLayout, parts: int, part: int) -> AttentionCuts:
        return AttentionCuts(outputs={}, inputs={})


def check_activation(config: ConfigReader) -> None:
    """Raises CheckpointError for a ``hidden_act`` that these layers' convolutions do not have."""
    if (name := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise config.error("hidden_act", name, "silu, in a model with recurrent states")


def with_taps_first(parts: Mapping[str, LinearWeights | torch.Tensor], name: str) -> dict[str, Any]:
    """The parts of a layer with the weight of its convolution, (X, 1, W) in checkpoints, as (W, X)."""
    weight_X1W = parts[name]
    assert isinstance(weight_X1W, torch.Tensor)
    return {**parts, name: weight_X1W[:, 0].T.contiguous()}
