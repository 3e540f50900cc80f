"""Grouped-query attention with parts that few families have.

Optional: a gate on the output, norms without weights or behind the rotation, queries that grow with their position,
chunks that see nothing of each other, values narrower than keys.

Shape suffixes as in ``kernels/api/types.py``; V the channels of a value.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ....kernels.api.ranges import check_ranges
from ....kernels.api.stack import StackBlock, StackGrowth
from ....kernels.api.types import AttentionBatch, KVLayer, KVProjection, LinearWeights
from ....kernels.reference.elementwise import sigmoid
from ....kernels.reference.operations import rope
from .chunks import within_chunks
from .gqa import GqaSpec, GqaWeights, Heads, Norms
from .kind import AttentionContext, AttentionCuts, AttentionLayout, Shape, linear_layout


@dataclass(frozen=True, kw_only=True)
class QueryGrowth(StackGrowth):
    """See :class:`.StackGrowth`."""

    def __post_init__(self) -> None:
        check_ranges(self, "period", least=1)

    def factors(self, batch: AttentionBatch) -> torch.Tensor:
        """float32, (T,). Looked up: torch's logarithm of an element depends on how many there are."""
        last = (batch.num_positions - 1 + self.offset) // self.period
        known = _factors(self.rate, 1 << last.bit_length(), batch.positions_T.device)
        return known[(batch.positions_T + self.offset) // self.period]


@lru_cache(maxsize=8)  # steps upload nothing
def _factors(rate: float, count: int, device: torch.device) -> torch.Tensor:
    known = [1 + rate * math.log1p(steps) for steps in range(count)]
    return torch.tensor(known, dtype=torch.float32, device=device)


@dataclass(frozen=True, kw_only=True)
class ExtendedWeights(GqaWeights):
    """See :class:`GqaWeights`.

    Arguments:
        gate: reads what the queries read; H · V outputs.
    """

    gate: LinearWeights | None = None


@dataclass(frozen=True, kw_only=True)
class ExtendedGqaSpec(GqaSpec):
    """See :class:`GqaSpec`.

    Arguments:
        output_gate: the heads' outputs are multiplied by the sigmoid of a projection of the normed rows.
        unit_norm: queries and keys are normed per head without weights, whatever ``qk_norm`` says of other norms.
        norm_after_rotation: the norms per head come behind the rotation.
        growth: of the queries.
        chunk: positions that see each other; None: all do.
        values: channels of a value; None: as many as a key has.
        value_scale: factor on the values.
        value_norm: values are normed per head without weights.
        values_are_keys: values are what the keys' projection makes, not normed as keys and not rotated.
    """

    kind: ClassVar[str] = "extended_gqa"
    output_gate: bool = False
    unit_norm: bool = False
    norm_after_rotation: bool = False
    growth: QueryGrowth | None = None
    chunk: int | None = None
    values: int | None = None
    value_scale: float = 1.0
    value_norm: bool = False
    values_are_keys: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk is not None:
            check_ranges(self, "chunk", least=1)
        if self.values is not None and (self.value_norm or self.values_are_keys):
            raise ValueError("values that are normed, or are the keys, are as wide as these")
        if not 1 <= self.value_channels <= self.head_dim:
            raise ValueError(f"values cannot have {self.value_channels} channels where keys have {self.head_dim}")
        if self.qk_norm == "full" or (self.unit_norm and self.qk_norm != "none"):
            raise ValueError(f"qk_norm {self.qk_norm!r} does not go with attention of kind {self.kind!r}")

    @property
    def reach(self) -> int | None:
        return min((size for size in (self.window, self.chunk) if size is not None), default=None)

    @property
    def value_channels(self) -> int:
        return self.head_dim if self.values is None else self.values

    def layout(self, prefix: str, hidden_size: int, available: Container[str]) -> AttentionLayout:
        layout = super().layout(prefix, hidden_size, available)
        if self.values_are_keys:
            qkv = layout.linears["qkv"]
            both = {name: getattr(qkv, name)[:2] for name in ("weights", "outputs", "biases", "orders")}
            layout = replace(layout, linears={**layout.linears, "qkv": replace(qkv, **both)})
        if not self.output_gate:
            return layout
        size = self.num_heads * self.value_channels
        gate = linear_layout(f"{prefix}self_attn.", hidden_size, {"gate_proj": size})
        return replace(layout, linears={**layout.linears, "gate": gate})

    def weights(self, parts: Mapping[str, LinearWeights | torch.Tensor]) -> ExtendedWeights:
        return ExtendedWeights(**parts)  # type: ignore[arg-type]

    def forward(
        self, weights: Any, x_TD: torch.Tensor, kv: KVLayer, batch: AttentionBatch, context: AttentionContext
    ) -> torch.Tensor:
        if self.chunk is not None:
            batch = within_chunks(batch, self.chunk, kv.page_size)
        out_TX = self.attended(weights, x_TD, kv, batch, context)[..., : self.value_channels].flatten(1)
        if weights.gate is not None:
            out_TX = out_TX * sigmoid(context.backend.linear(x_TD, weights.gate))
        return context.backend.linear(out_TX, weights.o)

    def rotated_queries(
        self, weights: GqaWeights, x_TD: torch.Tensor, kv: KVLayer, batch: AttentionBatch, context: AttentionContext
    ) -> torch.Tensor:
        heads = self.heads(context.backend.linear(x_TD, weights.qkv))
        return self._write(heads, (weights.q_norm, weights.k_norm), kv, batch, context)

    def heads(self, qkv_TX: torch.Tensor) -> Heads:
        q_TX, kv_TX = qkv_TX[:, : self.q_size], qkv_TX[:, self.q_size :]
        return self._heads(q_TX), *self._keys_and_values(kv_TX)

    def _keys_and_values(self, kv_TX: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k_TX = kv_TX[:, : self.kv_size]
        return self._heads(k_TX), self._padded(k_TX if self.values_are_keys else kv_TX[:, self.kv_size :])

    def _heads(self, x_TX: torch.Tensor) -> torch.Tensor:
        return x_TX.unflatten(-1, (-1, self.head_dim))

    def _padded(self, v_TX: torch.Tensor) -> torch.Tensor:
        """Values as wide as keys: zeros behind them add nothing."""
        v_TGV = v_TX.unflatten(-1, (self.num_kv_heads, -1))
        v_TGV = v_TGV if self.value_scale == 1.0 else v_TGV * self.value_scale
        return F.pad(v_TGV, (0, self.head_dim - self.value_channels)).contiguous()

    def _write(
        self, heads: Heads, norms: Norms, kv: KVLayer, batch: AttentionBatch, context: AttentionContext
    ) -> torch.Tensor:
        """The rotated queries; keys and values go to the cache."""
        rows, table_LC, positions_T = batch, context.cos_sin_LC, batch.positions_T
        if self.norm_after_rotation:
            q_THC, k_TGC, v_TGC = heads
            heads = rope(q_THC, table_LC, positions_T), rope(k_TGC, table_LC, positions_T), v_TGC
            # Written as they are, by a table with one row: cosine 1, sine 0.
            columns_C = torch.arange(self.head_dim, device=table_LC.device)
            table_LC = (columns_C < self.head_dim // 2).to(table_LC.dtype)[None]
            batch = replace(batch, positions_T=torch.zeros_like(positions_T))
        q_THC, k_TGC, v_TGC = self.normed(heads, norms, context)
        if self.unit_norm:
            ones_C = torch.ones(self.head_dim, dtype=q_THC.dtype, device=q_THC.device)
            q_THC, k_TGC = context.norm(q_THC, ones_C), context.norm(k_TGC, ones_C)
        if self.value_norm:
            v_TGC = context.norm(v_TGC, torch.ones(self.head_dim, device=v_TGC.device))
        if self.growth is not None:
            q_THC = (q_THC * self.growth.factors(rows)[:, None, None]).to(q_THC.dtype)
        return context.backend.rope_and_write(q_THC, k_TGC, v_TGC, table_LC, batch, kv)

    def cache_shapes(self, page_size: int, dtype: torch.dtype) -> tuple[Shape, ...]:
        if self.chunk is not None and self.chunk % page_size:
            raise ValueError(
                f"engine.block_size={page_size} does not divide the model's chunks of {self.chunk} positions"
            )
        return super().cache_shapes(page_size, dtype)

    def cuts(self, layout: AttentionLayout, parts: int, part: int) -> AttentionCuts:
        cuts = super().cuts(layout, parts, part)
        if not self.output_gate:
            return cuts
        own = cuts.inputs[layout.linears["o"].weights[0]][part]
        return replace(cuts, outputs={**cuts.outputs, layout.linears["gate"].weights[0]: own})

    def flops(self, hidden_size: int) -> int:
        gate = 2 * hidden_size * self.num_heads * self.value_channels if self.output_gate else 0
        return super().flops(hidden_size) + gate

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
            read_RD = backend.read_by(projection, x_RD, context.norm_eps)
            k_RGC, v_RGC = self._keys_and_values(backend.linear(read_RD, projection.kv))
            # Queries are rotated as well; keys stand in for them, and nobody looks at the result.
            norms = projection.k_norm, projection.k_norm
            self._write((k_RGC, k_RGC, v_RGC), norms, layer, batch, context)

    def stack_block(self, weights: Any) -> StackBlock:
        if type(self) is not ExtendedGqaSpec:
            return super().stack_block(weights)
        more: dict[str, Any] = {
            **{"gate": weights.gate, "norm_after_rotation": self.norm_after_rotation, "growth": self.growth},
            **{"chunk": self.chunk, "values": self.values, "value_scale": self.value_scale},
            "values_are_keys": self.values_are_keys,
        }
        if self.unit_norm:
            ones_C = torch.ones(self.head_dim, dtype=weights.qkv.dtype)
            more |= {"q_norm": ones_C, "k_norm": ones_C, "norm_per_head": True}
        if self.value_norm:
            more["value_norm"] = torch.ones(self.head_dim)
        return self.stack_parts(weights, **more)
