"""The all-to-all exchange of a mixture: rows go to the ranks that hold their experts, partial sums come back.

A row goes once to every rank that holds at least one of its experts: its hidden vector in the activations' dtype, and
the numbers and weights of its slots. What comes back is the sum over the slots of that rank, and the sums are added
where the row came from, in the order of the ranks, in float32. Neither timing nor other rows change a bit.

Steps of few rows travel padded: every rank gets room for all rows of every KV shard, which all know beforehand, so that
no count has to come from the device. Larger steps send what is needed, and the numbers of rows in front of it.

Shape suffixes as in ``moe/dispatch.py``; R rows that travel, B bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..kernels.api.types import Routing
from .dispatch import ExpertShares, used_ids


@dataclass(frozen=True, kw_only=True)
class Departure:
    """Rows on their way to the experts.

    Arguments:
        rows: of this rank, by rank that they go to, int64; None: all go to all.
        sent, coming: how many rows go to each rank, and come from each.
        records_RB: they arrive here, once ``work`` is done.
        like_TD: this rank's rows.
        weight_on_input: of the routing, see :class:`Routing`; shares: of the layer.
    """

    rows: list[torch.Tensor] | None
    sent: list[int]
    coming: list[int]
    records_RB: torch.Tensor
    work: Any
    like_TD: torch.Tensor
    weight_on_input: bool
    shares: ExpertShares


class Transport(Protocol):
    """Moves rows between the ranks of a process group."""

    device: torch.device

    def swap(
        self, rows: torch.Tensor, sent: Sequence[int], coming: Sequence[int], group: Any, purpose: str
    ) -> tuple[torch.Tensor, Any]:
        """Begin to send every rank its part of some rows, and to receive what all have for this one."""
        ...

    def finish(self, work: Any) -> None:
        """Wait for what :meth:`swap` began."""
        ...


@dataclass(frozen=True, kw_only=True)
class ExpertAxis:
    """The ranks that share the experts.

    Arguments:
        group: their process group; None where one rank holds all experts.
        size, rank: of the group.
        first: number of the group's first rank among those of the stage.
    """

    group: Any
    size: int
    rank: int
    first: int


class ExpertExchange:
    """This rank's side of the exchange along the expert axis.

    Arguments:
        transport: between the ranks.
        axis: the ranks.
        padded_rows: steps of at most so many rows, those of all KV shards that share experts together, travel padded.

    Attributes:
        rows: of each rank of the expert axis, in the segment that runs now.
        executed_X: int64, slots of this rank's rows in this segment by the rank that ran them.
    """

    def __init__(self, transport: Transport, axis: ExpertAxis, padded_rows: int) -> None:
        self._transport = transport
        self._axis = axis
        self._group = axis.group
        self._padded_rows = padded_rows
        self._me = axis.rank
        self.rows: Sequence[int] = ()
        self.executed_X = torch.zeros(axis.size if axis.size > 1 else 0, dtype=torch.int64, device=transport.device)

    def begin(self, shard_rows: Sequence[int]) -> None:
        """A segment begins, with so many rows in each KV shard of the stage."""
        self.rows = shard_rows[self._axis.first : self._axis.first + self._axis.size]
        self.executed_X.zero_()

    def depart(self, x_TD: torch.Tensor, routing: Routing, shares: ExpertShares) -> Departure:
        """Send this rank's rows on their way; :meth:`arrive` takes them in."""
        ids_TK = used_ids(routing)
        reached_XTK = shares.reached(ids_TK)
        self.executed_X += reached_XTK.sum((1, 2))
        # Four-byte numbers first: they stay aligned.
        parts = (ids_TK, routing.weights_TK, x_TD)
        records_TB = torch.cat([part.contiguous().view(torch.uint8) for part in parts], 1)
        rows = None
        if sum(self.rows) <= self._padded_rows:
            sent, coming = [len(x_TD)] * len(self.rows), list(self.rows)
            records_RB = records_TB.repeat(len(sent), 1)
        else:
            # Numbers of rows are needed on the host: the only word from the device.
            rows = [reached_T.nonzero()[:, 0] for reached_T in reached_XTK.any(2)]
            sent = [len(rows_R) for rows_R in rows]
            coming = self._count_coming(sent)
            records_RB = records_TB[torch.cat(rows)]
        found_RB, work = self._transport.swap(records_RB, sent, coming, self._group, "dispatch")
        return Departure(
            rows=rows,
            sent=sent,
            coming=coming,
            records_RB=found_RB,
            work=work,
            like_TD=x_TD,
            weight_on_input=routing.weight_on_input,
            shares=shares,
        )

    def arrive(self, departure: Departure) -> tuple[torch.Tensor, Routing]:
        """The rows that all ranks have sent here, (R, D), and their routing over this rank's experts."""
        self._transport.finish(departure.work)
        like_TD, shares = departure.like_TD, departure.shares
        widths = [4 * shares.top_k, 4 * shares.top_k, like_TD.shape[1] * like_TD.element_size()]
        ids_RB, weights_RB, x_RB = (part.contiguous() for part in departure.records_RB.split(widths, 1))
        ids_RK, weights_RK = ids_RB.view(torch.int32), weights_RB.view(torch.float32)
        routing = shares.on_rank(self._me, ids_RK, weights_RK, departure.weight_on_input)
        return x_RB.view(like_TD.dtype), routing

    def send_back(self, departure: Departure, out_RD: torch.Tensor) -> torch.Tensor:
        """Send the sums of the rows that arrived back; returns those of this rank's rows, float32, (T, D)."""
        sums_RD, work = self._transport.swap(out_RD, departure.coming, departure.sent, self._group, "combine")
        self._transport.finish(work)
        total_TD = torch.zeros_like(departure.like_TD, dtype=torch.float32)
        for number, part_RD in enumerate(sums_RD.split(departure.sent)):
            if departure.rows is None:
                total_TD += part_RD
            else:
                total_TD.index_add_(0, departure.rows[number], part_RD.float())
        return total_TD

    def _count_coming(self, sent: list[int]) -> list[int]:
        """How many rows come from each rank, where so many are sent to each; those without rows say nothing."""
        speaking = [int(rows > 0) for rows in self.rows]
        said = [speaking[self._me]] * len(sent)
        counts = torch.tensor(sent[: sum(said)], dtype=torch.int64, device=self._transport.device)
        found, work = self._transport.swap(counts, said, speaking, self._group, "sizes")
        self._transport.finish(work)
        coming = iter(found.tolist())
        return [next(coming) if speaks else 0 for speaks in speaking]
