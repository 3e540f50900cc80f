"""No attention: of layers that are an FFN or a mixture alone. They keep nothing of their rows."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from ....kernels.api.types import AttentionBatch, KVLayer, LinearWeights
from ...checkpoint.config_reader import ConfigReader
from ..family import Family
from .kind import AttentionContext, AttentionCuts, AttentionLayout, AttentionSpec, AttentionWeights, Shape


@dataclass(frozen=True, kw_only=True)
class NoAttentionSpec(AttentionSpec):
    """See :class:`AttentionSpec`."""

    kind: ClassVar[str] = "none"

    @classmethod
    def from_config(cls, config: ConfigReader, family: Family, layer: int) -> Self:
        return cls()

    @property
    def rotary_channels(self) -> int:
        return 0

    @property
    def keeps_keys(self) -> bool:
        return False

    @property
    def keeps_rows(self) -> bool:
        return False

    def layout(self, prefix: str, hidden_size: int, available: Container[str]) -> AttentionLayout:
        return AttentionLayout(kind=self, linears={})

    def weights(self, parts: Mapping[str, LinearWeights | torch.Tensor]) -> AttentionWeights:
        return AttentionWeights()

    def forward(
        self, weights: Any, x_TD: torch.Tensor, kv: KVLayer, batch: AttentionBatch, context: AttentionContext
    ) -> torch.Tensor:
        raise AssertionError("none of the layer's blocks is attention")

    def cache_shapes(self, page_size: int, dtype: torch.dtype) -> tuple[Shape, ...]:
        return ()

    def part(self, parts: int, part: int) -> Self:
        return self

    def cuts(self, layout: AttentionLayout, parts: int, part: int) -> AttentionCuts:
        return AttentionCuts(outputs={}, inputs={})

    def flops(self, hidden_size: int) -> int:
        return 0
