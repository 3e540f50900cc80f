"""A decoder whose layers are spread over stages: rows wander from stage to stage, rank 0 decides where they leave.

Rank 0 holds the embedding, the first layers and the LM head; what it sees of rows that are on another stage is a column
of their slots in the cache, int64. All ranks see all messages, and so know where rows are, and which rows' keys and
values are still owed to which stage: these rows travel with the next row of their sequence that runs there, if any.

Shape suffixes as in ``kernels/api/types.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...exits.segments import Segment
from ...kernels.api.types import AttentionBatch, ExitDecision, ExpertBudget, KVLayer
from ..model.counters import Exchange
from ..model.exits import DecoderExit
from ..model.spec import ModelSpec
from .data_ranks import SharedCache, cache_of, on_device
from .decoder import ParallelDecoder, rows_at
from .deferred_kv import Debts, OwedRow, rows_that_leave, slots_read, vectors_of
from .plan import Message, Operation, leave_message, read_batch, read_leaving, rows_to_write
from .shards import Shard
from .stage_links import StageLinks
from .stages import budget_part, micro_batches

MOST_OWED = 4096  # rows of a cache that wait in front of one stage; vectors of memory


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
        self._last = 0  # the cache that rows ran on last
        self._debts: dict[int, list[Debts]] = {}  # by cache, between each stage and the next

    @property
    def unsent_rows(self) -> list[int]:
        """By stage: rows that left and were not sent to the next one: not yet, or not needed there any more."""
        books = zip(*self._debts.values(), strict=True)
        return [sum(len(debts) + debts.forgiven for debts in border) for border in books]

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
        sources, targets = zip(*copies, strict=True)
        self._settle(cache, dict.fromkeys(sources, cache[0].page_size))
        for debts in self._borders(cache):
            debts.forgive(targets)
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
            ran = self._ran[self._last]
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
        cache = cache_of(kv)
        self._last = cache.number
        if layers.start == 0:
            for debts in filter(None, self._borders(cache)):
                debts.overwrite(batch.slots_T.tolist())
        begin, end = self.stages.owner(max(layers.start - 1, 0)), self.stages.owner(layers.stop - 1)
        owing = any(self._borders(cache)[begin:end])
        slots = slots_read(batch, cache[0].page_size) if owing else {}
        arriving, leaving = self._move_debts(cache, range(begin, end), slots)
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
                owed_RD, leaving = vectors_of(leaving, self.spec.hidden_size, self.device), []
                self.links.ahead(_with_books(part_TD, part_budget), owed_RD)
            else:
                self._send_back(layers.stop, part_TD, part_budget)
                ran.append(part_TD)
        self.links.wait()
        if self.stage == end:
            x_TD = torch.cat(ran) if len(ran) > 1 else ran[0]
            self._ran[cache.number] = _Ran(x_TD, batch.slots_T, previous_TD, entropy_T)
            return x_TD
        return self._collect(layers.stop, end, parts, budget) if self.context.leads else None

    def _receive(
        self, batch: AttentionBatch, budget: ExpertBudget | None, owed: list[OwedRow], kv: Sequence[KVLayer]
    ) -> torch.Tensor:
        """Rows of the stage before; those that come with them for their keys and values are written first."""
        running, width = len(batch.slots_T), self.spec.hidden_size
        found = self.links.from_behind(running + len(owed), width + (budget is not None))
        self._write_owed(owed, found[running:, :width], kv)
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
        """Rows leave: their stage writes for its own layers and hands rank 0 the read-out; the others write it down."""
        stage, borders = self._stage_of(exit), self._borders(cache_of(kv))
        if stage == self.stage:
            assert x_RD is not None
            if stage and self.context.rank == 0:
                self.links.back(super().read_out(exit, x_RD))
            self._write(exit, x_RD, kv, batch)
        if stage < len(borders):
            borders[stage].add(rows_that_leave(batch, exit.after_layers, x_RD))
            if len(borders[stage]) > MOST_OWED:
                self._settle(cache_of(kv))
        self.links.wait()

    def _write_owed(self, owed: list[OwedRow], x_RD: torch.Tensor, kv: Sequence[KVLayer]) -> None:
        """Write this stage's keys and values of rows that left on an earlier one; the vectors are kept for the next."""
        if self.stage < len(self.stages) - 1:
            for row, x_D in zip(owed, x_RD.clone(), strict=True):
                row.x_D = x_D
        for after_layers in sorted({row.after_layers for row in owed}):
            here = [number for number, row in enumerate(owed) if row.after_layers == after_layers]
            places = [(owed[number].position, owed[number].slot) for number in here]
            positions_R, slots_R = torch.tensor(places).T.contiguous()
            batch = rows_to_write(positions_R, slots_R, int(positions_R.max()) + 1)
            self._write(self.exits[after_layers], x_RD[torch.tensor(here, device=x_RD.device)], kv, batch)

    def _write(self, exit: DecoderExit, x_RD: torch.Tensor, kv: Sequence[KVLayer], batch: AttentionBatch) -> None:
        """Write this stage's keys and values of rows that left, for its layers behind their exit."""
        self.reserve_positions(batch.max_context_len)
        own_W, own = cache_of(kv).own_rows(batch)
        if exit.projections and len(own_W):
            behind = kv[max(exit.after_layers, self.held.start) : self.held.stop]
            self._project(exit, x_RD[own_W.to(self.device)], behind, on_device(own, self.device))

    def _move_debts(
        self, cache: SharedCache, crossed: range, slots: dict[int, int] | None
    ) -> tuple[list[OwedRow], list[OwedRow]]:
        """Owed rows at some slots go along from these stages to the next; those that arrive here and that go on."""
        borders = self._borders(cache)
        moving: list[OwedRow] = []
        arriving, leaving = moving, moving
        for stage in crossed:
            moving = borders[stage].take(slots) + moving
            if stage == self.stage:
                leaving = moving
            if stage + 1 == self.stage:
                arriving = moving
        if crossed and crossed.stop < len(borders):
            borders[crossed.stop].add(moving)
        return arriving, leaving

    def _settle(self, cache: SharedCache, slots: dict[int, int] | None = None) -> None:
        """Let the rows that are owed at some slots, or all, travel now, alone."""
        arriving, leaving = self._move_debts(cache, range(len(self.stages) - 1), slots)
        width = self.spec.hidden_size
        if arriving:
            self._write_owed(arriving, self.links.from_behind(len(arriving), width), cache)
        if leaving:
            owed_RD = vectors_of(leaving, width, self.device)
            self.links.ahead(owed_RD[:0], owed_RD)
        self.links.wait()

    def _borders(self, cache: SharedCache) -> list[Debts]:
        if cache.number not in self._debts:
            self._debts[cache.number] = [Debts(cache[0].page_size) for _ in range(len(self.stages) - 1)]
        return self._debts[cache.number]

    def _forget(self, cache: int) -> None:
        self._ran.pop(cache, None)
        self._debts.pop(cache, None)

    def _stage_of(self, exit: DecoderExit) -> int:
        return self.stages.owner(exit.after_layers - 1)

    def _looks_back(self, stop: int) -> bool:
        """Whether the probe behind some layers compares their rows with those in front of them."""
        exit = self.exits.get(stop)
        return exit is not None and exit.probe is not None and exit.probe.previous


def _with_books(x_TD: torch.Tensor, budget: ExpertBudget | None) -> torch.Tensor:
    """Rows, with a column of how many experts they did without so far where they are on a budget."""
    return x_TD if budget is None else torch.cat((x_TD, budget.skipped_T.float()[:, None]), 1)
