"""The all-to-all exchange of a mixture: rows are dispatched to the ranks that hold their experts, and
partial sums are combined.

A row is sent once to every rank that holds at least one of its experts: its hidden vector in the activations' dtype,
and the numbers and weights of its slots. Each rank returns the sum over its slots, and the row's own rank adds these
sums in the order of the ranks, in float32. The result depends neither on timing nor on other rows.

Steps of few rows are sent padded: every rank gets room for all rows of every KV shard. These sizes are known
beforehand, so no count is read from the device. Larger steps send only the rows needed, after their numbers.

Shape suffixes as in ``moe/dispatch.py``; R rows that are sent, B bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from ..kernels.api.types import Routing
from .dispatch import ExpertShares, used_ids


@dataclass(frozen=True, kw_only=True)
class PendingDispatch:
    """A dispatch that has begun: rows sent to the ranks of their experts.

    Arguments:
        rows: of this rank, by the rank they are sent to, int64; None: all to all.
        sent, received: numbers of rows to and from each rank.
        records_RB: what this rank receives, complete once ``work`` is done.
        like_TD: this rank's rows.
        weight_on_input: of the routing, see :class:`Routing`; shares: of the layer.
        reached_XTK: bool, which rank runs which slots of this rank's rows; slots_X: int64, how many each runs.
    """

    rows: list[torch.Tensor] | None
    sent: list[int]
    received: list[int]
    records_RB: torch.Tensor
    work: Any
    like_TD: torch.Tensor
    weight_on_input: bool
    shares: ExpertShares
    reached_XTK: torch.Tensor
    slots_X: torch.Tensor


class Received(NamedTuple):
    """What other ranks have for this rank's experts.

    Arguments:
        rows: (R, D), and their routing over the experts here.
        counts: how many results go back to each rank.
    """

    rows: torch.Tensor
    routing: Routing
    counts: list[int]


class Transport(Protocol):
    """Moves rows between the ranks of a process group."""

    device: torch.device

    def swap(
        self, rows: torch.Tensor, sent: Sequence[int], received: Sequence[int], group: Any, purpose: str, /
    ) -> tuple[torch.Tensor, Any]:
        """Begin an all-to-all: send every rank its part of some rows, and receive what all ranks have for this one."""
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
        padded_rows: steps of at most so many rows, those of all KV shards that share experts together, are sent padded.

    Attributes:
        rows: of each rank of the expert axis, in the segment that runs now.
        executed_X: int64, slots of this rank's rows in this segment by the rank that ran them.
    """

    def __init__(self, transport: Transport, axis: ExpertAxis, padded_rows: int) -> None:
        self._transport = transport
        self._axis = axis
        self._padded_rows = padded_rows
        self.rows: Sequence[int] = ()
        self.executed_X = torch.zeros(axis.size if axis.size > 1 else 0, dtype=torch.int64, device=transport.device)

    def begin(self, shard_rows: Sequence[int]) -> None:
        """A segment begins, with so many rows in each KV shard of the stage."""
        self.rows = shard_rows[self._axis.first : self._axis.first + self._axis.size]
        self.executed_X.zero_()

    def dispatch(self, x_TD: torch.Tensor, routing: Routing, shares: ExpertShares) -> PendingDispatch:
        """Begin to send this rank's rows to the ranks of their experts; :meth:`receive` waits for those sent here."""
        ids_TK = used_ids(routing)
        reached_XTK = shares.reached(ids_TK, x_TD)
        slots_X = reached_XTK.sum((1, 2))
        self.executed_X += slots_X
        # Four-byte numbers first: they stay aligned.
        parts = (ids_TK, routing.weights_TK, x_TD)
        records_TB = torch.cat([part.contiguous().view(torch.uint8) for part in parts], 1)
        rows = None
        if sum(self.rows) <= self._padded_rows:
            sent, received = [len(x_TD)] * len(self.rows), list(self.rows)
            records_RB = records_TB.repeat(len(sent), 1)
        else:
            # The host needs the numbers of rows: the only synchronisation with the device.
            rows = [reached_T.nonzero()[:, 0] for reached_T in reached_XTK.any(2)]
            sent = [len(rows_R) for rows_R in rows]
            received = self._count_received(sent)
            records_RB = records_TB[torch.cat(rows)]
        found_RB, work = self._transport.swap(records_RB, sent, received, self._axis.group, "dispatch")
        return PendingDispatch(
            rows=rows,
            sent=sent,
            received=received,
            records_RB=found_RB,
            work=work,
            like_TD=x_TD,
            weight_on_input=routing.weight_on_input,
            shares=shares,
            reached_XTK=reached_XTK,
            slots_X=slots_X,
        )

    def receive(self, pending: PendingDispatch) -> Received:
        """Wait for the rows sent to this rank, and their routing over its experts."""
        x_RD, ids_RK, weights_RK = self._records(pending)
        routing = pending.shares.on_rank(self._axis.rank, ids_RK, weights_RK, pending.weight_on_input)
        return Received(x_RD, routing, pending.received)

    def _records(self, pending: PendingDispatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Wait for the rows sent to this rank, (R, D), with the experts and weights of their slots, (R, K)."""
        self._transport.finish(pending.work)
        like_TD, shares = pending.like_TD, pending.shares
        widths = [4 * shares.top_k, 4 * shares.top_k, like_TD.shape[1] * like_TD.element_size()]
        ids_RB, weights_RB, x_RB = (part.contiguous() for part in pending.records_RB.split(widths, 1))
        return x_RB.view(like_TD.dtype), ids_RB.view(torch.int32), weights_RB.view(torch.float32)

    def combine(self, pending: PendingDispatch, received: Received, out_RD: torch.Tensor) -> torch.Tensor:
        """Return the sums of received rows to their ranks; gives the totals of this rank's rows, float32, (T, D)."""
        sums_RD, work = self._transport.swap(out_RD, received.counts, pending.sent, self._axis.group, "combine")
        self._transport.finish(work)
        total_TD = torch.zeros_like(pending.like_TD, dtype=torch.float32)
        for number, part_RD in enumerate(sums_RD.split(pending.sent)):
            if pending.rows is None:
                total_TD += part_RD
            else:
                total_TD.index_add_(0, pending.rows[number], part_RD.float())
        return total_TD

    def _count_received(self, sent: list[int]) -> list[int]:
        """How many rows each rank sends here, given how many are sent to each; ranks without rows send no counts."""
        has_rows = [int(rows > 0) for rows in self.rows]
        sizes = [has_rows[self._axis.rank]] * len(sent)
        counts = torch.tensor(sent[: sum(sizes)], dtype=torch.int64, device=self._transport.device)
        found, work = self._transport.swap(counts, sizes, has_rows, self._axis.group, "sizes")
        self._transport.finish(work)
        received = iter(found.tolist())
        return [next(received) if sends else 0 for sends in has_rows]
