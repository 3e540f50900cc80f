"""Which of the ranks that share a layer's experts each row goes to, and with which of its slots.

Shape suffixes as in ``kernels/types.py``; X ranks that share the experts, Q slots of a row on one rank, at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..kernels.types import Routing

UNUSED = -1


@dataclass(frozen=True, kw_only=True)
class ExpertShares:
    """The experts of one layer on their ranks.

    Arguments:
        local_XE: int32, every expert's number on each rank, :data:`UNUSED` where it is not.
        top_k: slots of a row; slots: how many of them can meet on one rank.
    """

    local_XE: torch.Tensor
    top_k: int
    slots: int


def share_experts(parts: Sequence[Sequence[int]], top_k: int, device: torch.device | str) -> ExpertShares:
    """Experts as they are spread over ranks.

    Arguments:
        parts: the experts of each rank, in the order in which it keeps them.
        top_k: slots of a row.
    """
    local_XE = torch.full((len(parts), sum(map(len, parts))), UNUSED, dtype=torch.int32)
    for local_E, experts in zip(local_XE, parts, strict=True):
        local_E[list(experts)] = torch.arange(len(experts), dtype=torch.int32)
    return ExpertShares(local_XE=local_XE.to(device), top_k=top_k, slots=min(top_k, max(map(len, parts))))


@dataclass(frozen=True, kw_only=True)
class Sends:
    """What each rank is to do with each row: used slots in front, in the order of the routing.

    Arguments:
        expert_ids_XTQ: int32, numbers on the rank; :data:`UNUSED` in slots that are not used.
        weights_XTQ: float32, zero there.
        counts_XT: int64, used slots.
    """

    expert_ids_XTQ: torch.Tensor
    weights_XTQ: torch.Tensor
    counts_XT: torch.Tensor


def plan_sends(routing: Routing, shares: ExpertShares) -> Sends:
    """Cut a routing to the experts of each rank."""
    ids_XTK = shares.local_XE[:, routing.expert_ids_TK.long()]
    if routing.counts_T is not None:
        used_TK = torch.arange(ids_XTK.shape[2], device=ids_XTK.device) < routing.counts_T[:, None]
        ids_XTK = ids_XTK.where(used_TK, UNUSED)
    there_XTK = ids_XTK != UNUSED
    order_XTQ = there_XTK.int().argsort(dim=2, descending=True, stable=True)[..., : shares.slots]
    ids_XTQ = ids_XTK.gather(2, order_XTQ)
    weights_XTK = routing.weights_TK.expand(ids_XTK.shape)
    return Sends(
        expert_ids_XTQ=ids_XTQ,
        weights_XTQ=weights_XTK.gather(2, order_XTQ).where(ids_XTQ != UNUSED, 0.0),
        counts_XT=there_XTK.sum(2),
    )


def arrived(expert_ids_TQ: torch.Tensor, weights_TQ: torch.Tensor, weight_on_input: bool) -> Routing:
    """The routing of rows on the rank that they were sent to."""
    used_TQ = expert_ids_TQ != UNUSED
    return Routing(
        expert_ids_TK=expert_ids_TQ.where(used_TQ, 0),
        weights_TK=weights_TQ,
        counts_T=used_TQ.sum(1, dtype=torch.int32),
        weight_on_input=weight_on_input,
    )
