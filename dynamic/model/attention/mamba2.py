"""Mamba2: a state space whose decay and input depend on the row (Dao and Gu 2024), as linear attention.

The state's input and output matrices take the places of keys and queries, the time step is what a row writes with.
Shape suffixes as in ``kernels/reference/states.py``.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch

from ....kernels.api.ranges import check_ranges
from ....kernels.api.stack import NotStacked
from ....kernels.api.stack_states import StackMamba2
from ....kernels.api.types import AttentionBatch, KVLayer, LinearWeights, StateLayer
from ...checkpoint.config_reader import ConfigReader
from ..family import Family
from ..norms import TensorLayout
from ..parts import scaled, share_heads, width
from .kind import AttentionContext, AttentionCuts, AttentionLayout, Shape, linear_layout
from .states import StateSpec, StateWeights, check_activation, with_decay_rate, with_taps_first


@dataclass(frozen=True, kw_only=True)
class SharedGroup:
    """A group of heads of which this rank has some.

    Arguments:
        number: of the group; groups: how many there are.
        channels: of all its heads.
    """

    number: int
    groups: int
    channels: int


@dataclass(frozen=True, kw_only=True)
class Mamba2Weights(StateWeights):
    """See :class:`AttentionWeights`.

    Arguments:
        into: the output's gate, what the convolution mixes, and the time steps, in one projection.
        conv_WX, conv_bias_X, decay_rate_H, step_bias_H: float32.
        skip_H: float32, what of a head's input goes past its state.
        norm_X: float32, of the output.
    """

    into: LinearWeights
    out: LinearWeights
    conv_WX: torch.Tensor
    decay_rate_H: torch.Tensor
    step_bias_H: torch.Tensor
    skip_H: torch.Tensor
    norm_X: torch.Tensor
    conv_bias_X: torch.Tensor | None = None

    @property
    def reading(self) -> tuple[LinearWeights, ...]:
        return (self.into,)


@dataclass(frozen=True, kw_only=True)
class Mamba2Spec(StateSpec):
    """See :class:`AttentionSpec`.

    Arguments:
        num_groups: of heads that share the state's input and output matrices, and a norm.
        state_size: numbers that a channel of a head remembers.
        taps: of the convolution.
        conv_bias, linear_bias: whether the convolution and the projections have biases.
        shared: where other ranks have heads of the only group that is here.

    Raises:
        ValueError: for sizes that do not go together.
    """

    kind: ClassVar[str] = "mamba2"
    num_groups: int
    num_heads: int
    head_channels: int
    state_size: int
    taps: int
    conv_bias: bool = True
    linear_bias: bool = False
    shared: SharedGroup | None = None

    def __post_init__(self) -> None:
        check_ranges(self, "num_groups", "num_heads", "head_channels", "state_size", least=1)
        check_ranges(self, "taps", least=2)
        if self.num_heads % self.num_groups:
            raise ValueError(f"{self.num_heads} heads of Mamba2 do not divide among {self.num_groups} groups")

    @classmethod
    def from_config(cls, config: ConfigReader, family: Family, layer: int) -> Self:
        # transformers holds time steps to limits in prompts only.
        limits = config.get("time_step_limit")
        if limits is not None and [float(str(limit)) for limit in _numbers(limits)] != [0.0, float("inf")]:
            raise config.error("time_step_limit", limits, "0 and infinity")
        if family.state_parts is not None:
            return cls(**family.state_parts(config))
        check_activation(config)
        heads = config.integer("mamba_n_heads", 128)
        size = config.integer("mamba_expand", 2) * config.integer("hidden_size")
        channels = config.get("mamba_d_head", "auto")
        if heads < 1 or size % heads or channels not in ("auto", size // heads):
            raise ValueError(f"mamba_n_heads={heads} heads of mamba_d_head={channels} channels do not make {size}")
        return cls(
            num_groups=config.integer("mamba_n_groups", 1),
            num_heads=heads,
            head_channels=size // heads,
            state_size=config.integer("mamba_d_state", 256),
            taps=config.integer("mamba_d_conv", 4),
            conv_bias=config.flag("mamba_conv_bias", True),
            linear_bias=config.flag("mamba_proj_bias", False),
        )

    @property
    def size(self) -> int:
        """Channels of all heads."""
        return self.num_heads * self.head_channels

    @property
    def conv_size(self) -> int:
        """Channels that go through the convolution."""
        return self.size + 2 * self.num_groups * self.state_size

    def layout(self, prefix: str, hidden_size: int, available: Container[str]) -> AttentionLayout:
        prefix += "mamba."

        def float32(name: str, *shape: int) -> TensorLayout:
            return TensorLayout(name=prefix + name, shape=shape, float32=True)

        tensors = {
            "conv_WX": float32("conv1d.weight", self.conv_size, 1, self.taps),
            "log_decay_H": float32("A_log", self.num_heads),
            "step_bias_H": float32("dt_bias", self.num_heads),
            "skip_H": float32("D", self.num_heads),
            "norm_X": float32("norm.weight", self.size),
        }
        if self.conv_bias:
            tensors["conv_bias_X"] = float32("conv1d.bias", self.conv_size)
        return AttentionLayout(
            kind=self,
            linears={
                "into": linear_layout(
                    prefix, hidden_size, {"in_proj": self.size + self.conv_size + self.num_heads}, bias=self.linear_bias
                ),
                "out": linear_layout(prefix, self.size, {"out_proj": hidden_size}, bias=self.linear_bias),
            },
            tensors=tensors,
        )

    def weights(self, parts: Mapping[str, LinearWeights | torch.Tensor]) -> Mamba2Weights:
        return Mamba2Weights(**with_taps_first(with_decay_rate(parts, "H"), "conv_WX"))

    def state_shapes(self) -> tuple[Shape, ...]:
        memory = (self.num_heads, self.state_size, self.head_channels)
        return memory, (self.taps - 1, self.conv_size)

    def forward(
        self, weights: Any, x_TD: torch.Tensor, kv: KVLayer, batch: AttentionBatch, context: AttentionContext
    ) -> torch.Tensor:
        out_THV, gate_TX = self.advance(weights, x_TD, kv, batch, context)
        gated_TX = context.backend.silu_gated(out_THV.flatten(1), gate_TX)
        normed_TX = self._normed(gated_TX, context) * weights.norm_X
        return context.backend.linear(normed_TX.to(x_TD.dtype), weights.out)

    def _normed(self, x_TX: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Each group by itself, whichever ranks have its heads."""
        if self.shared is None:
            x_GX = x_TX.view(len(x_TX) * self.num_groups, -1)
            ones_X = torch.ones(x_GX.shape[1], device=x_GX.device)
            return context.backend.rms_norm(x_GX, ones_X, context.norm_eps).view(x_TX.shape)
        squares_TG = torch.zeros(len(x_TX), self.shared.groups, device=x_TX.device)
        squares_TG[:, self.shared.number] = x_TX.square().sum(-1)
        mean_T = context.sum_over_ranks(squares_TG)[:, self.shared.number] / self.shared.channels
        return x_TX * torch.rsqrt(mean_T + context.norm_eps)[:, None]

    def advance(
        self, weights: Any, x_TD: torch.Tensor, kv: KVLayer, batch: AttentionBatch, context: AttentionContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(kv, StateLayer)
        backend, (memory_NHCV, tails_NWX) = context.backend, kv.states
        sizes = (self.size, self.conv_size, self.num_heads)
        gate_TX, mixed_TX, step_TH = backend.linear(x_TD, weights.into).float().split(sizes, 1)
        mixed_TX = backend.short_convolution(mixed_TX, weights.conv_WX, weights.conv_bias_X, tails_NWX, batch, "silu")
        matrices = self.num_groups * self.state_size
        v_TX, k_TX, q_TX = mixed_TX.split((self.size, matrices, matrices), 1)
        q_TGC, k_TGC = (part.unflatten(1, (self.num_groups, -1)) for part in (q_TX, k_TX))
        v_THV = v_TX.unflatten(1, (self.num_heads, -1))
        step_TH, decay_TH = backend.time_steps(step_TH, weights.step_bias_H, weights.decay_rate_H)
        out_THV = backend.recurrence(q_TGC, k_TGC, v_THV, decay_TH, step_TH, memory_NHCV, batch, delta_rule=False)
        return out_THV + v_THV * weights.skip_H[:, None], gate_TX

    def stack_block(self, weights: Any) -> StackMamba2:
        if self.shared is not None:
            raise NotStacked("a norm over heads that several processes share")
        sizes = {name: getattr(self, name) for name in ("num_groups", "num_heads", "head_channels", "state_size")}
        return StackMamba2(**sizes, **vars(weights))

    def part(self, parts: int, part: int) -> Self:
        heads, groups = share_heads(self.num_heads, self.num_groups, parts, part)
        shared = SharedGroup(number=groups.start, groups=self.num_groups, channels=self.size // self.num_groups)
        return replace(
            self,
            num_groups=width(groups),
            num_heads=width(heads),
            shared=shared if parts > self.num_groups else None,
        )

    def cuts(self, layout: AttentionLayout, parts: int, part: int) -> AttentionCuts:
        shares = [share_heads(self.num_heads, self.num_groups, parts, number) for number in range(parts)]
        heads, groups = shares[part]
        channels, matrices = scaled(heads, self.head_channels), self.num_groups * self.state_size

        def mixed(first: int) -> tuple[slice, ...]:
            """What goes through the convolution, behind ``first`` other rows."""
            own = scaled(heads, self.head_channels, first)
            firsts = first + self.size, first + self.size + matrices
            return own, *(scaled(groups, self.state_size, before) for before in firsts)

        linears, tensors = layout.linears, layout.tensors
        into = (channels, *mixed(self.size), scaled(heads, 1, self.size + self.conv_size))
        rows = {"conv_WX": mixed(0), "conv_bias_X": mixed(0), "norm_X": channels}
        outputs = {tensor.name: rows.get(name, heads) for name, tensor in tensors.items()}
        outputs |= dict.fromkeys((*linears["into"].weights, *linears["into"].biases), into)
        inputs = tuple(scaled(heads, self.head_channels) for heads, _ in shares)
        return AttentionCuts(outputs=outputs, inputs={linears["out"].weights[0]: inputs})

    def flops(self, hidden_size: int) -> int:
        return self.propagation_flops(hidden_size) + 2 * hidden_size * self.size

    def propagation_flops(self, hidden_size: int) -> int:
        projections = 2 * hidden_size * (self.size + self.conv_size + self.num_heads)
        return projections + 2 * self.taps * self.conv_size + 5 * self.size * self.state_size


def _numbers(limits: Any) -> list[Any]:
    """The two limits, the upper of which JSON has no number for."""
    values = limits if isinstance(limits, list | tuple) else []
    return [value.get("__float__", "") if isinstance(value, dict) else value for value in values]
