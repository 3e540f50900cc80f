"""Gated DeltaNet: linear attention whose memory forgets by a learned gate and is corrected by the delta rule.

Yang et al. 2024. Queries, keys and values go through a short convolution; the output is normed and gated.

Shape suffixes as in ``kernels/reference/states.py``.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch

from ....kernels.api.ranges import check_ranges
from ....kernels.api.stack_states import StackGatedDelta
from ....kernels.api.types import AttentionBatch, KVLayer, LinearWeights, StateLayer
from ....kernels.reference.elementwise import sigmoid
from ....kernels.reference.states import L2_EPS
from ...checkpoint.config_reader import ConfigReader
from ..family import Family
from ..norms import TensorLayout
from ..parts import scaled, share_heads, width
from .kind import AttentionContext, AttentionCuts, AttentionLayout, Shape, linear_layout
from .states import StateSpec, StateWeights, check_activation, with_decay_rate, with_taps_first


@dataclass(frozen=True, kw_only=True)
class GatedDeltaWeights(StateWeights):
    """See :class:`AttentionWeights`.

    Arguments:
        qkvz: queries, keys, values and the output's gate in one projection, of each group or one behind the other.
        ba: what becomes the step and the decay of each head.
        conv_WX: taps of the channels of queries, keys and values.
        decay_rate_H, decay_bias_H: float32.
        norm_V: of a head's output.
    """

    qkvz: LinearWeights
    ba: LinearWeights
    out: LinearWeights
    conv_WX: torch.Tensor
    decay_rate_H: torch.Tensor
    decay_bias_H: torch.Tensor
    norm_V: torch.Tensor

    @property
    def reading(self) -> tuple[LinearWeights, ...]:
        return self.qkvz, self.ba


@dataclass(frozen=True, kw_only=True)
class GatedDeltaSpec(StateSpec):
    """See :class:`AttentionSpec`.

    Arguments:
        num_groups: of heads that share queries and keys.
        key_channels, value_channels: of one head.
        taps: of the convolution.
        by_group: whether the projections' outputs are ordered by groups, as in Qwen3-Next; else by parts.

    Raises:
        ValueError: for sizes that do not go together.
    """

    kind: ClassVar[str] = "gated_delta"
    num_groups: int
    num_heads: int
    key_channels: int
    value_channels: int
    taps: int
    by_group: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, "num_groups", "num_heads", "key_channels", "value_channels", least=1)
        check_ranges(self, "taps", least=2)
        if self.num_heads % self.num_groups:
            raise ValueError(
                f"linear_num_value_heads={self.num_heads} is no multiple of linear_num_key_heads={self.num_groups}"
            )

    @classmethod
    def from_config(cls, config: ConfigReader, family: Family, layer: int) -> Self:
        check_activation(config)
        return cls(
            num_groups=config.integer("linear_num_key_heads", 16),
            num_heads=config.integer("linear_num_value_heads", 32),
            key_channels=config.integer("linear_key_head_dim", 128),
            value_channels=config.integer("linear_value_head_dim", 128),
            taps=config.integer("linear_conv_kernel_dim", 4),
            by_group=config.get("model_type") == "qwen3_next",
        )

    @property
    def key_size(self) -> int:
        """Channels of all keys."""
        return self.num_groups * self.key_channels

    @property
    def value_size(self) -> int:
        """Channels of all values."""
        return self.num_heads * self.value_channels

    @property
    def conv_size(self) -> int:
        """Channels that go through the convolution."""
        return 2 * self.key_size + self.value_size

    def layout(self, prefix: str, hidden_size: int, available: Container[str]) -> AttentionLayout:
        prefix += "linear_attn."

        def float32(name: str, *shape: int) -> TensorLayout:
            return TensorLayout(name=prefix + name, shape=shape, float32=True)

        size, heads = self.value_size, self.num_heads
        if self.by_group:
            qkvz, ba = {"in_proj_qkvz": self.conv_size + size}, {"in_proj_ba": 2 * heads}
        else:
            qkvz, ba = {"in_proj_qkv": self.conv_size, "in_proj_z": size}, {"in_proj_b": heads, "in_proj_a": heads}
        return AttentionLayout(
            kind=self,
            linears={
                "qkvz": linear_layout(prefix, hidden_size, qkvz),
                "ba": linear_layout(prefix, hidden_size, ba),
                "out": linear_layout(prefix, size, {"out_proj": hidden_size}),
            },
            tensors={
                "conv_WX": float32("conv1d.weight", self.conv_size, 1, self.taps),
                "log_decay_H": float32("A_log", self.num_heads),
                "decay_bias_H": float32("dt_bias", self.num_heads),
                "norm_V": TensorLayout(name=f"{prefix}norm.weight", shape=(self.value_channels,)),
            },
        )

    def weights(self, parts: Mapping[str, LinearWeights | torch.Tensor]) -> GatedDeltaWeights:
        return GatedDeltaWeights(**with_taps_first(with_decay_rate(parts, "H"), "conv_WX"))

    def state_shapes(self) -> tuple[Shape, ...]:
        memory = (self.num_heads, self.key_channels, self.value_channels)
        return memory, (self.taps - 1, self.conv_size)

    def forward(
        self, weights: Any, x_TD: torch.Tensor, kv: KVLayer, batch: AttentionBatch, context: AttentionContext
    ) -> torch.Tensor:
        out_THV, z_THV = self.advance(weights, x_TD, kv, batch, context)
        normed_THV = context.norm(out_THV, weights.norm_V)
        gated_TX = context.backend.silu_gated(normed_THV.flatten(1), z_THV.flatten(1))
        return context.backend.linear(gated_TX.to(x_TD.dtype), weights.out)

    def advance(
        self, weights: Any, x_TD: torch.Tensor, kv: KVLayer, batch: AttentionBatch, context: AttentionContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(kv, StateLayer)
        backend, (memory_NHCV, tails_NWX) = context.backend, kv.states
        mixed_TX, z_THV = self._ordered(backend.linear(x_TD, weights.qkvz).float())
        ba_TGX = backend.linear(x_TD, weights.ba).float().unflatten(1, (self.num_groups if self.by_group else 1, -1))
        b_TH, a_TH = (part.flatten(1) for part in ba_TGX.chunk(2, 2))
        mixed_TX = backend.short_convolution(mixed_TX, weights.conv_WX, None, tails_NWX, batch, "silu")
        q_TX, k_TX, v_TX = mixed_TX.split((self.key_size, self.key_size, self.value_size), 1)
        q_TGC, k_TGC = (part.unflatten(1, (self.num_groups, -1)) for part in (q_TX, k_TX))
        v_THV, step_TH = v_TX.unflatten(1, (self.num_heads, -1)), sigmoid(b_TH)
        _, decay_TH = backend.time_steps(a_TH, weights.decay_bias_H, weights.decay_rate_H)
        out_THV = backend.recurrence(q_TGC, k_TGC, v_THV, decay_TH, step_TH, memory_NHCV, batch, delta_rule=True)
        return out_THV, z_THV

    def _ordered(self, x_TX: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries, keys and values one behind the other; the gate of each head."""
        if not self.by_group:
            mixed_TX, z_TX = x_TX.split((self.conv_size, self.value_size), 1)
            return mixed_TX, z_TX.unflatten(1, (self.num_heads, -1))
        values = self.value_size // self.num_groups
        x_TGX = x_TX.unflatten(1, (self.num_groups, -1))
        *mixed, z_TGX = x_TGX.split((self.key_channels, self.key_channels, values, values), 2)
        return torch.cat([part.flatten(1) for part in mixed], 1), z_TGX.reshape(len(x_TX), self.num_heads, -1)

    def stack_block(self, weights: Any) -> StackGatedDelta:
        sizes = {name: getattr(self, name) for name in ("num_groups", "num_heads", "key_channels", "value_channels")}
        return StackGatedDelta(**sizes, by_group=self.by_group, length_eps=L2_EPS, **vars(weights))

    def part(self, parts: int, part: int) -> Self:
        heads, groups = share_heads(self.num_heads, self.num_groups, parts, part)
        return replace(self, num_groups=width(groups), num_heads=width(heads))

    def cuts(self, layout: AttentionLayout, parts: int, part: int) -> AttentionCuts:
        shares = [share_heads(self.num_heads, self.num_groups, parts, number) for number in range(parts)]
        heads, groups = shares[part]
        linears, values = layout.linears, self.value_channels
        keys = [scaled(groups, self.key_channels, first) for first in (0, self.key_size)]
        mixed = (*keys, scaled(heads, values, 2 * self.key_size))
        if self.by_group:
            rows = self._in_groups(heads, groups, 2 * self.key_channels, values), self._in_groups(heads, groups, 0, 1)
        else:
            rows = mixed, scaled(heads, values), heads, heads
        outputs = dict(zip((*linears["qkvz"].weights, *linears["ba"].weights), rows, strict=True))
        outputs |= {layout.tensors[name].name: heads for name in ("log_decay_H", "decay_bias_H")}
        inputs = tuple(scaled(heads, values) for heads, _ in shares)
        return AttentionCuts(
            outputs={**outputs, layout.tensors["conv_WX"].name: mixed}, inputs={linears["out"].weights[0]: inputs}
        )

    def _in_groups(self, heads: slice, groups: slice, shared: int, own: int) -> tuple[slice, ...]:
        """Rows of some heads in a tensor that has, for each group, ``shared`` rows and twice ``own`` of every head."""
        per_group = self.num_heads // self.num_groups
        size = shared + 2 * own * per_group
        if width(heads) == per_group * width(groups):
            return (scaled(groups, size),)
        first = groups.start * size
        inner = slice(heads.start - groups.start * per_group, heads.stop - groups.start * per_group)
        parts = [scaled(inner, own, first + shared + own * before) for before in (0, per_group)]
        return (slice(first, first + shared), *parts) if shared else tuple(parts)

    def flops(self, hidden_size: int) -> int:
        return self.propagation_flops(hidden_size) + 2 * hidden_size * self.value_size

    def propagation_flops(self, hidden_size: int) -> int:
        projections = 2 * hidden_size * (self.conv_size + self.value_size + 2 * self.num_heads)
        return projections + 2 * self.taps * self.conv_size + 7 * self.value_size * self.key_channels
