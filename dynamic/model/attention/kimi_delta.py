"""Kimi Delta Attention: a gated delta rule whose memory forgets each channel of its keys by a gate of its own.

Kimi Team 2025 (Kimi Linear). As in :mod:`.gated_delta`, but that every head has queries and keys of its own, and that
the gates of the memory and of the output are made through few channels.

Shape suffixes as in ``kernels/reference/states.py``.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch

from ....kernels.api.ranges import check_ranges
from ....kernels.api.types import AttentionBatch, KVLayer, LinearWeights, StateLayer
from ....kernels.api.uncommon import CHANNEL_DECAYS
from ....kernels.reference.elementwise import sigmoid, softplus
from ...checkpoint.config_reader import ConfigReader
from ..family import Family
from ..norms import TensorLayout
from ..parts import scaled, share_heads, width
from .kind import AttentionContext, AttentionCuts, AttentionLayout, Cut, Shape, linear_layout
from .states import StateSpec, StateWeights, check_activation, with_decay_rate

_CONVOLUTIONS = ("q_conv1d", "k_conv1d", "v_conv1d")


@dataclass(frozen=True, kw_only=True)
class KimiDeltaWeights(StateWeights):
    """See :class:`AttentionWeights`.

    Arguments:
        qkv: queries, keys and values in one projection.
        few: the few channels of both gates, and what becomes the step of each head.
        decay, gate: what becomes the decay of each channel of the keys, and the output's gate, made of the few.
        conv_WX: taps of the channels of queries, keys and values.
        decay_rate_H, decay_bias_X: float32.
        norm_V: float32, of a head's output.
    """

    qkv: LinearWeights
    few: LinearWeights
    decay: LinearWeights
    gate: LinearWeights
    out: LinearWeights
    conv_WX: torch.Tensor
    decay_rate_H: torch.Tensor
    decay_bias_X: torch.Tensor
    norm_V: torch.Tensor

    @property
    def reading(self) -> tuple[LinearWeights, ...]:
        return self.qkv, self.few


@dataclass(frozen=True, kw_only=True)
class KimiDeltaSpec(StateSpec):
    """See :class:`AttentionSpec`.

    Arguments:
        channels: of a head's queries, keys and values each, and of the few that the gates are made of.
        taps: of the convolution.
    """

    kind: ClassVar[str] = "kimi_delta"
    num_heads: int
    channels: int
    taps: int

    def __post_init__(self) -> None:
        check_ranges(self, "num_heads", "channels", least=1)
        check_ranges(self, "taps", least=2)

    @classmethod
    def from_config(cls, config: ConfigReader, family: Family, layer: int) -> Self:
        check_activation(config)
        return cls(
            num_heads=config.integer("linear_num_heads", 32),
            channels=config.integer("linear_head_dim", 128),
            taps=config.integer("linear_conv_kernel_dim", 4),
        )

    @property
    def uncommon(self) -> set[str]:
        return super().uncommon | {CHANNEL_DECAYS}

    @property
    def size(self) -> int:
        """Channels of all heads' queries, keys or values."""
        return self.num_heads * self.channels

    def layout(self, prefix: str, hidden_size: int, available: Container[str]) -> AttentionLayout:
        prefix += "self_attn."
        size, few = self.size, self.channels

        def float32(name: str, *shape: int) -> TensorLayout:
            return TensorLayout(name=prefix + name, shape=shape, float32=True)

        return AttentionLayout(
            kind=self,
            linears={
                "qkv": linear_layout(prefix, hidden_size, dict.fromkeys(("q_proj", "k_proj", "v_proj"), size)),
                "few": linear_layout(prefix, hidden_size, {"f_a_proj": few, "g_a_proj": few, "b_proj": self.num_heads}),
                "decay": linear_layout(prefix, few, {"f_b_proj": size}),
                "gate": linear_layout(prefix, few, {"g_b_proj": size}),
                "out": linear_layout(prefix, size, {"o_proj": hidden_size}),
            },
            tensors={
                **{name: float32(f"{name}.weight", size, 1, self.taps) for name in _CONVOLUTIONS},
                "log_decay_H": float32("A_log", 1, 1, self.num_heads, 1),
                "decay_bias_X": float32("dt_bias", size),
                "norm_V": float32("o_norm.weight", self.channels),
            },
        )

    def weights(self, parts: Mapping[str, LinearWeights | torch.Tensor]) -> KimiDeltaWeights:
        fields = with_decay_rate(parts, "H")
        conv_X1W = torch.cat([fields.pop(name) for name in _CONVOLUTIONS])
        fields["decay_rate_H"] = fields["decay_rate_H"].flatten()
        return KimiDeltaWeights(**fields, conv_WX=conv_X1W[:, 0].T.contiguous())

    def state_shapes(self) -> tuple[Shape, ...]:
        return (self.num_heads, self.channels, self.channels), (self.taps - 1, 3 * self.size)

    def forward(
        self, weights: Any, x_TD: torch.Tensor, kv: KVLayer, batch: AttentionBatch, context: AttentionContext
    ) -> torch.Tensor:
        out_THV, gate_TX = self.advance(weights, x_TD, kv, batch, context)
        normed_XV = context.backend.rms_norm(out_THV.flatten(0, 1), weights.norm_V, context.norm_eps)
        gated_TX = normed_XV.view(gate_TX.shape) * sigmoid(gate_TX)
        return context.backend.linear(gated_TX.to(x_TD.dtype), weights.out)

    def advance(
        self, weights: Any, x_TD: torch.Tensor, kv: KVLayer, batch: AttentionBatch, context: AttentionContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(kv, StateLayer)
        backend, (memory_NHCV, tails_NWX) = context.backend, kv.states
        mixed_TX = backend.linear(x_TD, weights.qkv).float()
        mixed_TX = backend.short_convolution(mixed_TX, weights.conv_WX, None, tails_NWX, batch, "silu")
        q_THC, k_THC, v_THV = (part.unflatten(1, (self.num_heads, -1)) for part in mixed_TX.chunk(3, 1))
        sizes = self.channels, self.channels, self.num_heads
        decay_TC, gate_TC, step_TH = backend.linear(x_TD, weights.few).split(sizes, 1)
        rate_TX = softplus(backend.linear(decay_TC.contiguous(), weights.decay).float() + weights.decay_bias_X)
        rate_THC = rate_TX.unflatten(1, (self.num_heads, -1))
        decay_THC = torch.exp(weights.decay_rate_H[:, None] * rate_THC)
        step_TH = sigmoid(step_TH.float())
        out_THV = backend.recurrence(q_THC, k_THC, v_THV, decay_THC, step_TH, memory_NHCV, batch, delta_rule=True)
        return out_THV, backend.linear(gate_TC.contiguous(), weights.gate).float()

    def part(self, parts: int, part: int) -> Self:
        return replace(self, num_heads=width(self._heads(parts, part)))

    def _heads(self, parts: int, part: int) -> slice:
        return share_heads(self.num_heads, self.num_heads, parts, part)[0]

    def cuts(self, layout: AttentionLayout, parts: int, part: int) -> AttentionCuts:
        linears, tensors, heads = layout.linears, layout.tensors, self._heads(parts, part)
        channels = scaled(heads, self.channels)
        by_channel = *linears["qkv"].weights, *linears["decay"].weights, *linears["gate"].weights
        names = *_CONVOLUTIONS, "decay_bias_X"
        outputs: dict[str, Cut] = dict.fromkeys((*by_channel, *(tensors[name].name for name in names)), channels)
        outputs[linears["few"].weights[2]] = heads
        outputs[tensors["log_decay_H"].name] = lambda log_decay_11H1: log_decay_11H1[:, :, heads]
        inputs = tuple(scaled(self._heads(parts, number), self.channels) for number in range(parts))
        return AttentionCuts(outputs=outputs, inputs={linears["out"].weights[0]: inputs})

    def flops(self, hidden_size: int) -> int:
        return self.propagation_flops(hidden_size) + 2 * hidden_size * self.size

    def propagation_flops(self, hidden_size: int) -> int:
        projections = hidden_size * (3 * self.size + 2 * self.channels + self.num_heads)
        gates = 2 * self.channels * self.size
        return 2 * (projections + gates + self.taps * 3 * self.size) + 7 * self.size * self.channels
