"""The decoder that is trained: RoPE, grouped-query attention with normed queries and keys, top-k experts, exits.

It computes what a Qwen3-MoE checkpoint computes, so that its export runs in the framework's own loader and elsewhere.

Shape suffixes: N sequences, L positions, T = N*L tokens, D hidden size, H query heads, G key/value heads, C channels of
one head, E experts, K experts per token, F width of one expert, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ...exits.exit_head import ExitHeadAdapter
from ...kernels.api.ranges import check_ranges
from ...moe.trainable_experts import load_balancing_loss, mixture
from .attention import causal_attention, norm_and_rotate, rope_table
from .expert_groups import spread_mixture
from .functions import fork_normed, rms_norm


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a trainable decoder.

    Arguments:
        vocab_size: tokens of the vocabulary.
        hidden_size, num_layers: width and depth.
        num_heads, num_kv_heads, head_dim: query heads, key/value heads, channels of each.
        num_experts, experts_per_token, expert_size: experts of a layer, how many a token uses, their width.
        rope_theta: base of the rotary embedding.
        norm_eps: epsilon of the norms.
        max_position: longest sequence.
        exit_layers: an exit after this many layers each; increasing, below ``num_layers``.
        adapter_rank: rank of the exit-head adapter of every exit.

    Raises:
        ValueError: for shapes that do not fit together.
    """

    vocab_size: int = 2048
    hidden_size: int = 192
    num_layers: int = 16
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    num_experts: int = 8
    experts_per_token: int = 2
    expert_size: int = 96
    exit_layers: tuple[int, ...] = (4, 8, 12)
    adapter_rank: int = 16
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    max_position: int = 1024

    def __post_init__(self) -> None:
        object.__setattr__(self, "exit_layers", tuple(self.exit_layers))
        shape = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "num_experts")
        check_ranges(self, *shape, "experts_per_token", "expert_size", "adapter_rank", "max_position", least=1)
        check_ranges(self, "rope_theta", "norm_eps", above=0)
        inside = all(0 < e < self.num_layers for e in self.exit_layers)
        if not inside or list(self.exit_layers) != sorted(set(self.exit_layers)):
            raise ValueError(f"exit_layers must rise within 1…{self.num_layers - 1}, not {self.exit_layers}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")

    @property
    def layer_flops(self) -> int:
        """Floating-point operations of one layer for one token, without the part that grows with the context."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        experts = self.experts_per_token * 3 * self.hidden_size * self.expert_size
        return 2 * (attention + experts + self.hidden_size * self.num_experts)

    @property
    def layers_share(self) -> float:
        """The share of a decoded token's floating-point operations that the layers do."""
        layers = self.num_layers * self.layer_flops
        return layers / (layers + 2 * self.hidden_size * self.vocab_size)  # the LM head


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, reduced in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """A linear layer without bias whose float32 weight is used in the activations' dtype."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: torch.Tensor, gain_D: torch.Tensor | None = None) -> torch.Tensor:
        """Arguments:
        gain_D: weight of the norm in front, which is cheaper to apply to the matrix than to the activations.
        """
        weight = self.weight if gain_D is None else self.weight * gain_D
        return F.linear(input, weight.to(input.dtype))


class Attention(nn.Module):
    """Causal grouped-query attention; queries and keys are normed per head before they are rotated (Qwen3)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv_proj = Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps)

    def forward(
        self, x_NLD: torch.Tensor, gain_D: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Arguments:
        x_NLD: normed input, without the norm's weight ``gain_D``.
        table: of the rotary embedding.
        """
        qkv_NLSC = self.qkv_proj(x_NLD, gain_D).unflatten(-1, (-1, self.head_dim))
        norms = self.q_norm.weight, self.k_norm.weight
        q, k, v = norm_and_rotate(qkv_NLSC, *norms, table, self.kv_heads, self.q_norm.eps)
        return self.o_proj(causal_attention(q, k, v))


class RouterRecord(NamedTuple):
    """Auxiliary losses of one layer's router, and its probabilities without gradient."""

    balance_loss: torch.Tensor
    z_loss: torch.Tensor
    probs_TE: torch.Tensor


class SparseMLP(nn.Module):
    """Router and experts. Returns the mixture and the router's record.

    Attributes:
        group: process group whose ranks share the experts (:func:`.expert_groups.spread_experts`); None: all are here.
    """

    EXPERTS: ClassVar[tuple[str, ...]] = ("gate_up_EGFD", "down_EDF")

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.top_k = config.experts_per_token
        self.group: Any = None
        self.router = Linear(config.hidden_size, config.num_experts)
        self.gate_up_EGFD = nn.Parameter(torch.empty(config.num_experts, 2, config.expert_size, config.hidden_size))
        self.down_EDF = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.expert_size))

    def forward(self, x_TD: torch.Tensor, gain_D: torch.Tensor) -> tuple[torch.Tensor, RouterRecord]:
        """Arguments:
        x_TD: normed input, without the norm's weight ``gain_D``.
        """
        logits_TE = self.router(x_TD, gain_D).float()
        # The z-loss needs the log-sum-exp anyway, and torch's softmax is slow over so few experts.
        lse_T1 = logits_TE.logsumexp(-1, keepdim=True)
        probs_TE = (logits_TE - lse_T1).exp()
        weights_TK, ids_TK = probs_TE.topk(self.top_k)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        gate_up = (self.gate_up_EGFD.flatten(1, 2) * gain_D).to(x_TD.dtype)
        down = self.down_EDF.to(x_TD.dtype)
        if self.group is None:
            out_TD = mixture(x_TD, gate_up, down, ids_TK, weights_TK)
        else:
            out_TD = spread_mixture(x_TD, gate_up, down, ids_TK, weights_TK, self.group)
        record = RouterRecord(load_balancing_loss(probs_TE, ids_TK), lse_T1.square().mean(), probs_TE.detach())
        return out_TD, record


