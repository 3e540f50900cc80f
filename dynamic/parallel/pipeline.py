"""A decoder whose layers are spread over stages: rows wander from stage to stage, rank 0 decides where they leave.

Rank 0 holds the embedding, the first layers and the LM head; what it sees of rows that are on another stage is a column
of their slots in the cache, int64. All ranks see all messages, and so know where rows are, and which rows' keys and
values are still owed to which stage: these rows travel with the next rows that run there.

Shape suffixes as in ``kernels/types.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...exits.segments import Segment
from ...kernels.types import AttentionBatch, ExitDecision, ExpertBudget, KVLayer
from ..decoder_exits import DecoderExit
from ..outputs import Exchange
from ..spec import ModelSpec
from .decoder import ParallelDecoder, rows_at
from .homes import SharedCache, cache_of, on_device
from .links import StageLinks
from .plan import Message, Operation, leave_message, read_batch, read_leaving
from .shards import Shard
from .stages import budget_part, micro_batches

MOST_OWED = 256  # rows that wait for company on their way to one stage


@dataclass(frozen=True)
class _Debt:
    """Rows that left behind ``after_layers`` layers; the batch, on the host, says where their keys go."""

    after_layers: int
    batch: AttentionBatch

    @property
    def num_rows(self) -> int:
        return len(self.batch.slots_T)


@dataclass(frozen=True)
class _Ran:
    """The rows that this stage ran last, their slots on the host, and what the probe behind them looks at beside."""

    x_TD: torch.Tensor
    slots_T: torch.Tensor
    previous_TD: torch.Tensor | None
    entropy_T: torch.Tensor | None

    def pick(self, slots_R: torch.Tensor) -> torch.Tensor:
        """The rows at some slots, (R, D)."""
        return self.x_TD[rows_at(self.slots_T, slots_R).to(self.x_TD.device)]


class PipelineDecoder(ParallelDecoder):
    """One rank of a decoder in stages; the tensor and expert axes work within each.

    Arguments:
        as for :class:`ParallelDecoder`; layers that this stage lacks are stand-ins.
    """

    def __init__(self, spec: ModelSpec, *arguments: Any, shard: Shard, **more: Any) -> None:
        super().__init__(spec, *arguments, shard=shard, **more)
        self.stages, self.stage = shard.stages, shard.context.stage
        self.read_bytes = shard.read_bytes
        self.links = StageLinks(self.context)
        self._parts = self.context.config.micro_batches or len(self.stages)
        self._ran: dict[int, _Ran] = {}  # by cache
        self._current: Sequence[KVLayer] = ()  # the cache that rows ran on last, and that debts are about
        self._debts: list[list[_Debt]] = [[] for _ in range(len(self.stages) - 1)]  # by the stage that owes
        self._owed: list[torch.Tensor] = []  # rows of the debts of this stage

    @property
    def rows_owed(self) -> int:
        """Rows that left and have not been sent to the stage behind theirs yet."""
        return sum(debt.num_rows for debts in self._debts for debt in debts)

    def exchange(self) -> Exchange:
        """See :meth:`Decoder.exchange`."""
        found = super().exchange()
        back = self.links.bytes_back + self.links.bytes_decided
        return replace(found, received={**found.received, "stages": back})

    def _allocate(self, num_pages: int, page_size: int) -> list[KVLayer]:
        """Layers of other stages have no pages here."""
        layers = super()._allocate(num_pages, page_size)
        none = torch.empty_like(layers[0].keys_BGPC[:0])
        absent = KVLayer(keys_BGPC=none, values_BGPC=none)
        return [layer if number in self.held else absent for number, layer in enumerate(layers)]

    def _copy(self, cache: SharedCache, copies: list[tuple[int, int]]) -> None:
        self._settle()  # what is owed may belong on these pages
        super()._copy(cache, copies)

    def run_segment(
        self,
        segment: Segment,
        x_TD: torch.Tensor,
        kv: Sequence[KVLayer],
        batch: AttentionBatch,
        router_entropy_T: torch.Tensor | None = None,
        budget: ExpertBudget | None = None,
    ) -> torch.Tensor:
        """See :meth:`Decoder.run_segment`; behind a layer of another stage that is not the last: the slots, (T, 1)."""
        message = self._tell_run(segment, kv, batch, router_entropy_T, budget)
        ran_TD = self._run(segment.layers, x_TD, kv, read_batch(message), router_entropy_T, budget)
        return batch.slots_T[:, None] if ran_TD is None else ran_TD

    def decide(
        self,
        exit: DecoderExit,
        x_RD: torch.Tensor,
        thresholds_R: torch.Tensor,
        previous_RD: torch.Tensor | None = None,
        router_entropy_R: torch.Tensor | None = None,
    ) -> ExitDecision:
        """See :meth:`Decoder.decide`; the stage that has the rows evaluates the probe. No logits come with it."""
        stage = self._stage_of(exit)
        if stage == 0:
            return super().decide(exit, x_RD, thresholds_R, previous_RD, router_entropy_R)
        blocks = (thresholds_R.contiguous().view(torch.int32),)
        self._tell(Message(operation=Operation.DECIDE, arguments=(exit.after_layers,), blocks=blocks))
        count = len(thresholds_R)
        found = self.links.collect(stage, (count + 1,), torch.int64)
        nothing = torch.empty(0, device=self.device)
        return ExitDecision(logits_T=nothing, order_T=found[:count], num_staying=int(found[count]))

    def project(self, exit: DecoderExit, x_RD: torch.Tensor, kv: Sequence[KVLayer], batch: AttentionBatch) -> None:
        """See :meth:`Decoder.project`; the stages behind that of the exit write theirs when rows next go there."""
        self.reserve_positions(batch.max_context_len)
        message = leave_message(cache_of(kv).number, exit.after_layers, batch)
        self._tell(message)
        self._leave(exit, x_RD, kv, read_leaving(message))

    def read_out(self, exit: DecoderExit, x_RD: torch.Tensor) -> torch.Tensor:
        """See :meth:`Decoder.read_out`; :meth:`project` was called for these rows, which has sent the results here."""
        if (stage := self._stage_of(exit)) == self.stage:
            return super().read_out(exit, x_RD)
        return self.links.collect(stage, (len(x_RD), self.spec.hidden_size), torch.float32)

    def _obey_run(self, message: Message, kv: list[KVLayer]) -> None:
        batch, layers = read_batch(message), range(*message.arguments[:2])
        self.reserve_positions(batch.max_context_len)
        x_TD: torch.Tensor | None = None
        if layers.start == 0:
            x_TD = self._beginning(message) if self.stage == 0 else None
        elif self.stages.owner(layers.start - 1) == self.stage:
            x_TD = self._ran[message.cache].pick(batch.slots_T)
        self._run(layers, x_TD, kv, batch, *self._read_books(message, batch))

    def _obey_decide(self, message: Message) -> None:
        exit = self.exits[message.arguments[0]]
        if self._stage_of(exit) == self.stage and self.context.rank == 0:
            ran = self._ran[cache_of(self._current).number]
            thresholds_T = message.blocks[0].int().view(torch.float32).to(self.device)
            decision = super().decide(exit, ran.x_TD, thresholds_T, ran.previous_TD, ran.entropy_T)
            self.links.back(torch.cat((decision.order_T, decision.order_T.new_tensor([decision.num_staying]))))
            self.links.wait()

    def _obey_project(self, message: Message, kv: list[KVLayer]) -> None:
        exit = self.exits[message.arguments[0]]
        self.reserve_positions(message.arguments[1])
        batch = read_leaving(message)
        x_RD = None
        if self._stage_of(exit) == self.stage:
            x_RD = self._ran[message.cache].pick(batch.slots_T)
        self._leave(exit, x_RD, kv, batch)

    def _run(
        self,
        layers: range,
        x_TD: torch.Tensor | None,
        kv: Sequence[KVLayer],
        batch: AttentionBatch,
        entropy_T: torch.Tensor | None,
        budget: ExpertBudget | None,
    ) -> torch.Tensor | None:
        """This rank's share of some layers.

        Arguments:
            x_TD: the rows, where this stage has them.
            batch: on the host.

        Returns: the rows behind these layers, where this rank has them; rank 0 has them behind the last one, too.
        """
        if kv is not self._current:
            self._settle()
            self._current = kv
        begin, end = self.stages.owner(max(layers.start - 1, 0)), self.stages.owner(layers.stop - 1)
        arriving = self._move_debts(range(begin, end))
        mine = range(max(layers.start, self.held.start), min(layers.stop, self.held.stop))
        parts = micro_batches(batch, self._parts if self.stages.owner(layers.start) < end else 1)
        ran: list[torch.Tensor] = []
        previous_TD: torch.Tensor | None = None
        for rows, part in parts if begin <= self.stage <= end else ():
            part_budget = budget_part(budget, rows)
            if self.stage == begin:
                assert x_TD is not None
                part_TD = x_TD[rows]
            else:
                part_TD, arriving = self._receive(part, part_budget, arriving, kv), []
            if self.stage == end and self._looks_back(layers.stop):
                previous_TD = part_TD.clone()
            if mine:
                part_TD = self._run_layers(mine, part_TD, kv, part, entropy_T, part_budget)
            if self.stage < end:
                self.links.ahead(_with_books(part_TD, part_budget), self._owed)
                self._owed = []
            else:
                self._send_back(layers.stop, part_TD, part_budget)
                ran.append(part_TD)
        self.links.wait()
        if self.stage == end:
            x_TD = torch.cat(ran) if len(ran) > 1 else ran[0]
            self._ran[cache_of(kv).number] = _Ran(x_TD, batch.slots_T, previous_TD, entropy_T)
            return x_TD
        return self._collect(layers.stop, end, parts, budget) if self.context.leads else None

    def _receive(
        self, batch: AttentionBatch, budget: ExpertBudget | None, debts: list[_Debt], kv: Sequence[KVLayer]
    ) -> torch.Tensor:
        """Rows of the stage before; what comes with them is paid first."""
        running, width = len(batch.slots_T), self.spec.hidden_size
        total = running + sum(debt.num_rows for debt in debts)
        found = self.links.from_behind(total, width + (budget is not None))
        self._pay(debts, found[running:, :width], kv)
        if budget is not None:
            budget.skipped_T.copy_(found[:running, width])
        return found[:running, :width].contiguous()

    def _send_back(self, stop: int, x_TD: torch.Tensor, budget: ExpertBudget | None) -> None:
        """Tell rank 0 what it needs of the rows behind some layers: see :meth:`_collect`."""
        if self.stage and (stop == self.spec.num_layers or budget is not None):
            rows_TD = x_TD if stop == self.spec.num_layers else x_TD[:, :0]
            self.links.back(_with_books(rows_TD, budget))

    def _collect(
        self, stop: int, stage: int, parts: list[tuple[slice, AttentionBatch]], budget: ExpertBudget | None
    ) -> torch.Tensor | None:
        """On rank 0: the rows behind the last layer, and how many experts they did without, of another stage."""
        width = self.spec.hidden_size if stop == self.spec.num_layers else 0
        columns = width + (budget is not None)
        if not columns:
            return None
        shapes = [(len(part.slots_T), columns) for _, part in parts]
        found = torch.cat([self.links.collect(stage, shape, torch.float32) for shape in shapes])
        if budget is not None:
            budget.skipped_T.copy_(found[:, width])
        return found[:, :width].contiguous() if width else None

    def _leave(
        self, exit: DecoderExit, x_RD: torch.Tensor | None, kv: Sequence[KVLayer], batch: AttentionBatch
    ) -> None:
        """Rows leave: their stage pays for its own layers and hands rank 0 the read-out; the others will hear of it."""
        stage, debt = self._stage_of(exit), _Debt(exit.after_layers, batch)
        if stage == self.stage:
            assert x_RD is not None
            if stage and self.context.rank == 0:
                self.links.back(super().read_out(exit, x_RD))
            self._pay([debt], x_RD, kv)
        if stage < len(self._debts):
            self._debts[stage].append(debt)
            if sum(debt.num_rows for debt in self._debts[stage]) > MOST_OWED:
                self._settle()
        self.links.wait()

    def _pay(self, debts: list[_Debt], x_RD: torch.Tensor, kv: Sequence[KVLayer]) -> None:
        """Write this stage's keys and values of rows that left; keep the rows for the next stage."""
        counts = [debt.num_rows for debt in debts]
        for debt, rows_RD in zip(debts, x_RD.split(counts), strict=True):
            exit = self.exits[debt.after_layers]
            self.reserve_positions(debt.batch.max_context_len)
            own_W, own = cache_of(kv).own_rows(debt.batch)
            if exit.projections and len(own_W):
                behind = kv[max(exit.after_layers, self.held.start) : self.held.stop]
                self._project(exit, rows_RD[own_W.to(self.device)], behind, on_device(own, self.device))
            if self.stage < len(self._debts):
                self._owed.append(rows_RD)

    def _move_debts(self, crossed: range) -> list[_Debt]:
        """Debts go along with rows that cross from these stages to the next; returns those that arrive here."""
        arriving: list[_Debt] = []
        for stage in crossed:
            moved, self._debts[stage] = self._debts[stage], []
            if stage + 1 == self.stage:
                arriving = moved
            if stage + 1 < len(self._debts):
                self._debts[stage + 1] += moved
        return arriving

    def _settle(self) -> None:
        """Let all debts travel now, alone."""
        begin = next((stage for stage, debts in enumerate(self._debts) if debts), len(self._debts))
        crossed = range(begin, len(self._debts))
        arriving = self._move_debts(crossed)
        width = self.spec.hidden_size
        if arriving:
            self._pay(arriving, self.links.from_behind(sum(debt.num_rows for debt in arriving), width), self._current)
        if self.stage in crossed:
            self.links.ahead(torch.empty(0, width, device=self.device), self._owed)
            self._owed = []
        self.links.wait()

    def _forget(self, cache: int) -> None:
        self._ran.pop(cache, None)

    def _stage_of(self, exit: DecoderExit) -> int:
        return self.stages.owner(exit.after_layers - 1)

    def _looks_back(self, stop: int) -> bool:
        """Whether the probe behind some layers compares their rows with those in front of them."""
        exit = self.exits.get(stop)
        return exit is not None and exit.probe is not None and exit.probe.previous


def _with_books(x_TD: torch.Tensor, budget: ExpertBudget | None) -> torch.Tensor:
    """Rows, with a column of how many experts they did without so far where they are on a budget."""
    return x_TD if budget is None else torch.cat((x_TD, budget.skipped_T.float()[:, None]), 1)
