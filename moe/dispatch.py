"""Which ranks each row is dispatched to, and its routing over the experts of each.

Shape suffixes as in ``kernels/api/types.py``; X ranks that share the experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..kernels.api.types import Routing

UNUSED = -1


@dataclass(frozen=True, kw_only=True)
class ExpertShares:
    """The experts of one layer on their ranks.

    Arguments:
        local_XE1: int32, every expert's number on each rank, :data:`UNUSED` where it is not; the last entry, which
            :data:`UNUSED` itself points to, as well.
        top_k: slots of a row.
        held: experts of each rank.
        weight_on_input: of the layer's routings.
    """

    local_XE1: torch.Tensor
    top_k: int
    held: tuple[int, ...]
    weight_on_input: bool = False

    def no_rows(self) -> Routing:
        """The routing of a rank that has no rows."""
        ids_0K = self.local_XE1.new_empty(0, self.top_k)
        return Routing(expert_ids_TK=ids_0K, weights_TK=ids_0K.float(), weight_on_input=self.weight_on_input)

    def reached(self, ids_TK: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
        """Whether a rank runs a slot, bool, (X, T, K): it has the slot's expert.

        Arguments:
            ids_TK: of :func:`used_ids`.
            x_TD: what the experts read of these rows.
        """
        return self.local_XE1[:, ids_TK.long()] != UNUSED

    def on_rank(self, rank: int, ids_TK: torch.Tensor, weights_TK: torch.Tensor, weight_on_input: bool) -> Routing:
        """The routing of rows on a rank that they were sent to: the slots of its experts, in their order.

        Arguments:
            ids_TK: of :func:`used_ids`.
        """
        ids_TK = self.local_XE1[rank][ids_TK.long()]
        here_TK = ids_TK != UNUSED
        here_TK, order_TK = here_TK.int().sort(dim=1, descending=True, stable=True)  # quicker than argsort
        here_TK, order_TK = here_TK[:, : self.held[rank]] > 0, order_TK[:, : self.held[rank]]
        return Routing(
            expert_ids_TK=ids_TK.gather(1, order_TK).where(here_TK, 0),
            weights_TK=weights_TK.gather(1, order_TK).where(here_TK, 0.0),
            counts_T=here_TK.sum(1, dtype=torch.int32),
            weight_on_input=weight_on_input,
        )


def share_experts(
    parts: Sequence[Sequence[int]], top_k: int, device: torch.device | str, weight_on_input: bool = False
) -> ExpertShares:
    """Experts as they are spread over ranks.

    Arguments:
        parts: the experts of each rank, in the order in which it keeps them.
        top_k, weight_on_input: slots of a row, and where their weights go.
    """
    held = tuple(map(len, parts))
    local_XE1 = torch.full((len(parts), sum(held) + 1), UNUSED, dtype=torch.int32)
    for local_E1, experts in zip(local_XE1, parts, strict=True):
        local_E1[list(experts)] = torch.arange(len(experts), dtype=torch.int32)
    return ExpertShares(local_XE1=local_XE1.to(device), top_k=top_k, held=held, weight_on_input=weight_on_input)


def used_ids(routing: Routing) -> torch.Tensor:
    """The experts of every slot, int32, (T, K); :data:`UNUSED` in slots that are not used."""
    ids_TK = routing.expert_ids_TK
    if routing.counts_T is None:
        return ids_TK
    used_TK = torch.arange(ids_TK.shape[1], device=ids_TK.device) < routing.counts_T[:, None]
    return ids_TK.where(used_TK, UNUSED)
