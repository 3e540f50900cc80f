"""Gated short convolution, as in LFM2: a row sees itself and the few rows before it, channel by channel.

Shape suffixes as in ``kernels/reference/states.py``.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch

from ....kernels.api.ranges import check_ranges
from ....kernels.api.stack_states import StackShortConv
from ....kernels.api.types import AttentionBatch, KVLayer, LinearWeights, StateLayer
from ...checkpoint.config_reader import ConfigReader
from ..family import Family
from ..norms import TensorLayout
from ..parts import part_of, scaled, width
from .kind import AttentionContext, AttentionCuts, AttentionLayout, Shape, linear_layout
from .states import StateSpec, StateWeights, with_taps_first


@dataclass(frozen=True, kw_only=True)
class ShortConvWeights(StateWeights):
    """See :class:`AttentionWeights`.

    Arguments:
        gates: of the convolution's input, of its output, and the input, in one projection.
        conv_WX, conv_bias_X: float32.
    """

    gates: LinearWeights
    out: LinearWeights
    conv_WX: torch.Tensor
    conv_bias_X: torch.Tensor | None = None

    @property
    def reading(self) -> tuple[LinearWeights, ...]:
        return (self.gates,)


@dataclass(frozen=True, kw_only=True)
class ShortConvSpec(StateSpec):
    """See :class:`AttentionSpec`.

    Arguments:
        channels: of the convolution.
        taps: of it.
        bias: of the convolution and both projections.
    """

    kind: ClassVar[str] = "short_conv"
    channels: int
    taps: int
    bias: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, "channels", least=1)
        check_ranges(self, "taps", least=2)

    @classmethod
    def from_config(cls, config: ConfigReader, family: Family, layer: int) -> Self:
        return cls(
            channels=config.integer("hidden_size"),
            taps=config.integer("conv_L_cache", 3),
            bias=config.flag("conv_bias", False),
        )

    def layout(self, prefix: str, hidden_size: int, available: Container[str]) -> AttentionLayout:
        prefix += "conv."

        shape = (self.channels, 1, self.taps)
        tensors = {"conv_WX": TensorLayout(name=f"{prefix}conv.weight", shape=shape, float32=True)}
        if self.bias:
            tensors["conv_bias_X"] = TensorLayout(name=f"{prefix}conv.bias", shape=(self.channels,), float32=True)
        return AttentionLayout(
            kind=self,
            linears={
                "gates": linear_layout(prefix, hidden_size, {"in_proj": 3 * self.channels}, bias=self.bias),
                "out": linear_layout(prefix, self.channels, {"out_proj": hidden_size}, bias=self.bias),
            },
            tensors=tensors,
        )

    def weights(self, parts: Mapping[str, LinearWeights | torch.Tensor]) -> ShortConvWeights:
        return ShortConvWeights(**with_taps_first(parts, "conv_WX"))

    def state_shapes(self) -> tuple[Shape, ...]:
        return ((self.taps - 1, self.channels),)

    def forward(
        self, weights: Any, x_TD: torch.Tensor, kv: KVLayer, batch: AttentionBatch, context: AttentionContext
    ) -> torch.Tensor:
        mixed_TX, gate_TX = self.advance(weights, x_TD, kv, batch, context)
        return context.backend.linear((gate_TX * mixed_TX).to(x_TD.dtype), weights.out)

    def advance(
        self, weights: Any, x_TD: torch.Tensor, kv: KVLayer, batch: AttentionBatch, context: AttentionContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(kv, StateLayer)
        backend = context.backend
        before_TX, behind_TX, x_TX = backend.linear(x_TD, weights.gates).float().chunk(3, 1)
        mixed_TX = backend.short_convolution(
            before_TX * x_TX, weights.conv_WX, weights.conv_bias_X, kv.states[0], batch
        )
        return mixed_TX, behind_TX

    def stack_block(self, weights: Any) -> StackShortConv:
        return StackShortConv(channels=self.channels, **vars(weights))

    def part(self, parts: int, part: int) -> Self:
        if parts > self.channels:
            raise ValueError(f"parallel.tensor={parts} does not go with {self.channels} channels")
        return replace(self, channels=width(part_of(self.channels, parts, part)))

    def cuts(self, layout: AttentionLayout, parts: int, part: int) -> AttentionCuts:
        shares = tuple(part_of(self.channels, parts, number) for number in range(parts))
        linears, own = layout.linears, shares[part]
        gates = tuple(scaled(own, 1, number * self.channels) for number in range(3))
        outputs: dict[str, slice | tuple[slice, ...]] = {tensor.name: own for tensor in layout.tensors.values()}
        outputs |= dict.fromkeys((*linears["gates"].weights, *linears["gates"].biases), gates)
        return AttentionCuts(outputs=outputs, inputs={linears["out"].weights[0]: shares})

    def flops(self, hidden_size: int) -> int:
        return self.propagation_flops(hidden_size) + 2 * hidden_size * self.channels

    def propagation_flops(self, hidden_size: int) -> int:
        return 2 * self.channels * (3 * hidden_size + self.taps)
