"""Mamba: a state space whose decay differs from channel to channel (Gu and Dao 2023), as Jamba has it, with norms.

Every channel is a head of its own whose values have one channel; all share the state's input and output matrices.
Shape suffixes as in ``kernels/reference/states.py``; X the heads.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch

from ....kernels.api.ranges import check_ranges
from ....kernels.api.types import AttentionBatch, KVLayer, LinearWeights, StateLayer
from ....kernels.api.uncommon import CHANNEL_DECAYS
from ....kernels.reference.elementwise import silu, softplus
from ...checkpoint.config_reader import ConfigReader
from ..family import Family
from ..norms import TensorLayout
from ..parts import scaled, share_heads, width
from .kind import AttentionContext, AttentionCuts, AttentionLayout, Cut, Shape, linear_layout
from .states import StateSpec, StateWeights, check_activation, with_decay_rate, with_taps_first

_NORMS = {"step_norm": "dt_layernorm", "in_norm": "b_layernorm", "out_norm": "c_layernorm"}


@dataclass(frozen=True, kw_only=True)
class Mamba1Weights(StateWeights):
    """See :class:`AttentionWeights`.

    Arguments:
        into: what the convolution mixes, and the output's gate, in one projection.
        select: what becomes the time steps, and the state's input and output matrices, made of the mixed channels.
        step: of the few channels of the time steps to one for each head.
        step_norm, in_norm, out_norm: of these three.
        conv_WX, conv_bias_X, decay_rate_CX, step_bias_X: float32.
        skip_X: float32, what of a head's input goes past its state.
    """

    into: LinearWeights
    select: LinearWeights
    step: LinearWeights
    out: LinearWeights
    step_norm: torch.Tensor
    in_norm: torch.Tensor
    out_norm: torch.Tensor
    conv_WX: torch.Tensor
    decay_rate_CX: torch.Tensor
    step_bias_X: torch.Tensor
    skip_X: torch.Tensor
    conv_bias_X: torch.Tensor | None = None

    @property
    def reading(self) -> tuple[LinearWeights, ...]:
        return (self.into,)


@dataclass(frozen=True, kw_only=True)
class Mamba1Spec(StateSpec):
    """See :class:`AttentionSpec`.

    Arguments:
        num_heads: channels of the state space.
        state_size: numbers that each remembers.
        rank: channels that the time steps are made of.
        taps: of the convolution.
        conv_bias, linear_bias: whether the convolution, and the projections from and to the hidden state, have biases.
    """

    kind: ClassVar[str] = "mamba1"
    num_heads: int
    state_size: int
    rank: int
    taps: int
    conv_bias: bool = True
    linear_bias: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, "num_heads", "state_size", "rank", least=1)
        check_ranges(self, "taps", least=2)

    @property
    def uncommon(self) -> set[str]:
        return super().uncommon | {CHANNEL_DECAYS}

    @classmethod
    def from_config(cls, config: ConfigReader, family: Family, layer: int) -> Self:
        check_activation(config)
        hidden = config.integer("hidden_size")
        rank = -(-hidden // 16) if config.get("mamba_dt_rank", "auto") == "auto" else config.integer("mamba_dt_rank")
        return cls(
            num_heads=config.integer("mamba_expand", 2) * hidden,
            state_size=config.integer("mamba_d_state", 16),
            rank=rank,
            taps=config.integer("mamba_d_conv", 4),
            conv_bias=config.flag("mamba_conv_bias", True),
            linear_bias=config.flag("mamba_proj_bias", False),
        )

    def layout(self, prefix: str, hidden_size: int, available: Container[str]) -> AttentionLayout:
        prefix += "mamba."
        heads, size, bias = self.num_heads, self.state_size, self.linear_bias

        def tensor(name: str, *shape: int, float32: bool = True) -> TensorLayout:
            return TensorLayout(name=prefix + name, shape=shape, float32=float32)

        tensors = {
            "conv_WX": tensor("conv1d.weight", heads, 1, self.taps),
            "log_decay_XC": tensor("A_log", heads, size),
            "step_bias_X": tensor("dt_proj.bias", heads),
            "skip_X": tensor("D", heads),
            **{
                field: tensor(f"{name}.weight", width, float32=False)
                for (field, name), width in zip(_NORMS.items(), (self.rank, size, size), strict=True)
            },
        }
        if self.conv_bias:
            tensors["conv_bias_X"] = tensor("conv1d.bias", heads)
        return AttentionLayout(
            kind=self,
            linears={
                "into": linear_layout(prefix, hidden_size, {"in_proj": 2 * heads}, bias=bias),
                "select": linear_layout(prefix, heads, {"x_proj": self.rank + 2 * size}),
                "step": linear_layout(prefix, self.rank, {"dt_proj": heads}),
                "out": linear_layout(prefix, heads, {"out_proj": hidden_size}, bias=bias),
            },
            tensors=tensors,
        )

    def weights(self, parts: Mapping[str, LinearWeights | torch.Tensor]) -> Mamba1Weights:
        fields = with_taps_first(with_decay_rate(parts, "XC"), "conv_WX")
        rate_XC = fields.pop("decay_rate_XC")
        return Mamba1Weights(**fields, decay_rate_CX=rate_XC.T.contiguous())

    def state_shapes(self) -> tuple[Shape, ...]:
        return (self.state_size, self.num_heads), (self.taps - 1, self.num_heads)

    def forward(
        self, weights: Any, x_TD: torch.Tensor, kv: KVLayer, batch: AttentionBatch, context: AttentionContext
    ) -> torch.Tensor:
        out_TX, gate_TX = self.advance(weights, x_TD, kv, batch, context)
        return context.backend.linear((out_TX * silu(gate_TX)).to(x_TD.dtype), weights.out)

    def advance(
        self, weights: Any, x_TD: torch.Tensor, kv: KVLayer, batch: AttentionBatch, context: AttentionContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(kv, StateLayer)
        backend, (memory_NCX, tails_NWX) = context.backend, kv.states
        mixed_TX, gate_TX = backend.linear(x_TD, weights.into).float().chunk(2, 1)
        mixed_TX = backend.short_convolution(
            mixed_TX.contiguous(), weights.conv_WX, weights.conv_bias_X, tails_NWX, batch, "silu"
        )
        # Every rank chooses by its own channels.
        chosen_TY = context.sum_over_ranks(backend.linear(mixed_TX.to(x_TD.dtype), weights.select))
        step_TR, k_TC, q_TC = (
            context.norm(part, norm)
            for part, norm in zip(
                chosen_TY.split((self.rank, self.state_size, self.state_size), 1),
                (weights.step_norm, weights.in_norm, weights.out_norm),
                strict=True,
            )
        )
        step_TX = softplus(backend.linear(step_TR, weights.step).float() + weights.step_bias_X)
        read = q_TC.float(), k_TC.float(), mixed_TX, step_TX
        out_TX = backend.selective_scan(*read, weights.decay_rate_CX, memory_NCX, batch)
        return out_TX + mixed_TX * weights.skip_X, gate_TX

    def part(self, parts: int, part: int) -> Self:
        return replace(self, num_heads=width(self._heads(parts, part)))

    def _heads(self, parts: int, part: int) -> slice:
        return share_heads(self.num_heads, self.num_heads, parts, part)[0]

    def cuts(self, layout: AttentionLayout, parts: int, part: int) -> AttentionCuts:
        linears, tensors, heads = layout.linears, layout.tensors, self._heads(parts, part)
        names = linears["step"].weights[0], *(tensor.name for field, tensor in tensors.items() if field not in _NORMS)
        outputs: dict[str, Cut] = dict.fromkeys(names, heads)
        into = heads, scaled(heads, 1, self.num_heads)
        outputs |= dict.fromkeys((*linears["into"].weights, *linears["into"].biases), into)
        inputs = tuple(self._heads(parts, number) for number in range(parts))
        return AttentionCuts(outputs=outputs, inputs={linears[name].weights[0]: inputs for name in ("select", "out")})

    def flops(self, hidden_size: int) -> int:
        return self.propagation_flops(hidden_size) + 2 * hidden_size * self.num_heads

    def propagation_flops(self, hidden_size: int) -> int:
        few = self.rank + 2 * self.state_size
        projections = self.num_heads * (2 * hidden_size + few + self.rank)
        return 2 * (projections + self.taps * self.num_heads) + 5 * self.num_heads * self.state_size
