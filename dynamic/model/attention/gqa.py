"""Grouped-query attention: query heads share key/value heads; multi-head and multi-query attention are its ends.

Ainslie et al. 2023. Optional: biases, RMS norms of queries and keys, clipping, a sliding window, sinks.

Shape suffixes as in ``kernels/api/types.py``; X the channels of all heads.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch

from ....kernels.api.kv_codes import stored_channels
from ....kernels.api.ranges import check_ranges
from ....kernels.api.stack import StackAttention, StackBlock
from ....kernels.api.types import AttentionBatch, KVLayer, KVProjection, LinearWeights
from ....kernels.api.uncommon import CAPS
from ....kernels.torch.backend import TorchBackend
from ...checkpoint.config_reader import ConfigReader
from ..family import Family
from ..norms import TensorLayout, norm_tensor
from ..parts import scaled, share_heads, width
from ..rope import rotary_order
from ..rope_config import rotated_channels
from .kind import (
    AttentionContext,
    AttentionCuts,
    AttentionLayout,
    AttentionSpec,
    AttentionWeights,
    Shape,
    linear_layout,
)

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Norms = tuple[torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True, kw_only=True)
class GqaWeights(AttentionWeights):
    """See :class:`AttentionWeights`.

    Arguments:
        qkv: queries, keys and values in one projection, (H + 2 G) · C outputs.
    """

    qkv: LinearWeights
    o: LinearWeights
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    sinks: torch.Tensor | None = None

    @property
    def propagated_bytes(self) -> int:
        return self.qkv.nbytes * (self.qkv.out_features - self.o.in_features) // self.qkv.out_features


@dataclass(frozen=True, kw_only=True)
class GqaSpec(AttentionSpec):
    """See :class:`AttentionSpec`.

    Arguments:
        scale: factor on the scores.
        qkv_bias, o_bias: whether these projections have biases.
        qk_norm: RMS norm of queries and keys before rotation: ``none``, per ``head``, or over the ``full`` width.
        norm: of which kind that is, see ``NORM_KINDS``.
        softcap: scores s become ``softcap · tanh(s / softcap)``.
        clip: queries, keys and values are clipped to ± this value.
        rotated: channels of a head that positions rotate; None: all.
        interleaved: neighbouring channels are rotated together, not those half a head apart.
        sinks: each head has a learned logit that takes part in the softmax and has no value.

    Raises:
        ValueError: for sizes that do not go together.
    """

    kind: ClassVar[str] = "gqa"
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: str = "none"
    norm: str = "rms"
    softcap: float | None = None
    clip: float | None = None
    rotated: int | None = None
    interleaved: bool = False
    sinks: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, "num_heads", "num_kv_heads", "head_dim", least=1)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_heads} is no multiple of num_key_value_heads={self.num_kv_heads}"
            )
        if self.qk_norm not in ("none", "head", "full"):
            raise ValueError(f"qk_norm must be none, head or full, not {self.qk_norm!r}")
        if not 0 <= self.rotary_channels <= self.head_dim:
            raise ValueError(f"{self.rotary_channels} of {self.head_dim} channels cannot be rotated")

    @classmethod
    def from_config(cls, config: ConfigReader, family: Family, layer: int) -> Self:
        num_heads = config.integer("num_attention_heads")
        if num_heads < 1:
            raise config.error("num_attention_heads", num_heads, "at least 1")
        head_dim = config.integer("head_dim", family.head_dim or config.integer("hidden_size") // num_heads)
        if head_dim < 1:
            raise config.error("head_dim", head_dim, "at least 1")
        rotated = rotated_channels(config, family, layer, head_dim)
        parts: dict[str, Any] = {
            "window": family.window(config, layer),
            "num_heads": num_heads,
            "num_kv_heads": config.integer("num_key_value_heads", family.kv_heads or num_heads),
            "head_dim": head_dim,
            "scale": head_dim**-0.5,
            "qkv_bias": family.qkv_bias(config),
            "o_bias": family.o_bias(config),
            "qk_norm": family.qk_norm,
            "norm": "rms" if family.qk_norm == "none" else family.norm(config, family.norm_eps)[0],
            "rotated": None if rotated == head_dim else rotated,
            "interleaved": family.rope_interleaved,
        }
        return cls(**{**parts, **family.attention_parts(config, layer)})

    @property
    def uncommon(self) -> set[str]:
        return set() if self.softcap is None else {CAPS}

    @property
    def rotary_channels(self) -> int:
        return self.head_dim if self.rotated is None else self.rotated

    @property
    def unrotated_channels(self) -> int:
        return self.head_dim - self.rotary_channels

    @property
    def q_size(self) -> int:
        """Channels of all query heads; those of keys and of values are ``kv_size``."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def value_channels(self) -> int:
        """Of one head's value and output, as the projections have them."""
        return self.head_dim

    @property
    def rows_per_head(self) -> tuple[int, int]:
        """Of the projections to queries and keys."""
        return self.head_dim, self.head_dim

    @property
    def norm_sizes(self) -> tuple[int, int] | None:
        """Widths of the norms of queries and keys."""
        return {"none": None, "head": (self.head_dim, self.head_dim), "full": (self.q_size, self.kv_size)}[self.qk_norm]

    def layout(self, prefix: str, hidden_size: int, available: Container[str]) -> AttentionLayout:
        order = rotary_order(self.head_dim, self.rotary_channels, self.interleaved)

        def present(*names: str) -> str:
            names = tuple(f"{prefix}self_attn.{name}" for name in names)
            return next((name for name in names if name in available), names[0])

        names = {
            "q_norm": present("q_norm.weight", "query_layernorm.weight"),
            "k_norm": present("k_norm.weight", "key_layernorm.weight"),
        }
        tensors = {
            field: replace(norm_tensor(self.norm, name, size), order=order)
            for (field, name), size in zip(names.items(), self.norm_sizes or (), strict=False)
        }
        if self.sinks:
            name = present("sinks", "attention_sink_bias")
            tensors["sinks"] = TensorLayout(name=name, shape=(self.num_heads,), float32=True)
        return AttentionLayout(
            kind=self,
            linears={
                "qkv": linear_layout(
                    f"{prefix}self_attn.",
                    hidden_size,
                    {"q_proj": self.q_size, "k_proj": self.kv_size, "v_proj": self.num_kv_heads * self.value_channels},
                    bias=self.qkv_bias,
                    orders=(order, order, ()),
                ),
                "o": linear_layout(
                    f"{prefix}self_attn.",
                    self.num_heads * self.value_channels,
                    {"o_proj": hidden_size},
                    bias=self.o_bias,
                ),
            },
            tensors=tensors,
        )

    def weights(self, parts: Mapping[str, LinearWeights | torch.Tensor]) -> GqaWeights:
        return GqaWeights(**parts)  # type: ignore[arg-type]

    def forward(
        self, weights: Any, x_TD: torch.Tensor, kv: KVLayer, batch: AttentionBatch, context: AttentionContext
    ) -> torch.Tensor:
        out_THC = self.attended(weights, x_TD, kv, batch, context)
        return context.backend.linear(out_THC.flatten(1), weights.o)

    def attended(
        self, weights: Any, x_TD: torch.Tensor, kv: KVLayer, batch: AttentionBatch, context: AttentionContext
    ) -> torch.Tensor:
        """The heads' outputs, (T, H, C)."""
        q_THC = self.rotated_queries(weights, x_TD, kv, batch, context)
        options = {"scale": self.scale, "window": self.window, "sinks_H": weights.sinks, "softcap": self.softcap}
        return context.backend.attention(q_THC, kv, batch, **options)

    def rotated_queries(
        self, weights: GqaWeights, x_TD: torch.Tensor, kv: KVLayer, batch: AttentionBatch, context: AttentionContext
    ) -> torch.Tensor:
        """What looks at the cache, (T, H, C); the rows' keys and values are written to it."""
        heads = self.heads(context.backend.linear(x_TD, weights.qkv))
        heads = self.normed(heads, (weights.q_norm, weights.k_norm), context)
        return context.backend.rope_and_write(*heads, context.cos_sin_LC, batch, kv)

    def heads(self, qkv_TX: torch.Tensor) -> Heads:
        """Queries (T, H, C), keys and values (T, G, C), views of their projection."""
        qkv_TXC = qkv_TX.view(qkv_TX.shape[0], -1, self.head_dim)
        first, last = self.num_heads, self.num_heads + self.num_kv_heads
        return qkv_TXC[:, :first], qkv_TXC[:, first:last], qkv_TXC[:, last:]

    def normed(self, heads: Heads, norms: Norms, context: AttentionContext) -> Heads:
        """Queries, keys and values, normed and clipped, not rotated yet.

        Arguments:
            norms: weights for queries and keys.
        """
        (q_THC, k_TGC, v_TGC), (q_norm, k_norm) = heads, norms
        if self.qk_norm == "full":
            pairs = (q_THC.flatten(1), q_norm), (k_TGC.flatten(1), k_norm)
            q_TX, k_TX = context.norm_over_heads(*pairs)
            q_THC, k_TGC = q_TX.view(q_THC.shape), k_TX.view(k_TGC.shape)
        if self.clip is not None:
            q_THC, k_TGC, v_TGC = (part.clamp(-self.clip, self.clip) for part in (q_THC, k_TGC, v_TGC))
        if self.qk_norm == "head":
            assert q_norm is not None
            assert k_norm is not None
            q_THC, k_TGC = context.norm(q_THC, q_norm), context.norm(k_TGC, k_norm)
        return q_THC, k_TGC, v_TGC

    def cache_shapes(self, page_size: int, dtype: torch.dtype) -> tuple[Shape, ...]:
        page = (self.num_kv_heads, page_size, stored_channels(self.head_dim, dtype))
        return page, page

    def part(self, parts: int, part: int) -> Self:
        queries, keys = split_heads(self, parts, part)
        return replace(self, num_heads=width(queries), num_kv_heads=width(keys))

    def cuts(self, layout: AttentionLayout, parts: int, part: int) -> AttentionCuts:
        shares = [split_heads(self, parts, number) for number in range(parts)]
        queries, keys = (scaled(share, size) for share, size in zip(shares[part], self.rows_per_head, strict=True))
        values = scaled(shares[part][1], self.value_channels)
        qkv, tensors = layout.linears["qkv"], layout.tensors
        outputs: dict[str, slice | tuple[slice, ...]] = {}
        for names in (qkv.weights, qkv.biases):
            outputs |= zip(names, (queries, keys, values), strict=False)
        if self.qk_norm == "full":
            outputs |= {tensors["q_norm"].name: scaled(shares[part][0], self.head_dim), tensors["k_norm"].name: keys}
        if self.sinks:
            outputs[tensors["sinks"].name] = shares[part][0]
        return AttentionCuts(
            outputs=outputs,
            inputs={layout.linears["o"].weights[0]: tuple(scaled(q, self.value_channels) for q, _ in shares)},
        )

    def flops(self, hidden_size: int) -> int:
        return 2 * hidden_size * (self.num_heads + self.num_kv_heads) * (self.head_dim + self.value_channels)

    def propagation_flops(self, hidden_size: int) -> int:
        return 2 * hidden_size * self.num_kv_heads * (self.head_dim + self.value_channels)

    def stack_block(self, weights: Any) -> StackBlock:
        if type(self) is not GqaSpec:  # a kind made of this one computes something else
            return super().stack_block(weights)
        return self.stack_parts(weights)

    def stack_parts(self, weights: GqaWeights, **more: Any) -> StackAttention:
        """For a backend's stack.

        Arguments:
            more: what a kind that is made of this one has beside.
        """
        parts: dict[str, Any] = {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "qkv": weights.qkv,
            "q_norm": weights.q_norm,
            "k_norm": weights.k_norm,
            "norm_per_head": self.qk_norm == "head",
            "o": weights.o,
            "scale": self.scale,
            "window": self.window,
            "sinks_H": weights.sinks,
            "softcap": self.softcap,
            "clip": self.clip,
        }
        return StackAttention(**{**parts, **more})

    def projection(self, norm_D: torch.Tensor | None, weights: Any, backend: TorchBackend) -> KVProjection:
        kv = backend.linear_tail(weights.qkv, self.q_size)
        return KVProjection(norm_D=norm_D, kv=kv, k_norm=weights.k_norm)

    def propagate(
        self,
        projections: Sequence[KVProjection],
        x_RD: torch.Tensor,
        kv: Sequence[KVLayer],
        batch: AttentionBatch,
        context: AttentionContext,
    ) -> None:
        context.backend.project_kv(
            x_RD, projections, kv, context.cos_sin_LC, batch, norm_eps=context.norm_eps, clip=self.clip
        )


def split_heads(spec: GqaSpec, parts: int, part: int) -> tuple[slice, slice]:
    """Query heads and key/value heads of one rank, see :func:`.share_heads`."""
    return share_heads(spec.num_heads, spec.num_kv_heads, parts, part)