class Layer(nn.Module):
    """Attention and experts, each behind a norm and added to the residual."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.post_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SparseMLP(config)

    def forward(
        self, x_NLD: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, RouterRecord]:
        x_NLD, normed_NLD = fork_normed(x_NLD, self.input_norm.eps)
        x_NLD = x_NLD + self.attention(normed_NLD, self.input_norm.weight, table)
        x_NLD, normed_NLD = fork_normed(x_NLD, self.post_norm.eps)
        out_TD, record = self.mlp(normed_NLD.flatten(0, 1), self.post_norm.weight)
        return x_NLD + out_TD.view_as(x_NLD), record


@dataclass(frozen=True, kw_only=True)
class DecoderOutput:
    """Hidden states after every exit's layers (unnormed) and after the last layer; mean auxiliary losses.

    ``exits[0]`` is the embedding. ``entropy_T`` of an exit is the routers' mean entropy since the exit before it, in
    nats; it is there if asked for and no layer was dropped.
    """

    exits: dict[int, torch.Tensor]
    entropy_T: dict[int, torch.Tensor]
    final_NLD: torch.Tensor
    balance_loss: torch.Tensor
    z_loss: torch.Tensor


class TrainableDecoder(nn.Module):
    """A mixture-of-experts decoder with exits. Weights are float32; ``dtype`` is what activations are computed in.

    Arguments:
        seed: of the initial weights, which do not depend on torch's global generator.
    """

    def __init__(self, config: DecoderConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        adapters = {str(e): ExitHeadAdapter(config.hidden_size, config.adapter_rank) for e in config.exit_layers}
        self.adapters = nn.ModuleDict(adapters)
        self._initialise(torch.Generator().manual_seed(seed))

    def _initialise(self, generator: torch.Generator) -> None:
        depth_scale = (2 * self.config.num_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                continue
            std = parameter.shape[-1] ** -0.5
            if name == "embedding":
                std = 0.02
            elif name.endswith(("o_proj.weight", "down_EDF")):
                std *= depth_scale  # keeps the residual's variance independent of the depth
            nn.init.normal_(parameter, 0, std, generator=generator)
        for adapter in self.adapters.values():
            adapter.reset(generator)  # type: ignore[operator]

    @torch.no_grad()
    def zero_outputs(self, first: int) -> None:
        """Zero the output weights of layers from ``first`` on, which then add nothing to the residual stream."""
        for layer in self.layers[first:]:
            for name, parameter in layer.named_parameters():
                if name.endswith(("o_proj.weight", "down_EDF")):
                    parameter.zero_()

    def forward(
        self,
        tokens_NL: torch.Tensor,
        kept: Sequence[torch.Tensor | None] | None = None,
        *,
        entropy: bool = False,
    ) -> DecoderOutput:
        """Run all layers.

        Arguments:
            tokens_NL: int64.
            kept: per layer the sequences (int64 indices) that run it, None for all; the others skip the layer (layer
                dropout). None runs everything.
            entropy: fill ``entropy_T``.
        """
        config = self.config
        table = rope_table(tokens_NL.shape[1], config.head_dim, config.rope_theta, tokens_NL.device)
        x_NLD = F.embedding(tokens_NL, self.embedding).to(self.dtype)
        exits, entropies, records, whole = {0: x_NLD}, {}, [], []
        for number, layer in enumerate(self.layers):
            rows = None if kept is None else kept[number]
            if rows is None:
                x_NLD, record = layer(x_NLD, table)
                records.append(record)
                if entropy:
                    whole.append(torch.special.entr(record.probs_TE).sum(-1))
            elif rows.numel() or self.expert_group is not None:  # other ranks' rows may need this rank's experts
                x_out, record = layer(x_NLD.index_select(0, rows), table)
                x_NLD = x_NLD.index_copy(0, rows, x_out)
                if rows.numel():
                    records.append(record)
            if number + 1 in config.exit_layers:
                since = number + 1 - max(e for e in exits if e <= number)
                exits[number + 1] = x_NLD
                if len(whole) == number + 1:
                    entropies[number + 1] = torch.stack(whole[-since:]).mean(0)
        return DecoderOutput(
            exits=exits,
            entropy_T=entropies,
            final_NLD=x_NLD,
            balance_loss=torch.stack([r.balance_loss for r in records]).mean(),
            z_loss=torch.stack([r.z_loss for r in records]).mean(),
        )

    @property
    def expert_group(self) -> Any:
        """The process group that shares the experts of every layer; None: all are here."""
        mlp: Any = self.layers[0].mlp
        return mlp.group

    def apply_exit_head(self, x: torch.Tensor, exit_layer: int | None = None) -> torch.Tensor:
        """The normed state that the LM head multiplies: of the full model, or of the exit after that many layers."""
        return self.norm(x if exit_layer is None else self.adapters[str(exit_layer)](x))

    def logits(self, x: torch.Tensor, exit_layer: int | None = None) -> torch.Tensor:
        """Next-token logits (..., V) in the activations' dtype."""
        return F.linear(self.apply_exit_head(x, exit_layer), self.embedding.to(x.dtype))
