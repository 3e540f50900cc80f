"""The exchange of a mixture whose experts move: results do not say which rank made them.

An expert may be on several ranks; which of them runs a row's slot is a function of the row alone. Ranks return every
slot's result by itself, and the row's own rank adds them up in the order of the slots, in float32. So a row's bits do
not depend on where its experts are. Sums by rank, as :class:`.ExpertExchange` has them, would.

Shape suffixes as in ``moe/exchange.py``; C ranks that have an expert, P slots of several rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..kernels.api.types import Routing
from .dispatch import UNUSED, ExpertShares
from .exchange import ExpertExchange, PendingDispatch, Received

_HASHED = 16  # numbers of a row
_FACTORS = [pow(0x9E3779B97F4A7C15, power, 1 << 64) for power in range(1, _HASHED + 1)]  # odd, half of them negative


@dataclass(frozen=True, kw_only=True)
class PlacedExperts(ExpertShares):
    """The experts of one layer in places on their ranks; an expert may have several.

    Arguments:
        ranks_E1C: int64, the ranks of every expert, the first ``copies_E1`` of each row; the last row is of
            :data:`UNUSED`, and holds it.
    """

    ranks_E1C: torch.Tensor
    copies_E1: torch.Tensor

    def reached(self, ids_TK: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
        """See :meth:`ExpertShares.reached`: of an expert with several ranks, one that the row's own numbers choose."""
        ids_TK = ids_TK.long()
        choice_TK = row_hash(x_TD)[:, None] % self.copies_E1[ids_TK]
        return self.ranks_E1C[ids_TK, choice_TK] == torch.arange(len(self.held), device=ids_TK.device)[:, None, None]


def row_hash(x_TD: torch.Tensor) -> torch.Tensor:
    """A number from 0 below 2^30 for every row, int64, of its first entries' bits."""
    whole = {2: torch.int16, 4: torch.int32}[x_TD.element_size()]
    bits_TD = x_TD[:, :_HASHED].contiguous().view(whole).long()
    signed = [factor - (1 << 64) * (factor >> 63) for factor in _FACTORS[: bits_TD.shape[1]]]
    return (bits_TD * torch.tensor(signed, device=x_TD.device)).sum(1) >> 33 & (1 << 30) - 1


def place_experts(
    places: Sequence[Sequence[int]],
    num_experts: int,
    top_k: int,
    device: torch.device | str,
    weight_on_input: bool = False,
) -> PlacedExperts:
    """Experts as they lie in places.

    Arguments:
        places: see :mod:`.rebalance`.
        top_k, weight_on_input: slots of a row, and where their weights go.
    """
    local_XE1 = torch.full((len(places), num_experts + 1), UNUSED, dtype=torch.int32)
    for local_E1, experts in zip(local_XE1, places, strict=True):
        for place, expert in enumerate(experts):
            if expert != UNUSED:
                local_E1[expert] = place
    here_E1X = local_XE1.T != UNUSED
    copies_E1 = here_E1X.sum(1)
    ranks_E1C = here_E1X.int().sort(dim=1, descending=True, stable=True).indices[:, : int(copies_E1.max())]
    ranks_E1C[-1], copies_E1[-1] = UNUSED, 1
    return PlacedExperts(
        local_XE1=local_XE1.to(device),
        top_k=top_k,
        held=tuple(map(len, places)),
        weight_on_input=weight_on_input,
        ranks_E1C=ranks_E1C.to(device),
        copies_E1=copies_E1.to(device),
    )


class SlotExchange(ExpertExchange):
    """As :class:`ExpertExchange`, for :class:`PlacedExperts`. The host reads how many slots each rank returns."""

    def receive(self, pending: PendingDispatch) -> Received:
        """See :meth:`ExpertExchange.receive`; every slot that this rank runs is a row of its own."""
        x_RD, ids_RK, weights_RK = self._records(pending)
        rank, shares = self._axis.rank, pending.shares
        here_RK = shares.reached(ids_RK, x_RD)[rank]
        rows_P, slots_P = here_RK.nonzero().unbind(1)
        routing = Routing(
            expert_ids_TK=shares.local_XE1[rank][ids_RK[rows_P, slots_P].long()][:, None],
            weights_TK=weights_RK[rows_P, slots_P][:, None],
            weight_on_input=pending.weight_on_input,
        )
        counts = [int(part.sum()) for part in here_RK.sum(1).split(pending.received)]
        return Received(x_RD[rows_P], routing, counts)

    def combine(self, pending: PendingDispatch, received: Received, out_RD: torch.Tensor) -> torch.Tensor:
        """See :meth:`ExpertExchange.combine`; ``out_RD`` are the results of single slots."""
        reached_XTK = pending.reached_XTK
        coming = pending.slots_X.tolist()
        found_PD, work = self._transport.swap(out_RD, received.counts, coming, self._axis.group, "combine")
        self._transport.finish(work)
        found_TK = torch.full(reached_XTK.shape[1:], UNUSED, device=found_PD.device)
        for reached_TK, numbers_P in zip(
            reached_XTK, torch.arange(sum(coming), device=found_PD.device).split(coming), strict=True
        ):
            found_TK[reached_TK] = numbers_P
        total_TD = torch.zeros_like(pending.like_TD, dtype=torch.float32)
        for found_T in found_TK.T:
            rows_R = (found_T != UNUSED).nonzero()[:, 0]
            total_TD.index_add_(0, rows_R, found_PD[found_T[rows_R]].float())
        return total_TD
