"""Norms over all heads where the heads are spread over ranks: one sum of squares for queries and keys together.

Shape suffixes as in ``kernels/api/types.py``; X the channels of some heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...kernels.api.types import AttentionBatch
from ..model.attention.gqa import GqaSpec
from ..model.attention.kind import AttentionContext, AttentionSpec
from ..model.decoder import Behind
from .context import ParallelContext
from .shards import Shard


@dataclass(frozen=True)
class SpreadNorm:
    """The part of a norm that goes over the heads of all ranks.

    Arguments:
        width: channels of all heads.
        counted: whether this rank's go into the sum; of heads that several ranks have, those of one do.
    """

    width: int
    counted: bool = True


def spread_norms(shard: Shard) -> tuple[SpreadNorm, SpreadNorm] | None:
    """Of queries and keys; None where a rank has all that a norm goes over."""
    kinds, context = [layer.attention for layer in shard.whole.layers], shard.context
    full = [kind for kind in kinds if isinstance(kind, GqaSpec) and kind.qk_norm == "full"]
    if not full or context.config.tensor == 1:
        return None
    if len(full) < len(kinds):
        raise ValueError("norms over all heads beside layers of other kinds do not run on the tensor axis")
    kind = full[0]
    holders = max(1, context.config.tensor // kind.num_kv_heads)  # ranks that have the same keys
    return SpreadNorm(kind.q_size), SpreadNorm(kind.kv_size, context.tensor_rank % holders == 0)


def norm_over_ranks(
    context: ParallelContext, eps: float, *parts: tuple[torch.Tensor, torch.Tensor, SpreadNorm]
) -> list[torch.Tensor]:
    """Root-mean-square norms over the heads of a tensor group, in the rows' dtype.

    Arguments:
        parts: for each norm this rank's rows (T, X), weight (X), and what the norm goes over.
    """
    squares = [x_TX.float().square().sum(-1) * norm.counted for x_TX, _, norm in parts]
    total_TN = context.sum(torch.stack(squares, -1), context.tensor_group, "norms")
    out = []
    for (x_TX, weight_X, norm), total_T in zip(parts, total_TN.unbind(-1), strict=True):
        normed_TX = x_TX.float() * torch.rsqrt(total_T / norm.width + eps)[:, None]
        out.append((weight_X * normed_TX.to(weight_X.dtype)).to(x_TX.dtype))
    return out


def propagate_over_ranks(
    context: ParallelContext,
    attention: AttentionContext,
    kind: AttentionSpec,
    norm: SpreadNorm,
    layers: Sequence[Behind],
    x_RD: torch.Tensor,
    batch: AttentionBatch,
) -> None:
    """Write this rank's keys and values of layers behind an exit; one sum among the ranks for all of them.

    Arguments:
        kind: attention of these layers, which are alike.
        norm: of keys.
        x_RD: residual stream at the exit.
    """
    assert isinstance(kind, GqaSpec), "no other kind has norms that are spread"
    backend, eps, parts, values = attention.backend, attention.norm_eps, [], []
    for _, projection, _ in layers:
        assert projection.k_norm is not None
        k_RX, v_RX = backend.linear(backend.read_by(projection, x_RD, eps), projection.kv).chunk(2, -1)
        parts.append((k_RX, projection.k_norm, norm))
        values.append(v_RX)
    for (_, _, cache), k_RX, v_RX in zip(layers, norm_over_ranks(context, eps, *parts), values, strict=True):
        if kind.clip is not None:
            k_RX, v_RX = (part.clamp(-kind.clip, kind.clip) for part in (k_RX, v_RX))
        k_RGC, v_RGC = (part.unflatten(-1, (-1, kind.head_dim)) for part in (k_RX, v_RX))
        # Queries are rotated as well; keys stand in for them, and nobody looks at the result.
        backend.rope_and_write(k_RGC, k_RGC, v_RGC, attention.cos_sin_LC, batch, cache)
