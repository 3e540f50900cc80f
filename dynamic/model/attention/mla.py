"""Multi-head latent attention: keys and values of all heads are made of one short vector per token, which is cached.

DeepSeek-AI 2024 (DeepSeek-V2). A token's entry in the cache is its *latent*, normed, and one rotated key that all heads
share. A head reads its keys and values out of the latent with weights of its own. Those are applied to the query and to
the weighted sum instead, for prompts and outputs alike, so that a row's bits do not depend on how it was scheduled.
What is left is attention of many query heads over one key/value head, whose values are its keys.

Shape suffixes as in ``kernels/api/types.py``, and
    Z latent    N plain channels of a query    R rotated channels    C = Z + R    V channels of a head's values
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch

from ....kernels.api.latents import KV_FORMATS, entry_size, write_entries
from ....kernels.api.ranges import check_ranges
from ....kernels.api.stack import NotStacked, StackLatentAttention
from ....kernels.api.types import AttentionBatch, KVLayer, KVProjection, LinearWeights
from ....kernels.api.uncommon import LATENT_PAGES, LATENTS
from ....kernels.reference.operations import rope
from ....kernels.torch.backend import TorchBackend
from ...checkpoint.config_reader import ConfigReader
from ..family import Family
from ..norms import TensorLayout
from ..parts import part_of, width
from ..rope_config import score_factor
from .kind import (
    AttentionContext,
    AttentionCuts,
    AttentionLayout,
    AttentionSpec,
    AttentionWeights,
    Shape,
    linear_layout,
)


@dataclass(frozen=True, kw_only=True)
class MlaWeights(AttentionWeights):
    """See :class:`AttentionWeights`.

    Arguments:
        q_a, q_norm: what queries are made of where that is not the hidden state itself.
        q: queries of all heads, H (N + R) outputs.
        kv_a: latent and shared key, Z + R outputs; kv_norm: of the latent.
        key_up, value_up: of every head, (H, Z, N) and (H, V, Z), see :meth:`.LatentOperations.head_linear`.
    """

    q: LinearWeights
    kv_a: LinearWeights
    kv_norm: torch.Tensor
    key_up: LinearWeights
    value_up: LinearWeights
    o: LinearWeights
    q_a: LinearWeights | None = None
    q_norm: torch.Tensor | None = None

    @property
    def propagated_bytes(self) -> int:
        return self.kv_a.nbytes


@dataclass(frozen=True, kw_only=True)
class MlaSpec(AttentionSpec):
    """See :class:`AttentionSpec`.

    Arguments:
        query_rank: channels that queries are made of; None: those of the hidden state.
        latent: channels of the latent.
        plain_dim, rotated_dim: channels of a query that are not rotated, and that are.
        value_dim: channels of a head's values.
        scale: factor on the scores.
        interleaved: the rotated channels are stored pair by pair.
        bias: whether the projections from and to the hidden state have biases; queries have none that read it.
        latent_eps: of the norms of the latent and of what queries are made of.
        index_topk: beyond so many positions an indexer chooses which a row sees; None: it sees all.
        index_heads, index_dim: the indexer's heads and their channels.

    Raises:
        ValueError: for a size that cannot be.
    """

    kind: ClassVar[str] = "mla"
    kv_formats: ClassVar[tuple[str, ...]] = KV_FORMATS
    num_heads: int
    query_rank: int | None
    latent: int
    plain_dim: int
    rotated_dim: int
    value_dim: int
    scale: float
    interleaved: bool = True
    bias: bool = False
    latent_eps: float = 1e-6
    index_topk: int | None = None
    index_heads: int = 0
    index_dim: int = 0

    def __post_init__(self) -> None:
        check_ranges(self, "num_heads", "latent", "plain_dim", "rotated_dim", "value_dim", least=1)
        if self.query_rank is not None:
            check_ranges(self, "query_rank", least=1)
        if self.index_topk is not None:
            check_ranges(self, "index_topk", "index_heads", "index_dim", least=1)

    @classmethod
    def from_config(cls, config: ConfigReader, family: Family, layer: int) -> Self:
        num_heads, rotated_dim = config.integer("num_attention_heads"), config.integer("qk_rope_head_dim")
        plain_dim = config.integer("qk_nope_head_dim")
        derived = {
            "num_key_value_heads": num_heads,
            "head_dim": rotated_dim,
            "qk_head_dim": plain_dim + rotated_dim,
        }
        for key, expected in derived.items():
            if (value := config.integer(key, expected)) != expected:
                raise config.error(key, value, f"{expected} with this attention")
        if "q_lora_rank" not in config.values:  # null is a statement: queries are made of the hidden state
            raise config.lacks("q_lora_rank")
        return cls(
            window=family.window(config, layer),
            num_heads=num_heads,
            query_rank=None if config.get("q_lora_rank") is None else config.integer("q_lora_rank"),
            latent=config.integer("kv_lora_rank"),
            plain_dim=plain_dim,
            rotated_dim=rotated_dim,
            value_dim=config.integer("v_head_dim"),
            bias=family.qkv_bias(config),
            scale=score_factor(config, family, layer) * (plain_dim + rotated_dim) ** -0.5,
            **family.attention_parts(config, layer),
        )

    @property
    def uncommon(self) -> set[str]:
        return {LATENTS, LATENT_PAGES}

    @property
    def rotary_channels(self) -> int:
        return self.rotated_dim

    @property
    def dense_positions(self) -> int | None:
        return self.index_topk

    @property
    def query_dim(self) -> int:
        """Channels of a head's query."""
        return self.plain_dim + self.rotated_dim

    @property
    def cached_dim(self) -> int:
        """Channels of a token in the cache."""
        return self.latent + self.rotated_dim

    def layout(self, prefix: str, hidden_size: int, available: Container[str]) -> AttentionLayout:
        prefix = f"{prefix}self_attn."

        def tensor(name: str, *shape: int) -> TensorLayout:
            return TensorLayout(name=f"{prefix}{name}.weight", shape=shape)

        queries, rank = self.num_heads * self.query_dim, self.query_rank
        linears = {
            "kv_a": linear_layout(prefix, hidden_size, {"kv_a_proj_with_mqa": self.cached_dim}, bias=self.bias),
            "o": linear_layout(prefix, self.num_heads * self.value_dim, {"o_proj": hidden_size}, bias=self.bias),
        }
        tensors = {"kv_norm": tensor("kv_a_layernorm", self.latent)}
        if f"{prefix}k_b_proj.weight" in available:  # as GGUF files have them
            tensors["k_b"] = tensor("k_b_proj", self.num_heads, self.latent, self.plain_dim)
            tensors["v_b"] = tensor("v_b_proj", self.num_heads, self.value_dim, self.latent)
        else:
            tensors["kv_b"] = tensor("kv_b_proj", self.num_heads * (self.plain_dim + self.value_dim), self.latent)
        if rank is None:
            linears["q"] = linear_layout(prefix, hidden_size, {"q_proj": queries})
        else:
            linears["q_a"] = linear_layout(prefix, hidden_size, {"q_a_proj": rank}, bias=self.bias)
            linears["q"] = linear_layout(prefix, rank, {"q_b_proj": queries})
            tensors["q_norm"] = tensor("q_a_layernorm", rank)
        unused = self._indexer(hidden_size) if self.index_topk is not None else {}
        unused = {f"{prefix}indexer.{name}": shape for name, shape in unused.items()}
        return AttentionLayout(
            kind=self,
            linears=linears,
            tensors=tensors,
            # Layers may share an indexer.
            unused={name: shape for name, shape in unused.items() if name in available},
        )

    def _indexer(self, hidden_size: int) -> dict[str, Shape]:
        """Tensors of what chooses positions."""
        return {
            "wq_b.weight": (self.index_heads * self.index_dim, self.query_rank or hidden_size),
            "wk.weight": (self.index_dim, hidden_size),
            "k_norm.weight": (self.index_dim,),
            "k_norm.bias": (self.index_dim,),
            "weights_proj.weight": (self.index_heads, hidden_size),
        }

    def pack(self, parts: Mapping[str, LinearWeights | torch.Tensor], backend: TorchBackend) -> MlaWeights:
        """See :meth:`AttentionSpec.pack`; one rank's share has fewer heads than this."""
        fields: dict[str, Any] = dict(parts)
        if "kv_b" in fields:
            kv_b_HXZ = fields.pop("kv_b").unflatten(0, (-1, self.plain_dim + self.value_dim))
            key_HNZ, value_HVZ = kv_b_HXZ.split((self.plain_dim, self.value_dim), 1)
            key_HZN = key_HNZ.transpose(1, 2)
        else:
            key_HZN, value_HVZ = fields.pop("k_b"), fields.pop("v_b")
        key_up, value_up = backend.pack_head_linear(key_HZN), backend.pack_head_linear(value_HVZ)
        return MlaWeights(**fields, key_up=key_up, value_up=value_up)

    def weights(self, parts: Mapping[str, LinearWeights | torch.Tensor]) -> MlaWeights:
        raise NotImplementedError("this kind's weights are in the backend's layout: see pack")

    def forward(
        self, weights: Any, x_TD: torch.Tensor, kv: KVLayer, batch: AttentionBatch, context: AttentionContext
    ) -> torch.Tensor:
        backend, w = context.backend, weights
        rank_TX = x_TD if w.q_a is None else backend.linear(x_TD, w.q_a)
        if w.q_norm is not None:
            rank_TX = backend.rms_norm(rank_TX, w.q_norm, self.latent_eps)
        q_THX = backend.linear(rank_TX, w.q).unflatten(-1, (-1, self.query_dim))
        plain_THN, rotated_THR = q_THX.split((self.plain_dim, self.rotated_dim), -1)
        latent_TZ, key_TR = self._cached(backend.linear(x_TD, w.kv_a), w.kv_norm, backend)
        rotated_TXR = self._rotated(torch.cat((rotated_THR, key_TR[:, None]), 1), batch, context)
        write_entries(latent_TZ, rotated_TXR[:, -1], kv, batch)
        q_THC = torch.cat((backend.head_linear(plain_THN, w.key_up), rotated_TXR[:, :-1]), -1)
        shape = {"latent": self.latent, "scale": self.scale, "window": self.window}
        out_THZ = backend.latent_attention(q_THC, kv, batch, **shape)
        value_THV = backend.head_linear(out_THZ, w.value_up)
        return backend.linear(value_THV.flatten(1), w.o)

    def _cached(
        self, kv_TC: torch.Tensor, kv_norm: torch.Tensor, backend: TorchBackend
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latent, normed, and shared key, not rotated yet."""
        latent_TZ, key_TR = kv_TC.split((self.latent, self.rotated_dim), -1)
        return backend.rms_norm(latent_TZ.contiguous(), kv_norm, self.latent_eps), key_TR

    def _rotated(self, x_TXR: torch.Tensor, batch: AttentionBatch, context: AttentionContext) -> torch.Tensor:
        return rope(x_TXR, context.cos_sin_LC, batch.positions_T, self.interleaved)

    def cache_shapes(self, page_size: int, dtype: torch.dtype) -> tuple[Shape, ...]:
        return ((1, page_size, entry_size(self.latent, self.rotated_dim, dtype)),)

    def cache(self, tensors: Sequence[torch.Tensor], scales_behind_page: bool) -> KVLayer:
        (entries,) = tensors
        return KVLayer(keys_BGPC=entries, values_BGPC=entries, scales_behind_page=scales_behind_page)

    def part(self, parts: int, part: int) -> Self:
        return replace(self, num_heads=width(self._heads(parts, part)))

    def _heads(self, parts: int, part: int) -> slice:
        if parts > self.num_heads:
            raise ValueError(f"parallel.tensor={parts} does not go with {self.num_heads} heads")
        return part_of(self.num_heads, parts, part)

    def cuts(self, layout: AttentionLayout, parts: int, part: int) -> AttentionCuts:
        def channels(size: int, number: int) -> slice:
            heads = self._heads(parts, number)
            return slice(heads.start * size, heads.stop * size)

        rows = {"kv_b": self.plain_dim + self.value_dim, "k_b": 1, "v_b": 1}
        outputs = {t.name: channels(rows[field], part) for field, t in layout.tensors.items() if field in rows}
        outputs[layout.linears["q"].weights[0]] = channels(self.query_dim, part)
        inputs = tuple(channels(self.value_dim, number) for number in range(parts))
        return AttentionCuts(outputs=outputs, inputs={layout.linears["o"].weights[0]: inputs})

    def flops(self, hidden_size: int) -> int:
        queries = self.num_heads * self.query_dim
        rank = hidden_size if self.query_rank is None else self.query_rank
        made = queries * rank + (0 if self.query_rank is None else hidden_size * rank)
        heads = self.num_heads * (self.plain_dim + self.value_dim)
        return 2 * (made + heads * self.latent + self.num_heads * self.value_dim * hidden_size) + (
            self.propagation_flops(hidden_size)
        )

    def propagation_flops(self, hidden_size: int) -> int:
        return 2 * hidden_size * self.cached_dim

    def stack_block(self, weights: Any) -> StackLatentAttention:
        w, norms = weights, (weights.q_norm, weights.kv_norm)
        if any(norm is not None and norm.dtype != w.kv_a.dtype for norm in norms):
            raise NotStacked("latent attention with norms of another dtype")
        return StackLatentAttention(
            num_heads=self.num_heads,
            latent=self.latent,
            plain_dim=self.plain_dim,
            rotated_dim=self.rotated_dim,
            value_dim=self.value_dim,
            q_a=w.q_a,
            q_norm=w.q_norm,
            q=w.q,
            kv_a=w.kv_a,
            kv_norm=w.kv_norm,
            key_up=w.key_up,
            value_up=w.value_up,
            o=w.o,
            norm_eps=self.latent_eps,
            scale=self.scale,
            interleaved=self.interleaved,
            window=self.window,
        )

    def projection(self, norm_D: torch.Tensor | None, weights: Any, backend: TorchBackend) -> KVProjection:
        return KVProjection(norm_D=norm_D, kv=weights.kv_a, k_norm=weights.kv_norm)

    def propagate(
        self,
        projections: Sequence[KVProjection],
        x_RD: torch.Tensor,
        kv: Sequence[KVLayer],
        batch: AttentionBatch,
        context: AttentionContext,
    ) -> None:
        backend = context.backend
        for projection, layer in zip(projections, kv, strict=True):
            assert projection.k_norm is not None
            normed_RD = backend.read_by(projection, x_RD, context.norm_eps)
            latent_RZ, key_RR = self._cached(backend.linear(normed_RD, projection.kv), projection.k_norm, backend)
            write_entries(latent_RZ, self._rotated(key_RR[:, None], batch, context)[:, 0], layer, batch)
