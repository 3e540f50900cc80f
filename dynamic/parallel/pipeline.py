"""A decoder whose layers are spread over stages: rows go from stage to stage, rank 0 decides where they exit.

Rank 0 holds the embedding, the first layers and the LM head; what it sees of rows that are on another stage is a column
of their slots in the cache, int64. All ranks see all messages, and so know where rows are, and whose
KV writes a stage has deferred: these rows are sent with the next row of their sequence that runs there, if any.

Shape suffixes as in ``kernels/api/types.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ...kernels.api.types import AttentionBatch, ExitDecision, ExpertBudget, KVLayer
from ..model.counters import Exchange
from ..model.exits import DecoderExit
from ..model.kv_cache import Copies
from ..model.spec import ModelSpec
from .data_ranks import SharedCache, cache_of
from .decoder import ParallelDecoder
from .deferred_kv import DeferredRow, DeferredWrites, exited_rows, slots_read, take_vectors
from .plan import Message, Operation, rows_to_write
from .shards import Shard
from .stage_links import StageLinks
from .stages import budget_part, micro_batches

MAX_DEFERRED = 4096  # rows of a cache that wait in front of one stage; vectors of memory


class PipelineDecoder(ParallelDecoder):
    """One rank of a decoder in stages; the tensor and expert axes work within each.

    Arguments:
        as for :class:`ParallelDecoder`; layers that this stage lacks are stand-ins.
    """

    def __init__(self, spec: ModelSpec, *arguments: Any, shard: Shard, **more: Any) -> None:
        super().__init__(spec, *arguments, shard=shard, **more)
        self.read_bytes = shard.read_bytes
        self.links = StageLinks(self.context)
        self._parts = self.context.config.micro_batches or len(self.stages)
        # Recurrent states are advanced in the order of the positions: by no row before one that came earlier. And where
        # layers see a window only, a page may be another's before a row comes that would have the writes done.
        self._max_deferred = 0 if spec.has_states or len(spec.page_windows) > 1 else MAX_DEFERRED
        # What this stage ran last: the rows, and what the probe behind them looks at beside.
        self._probed: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None = None
        self._deferred: dict[int, list[DeferredWrites]] = {}  # by cache, between each stage and the next

    @property
    def unsent_rows(self) -> list[int]:
        """By stage: rows that exited and were not sent to the next one: not yet, or not needed there any more."""
        by_stage = zip(*self._deferred.values(), strict=True)
        return [sum(len(writes) + writes.dropped for writes in caches) for caches in by_stage]

    def exchange(self) -> Exchange:
        """See :meth:`Decoder.exchange`."""
        found = super().exchange()
        back = self.links.bytes_back + self.links.bytes_decided
        return replace(found, received={**found.received, "stages": back})

    def _allocate(self, pages: Sequence[int], page_size: int, num_states: int) -> list[KVLayer]:
        """Layers of other stages have no pages here."""
        layers = super()._allocate(pages, page_size, num_states)
        none = torch.empty_like(layers[0].keys_BGPC[:0])
        absent = KVLayer(keys_BGPC=none, values_BGPC=none)
        return [layer if number in self.held else absent for number, layer in enumerate(layers)]

    def _copy(self, cache: SharedCache, states: Copies, *copies: Copies) -> None:
        self._write_now(cache, dict.fromkeys((source for source, _ in copies[0]), cache.page_size))
        for writes in self._deferred_writes(cache):
            writes.drop(target for _, target in copies[0])
        super()._copy(cache, states, *copies)

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

    def apply_exit_head(self, exit: DecoderExit, x_RD: torch.Tensor) -> torch.Tensor:
        """See :meth:`Decoder.apply_exit_head`; :meth:`propagate_kv` for these rows has sent the results here."""
        if (stage := self._stage_of(exit)) == self.stage:
            return super().apply_exit_head(exit, x_RD)
        return self.links.collect(stage, (len(x_RD), self.spec.hidden_size), torch.float32)

    def _obey_decide(self, message: Message) -> None:
        exit = self.exits[message.arguments[0]]
        if self._stage_of(exit) == self.stage and self.context.rank == 0:
            assert self._probed is not None, "rows ran before"
            x_TD, previous_TD, entropy_T = self._probed
            thresholds_T = message.blocks[0].int().view(torch.float32).to(self.device)
            decision = super().decide(exit, x_TD, thresholds_T, previous_TD, entropy_T)
            self.links.back(torch.cat((decision.order_T, decision.order_T.new_tensor([decision.num_staying]))))
            self.links.wait()

    def _run_layers(
        self,
        layers: range,
        x_TD: torch.Tensor | None,
        kv: Sequence[KVLayer],
        batch: AttentionBatch,
        entropy_T: torch.Tensor | None,
        budget: ExpertBudget | None,
    ) -> torch.Tensor | None:
        cache = cache_of(kv)
        if layers.start == 0:
            for writes in filter(None, self._deferred_writes(cache)):
                writes.overwrite(batch.slots_T.tolist())
        begin, end = self.stages.owner(max(layers.start - 1, 0)), self.stages.owner(layers.stop - 1)
        waiting = any(self._deferred_writes(cache)[begin:end])
        slots = slots_read(batch, cache.page_size) if waiting else {}
        arriving, departing = self._move_deferred(cache, range(begin, end), slots)
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
                ran_TD = super()._run_layers(mine, part_TD, kv, part, entropy_T, part_budget)
                assert ran_TD is not None
                part_TD = ran_TD
            if self.stage < end:
                deferred_RD, departing = take_vectors(departing, self.spec.hidden_size, self.device), []
                self.links.ahead(_with_counters(part_TD, part_budget), deferred_RD)
            else:
                self._send_back(layers.stop, part_TD, part_budget)
                ran.append(part_TD)
        self.links.wait()
        if self.stage == end:
            x_TD = torch.cat(ran) if len(ran) > 1 else ran[0]
            self._probed = x_TD, previous_TD, entropy_T
            return x_TD
        return self._collect(layers.stop, end, parts, budget) if self.context.leads else None

    def _receive(
        self, batch: AttentionBatch, budget: ExpertBudget | None, deferred: list[DeferredRow], kv: Sequence[KVLayer]
    ) -> torch.Tensor:
        """Rows of the stage before; those that come with them for their keys and values are written first."""
        running, width = len(batch.slots_T), self.spec.hidden_size
        found = self.links.from_behind(running + len(deferred), width + (budget is not None))
        self._write_deferred(deferred, found[running:, :width], kv)
        if budget is not None:
            budget.skipped_T.copy_(found[:running, width])
        return found[:running, :width].contiguous()

    def _send_back(self, stop: int, x_TD: torch.Tensor, budget: ExpertBudget | None) -> None:
        """Tell rank 0 what it needs of the rows behind some layers: see :meth:`_collect`."""
        if self.stage and (stop == self.spec.num_layers or budget is not None):
            rows_TD = x_TD if stop == self.spec.num_layers else x_TD[:, :0]
            self.links.back(_with_counters(rows_TD, budget))

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

    def _exit(self, exit: DecoderExit, x_RD: torch.Tensor | None, kv: Sequence[KVLayer], batch: AttentionBatch) -> None:
        """Rows exit: their stage writes its own layers and hands rank 0 the exit head's result; the others defer."""
        stage, between = self._stage_of(exit), self._deferred_writes(cache_of(kv))
        if stage == self.stage:
            assert x_RD is not None
            if stage and self.context.rank == 0:
                self.links.back(super().apply_exit_head(exit, x_RD))
            self._write(exit, x_RD, kv, batch)
        if stage < len(between):
            between[stage].add(exited_rows(batch, exit.after_layers, x_RD))
            if len(between[stage]) > self._max_deferred:
                self._write_now(cache_of(kv))
        self.links.wait()

    def _write_deferred(self, deferred: list[DeferredRow], x_RD: torch.Tensor, kv: Sequence[KVLayer]) -> None:
        """Write this stage's KV of rows that exited on an earlier one; the vectors are kept for the next."""
        if self.stage < len(self.stages) - 1:
            for row, x_D in zip(deferred, x_RD.clone(), strict=True):
                row.x_D = x_D
        for after_layers in sorted({row.after_layers for row in deferred}):
            here = [number for number, row in enumerate(deferred) if row.after_layers == after_layers]
            places = [deferred[number].place for number in here]
            positions_R, slots_R, states_R, *groups = torch.tensor(places).T.contiguous()
            states = states_R if self.spec.has_states else None
            batch = rows_to_write(positions_R, slots_R, int(positions_R.max()), states, groups)
            self._write(self.exits[after_layers], x_RD[torch.tensor(here, device=x_RD.device)], kv, batch)

    def _move_deferred(
        self, cache: SharedCache, crossed: range, slots: dict[int, int] | None
    ) -> tuple[list[DeferredRow], list[DeferredRow]]:
        """Deferred rows at some slots go along from these stages to the next; those that arrive here and that go on."""
        between = self._deferred_writes(cache)
        moving: list[DeferredRow] = []
        arriving, departing = moving, moving
        for stage in crossed:
            moving = between[stage].take(slots) + moving
            if stage == self.stage:
                departing = moving
            if stage + 1 == self.stage:
                arriving = moving
        if crossed and crossed.stop < len(between):
            between[crossed.stop].add(moving)
        return arriving, departing

    def _write_now(self, cache: SharedCache, slots: dict[int, int] | None = None) -> None:
        """Send and write what is deferred at some slots, or all, without waiting for a row that reads it."""
        arriving, departing = self._move_deferred(cache, range(len(self.stages) - 1), slots)
        width = self.spec.hidden_size
        if arriving:
            self._write_deferred(arriving, self.links.from_behind(len(arriving), width), cache)
        if departing:
            deferred_RD = take_vectors(departing, width, self.device)
            self.links.ahead(deferred_RD[:0], deferred_RD)
        self.links.wait()

    def _deferred_writes(self, cache: SharedCache) -> list[DeferredWrites]:
        if cache.number not in self._deferred:
            self._deferred[cache.number] = [DeferredWrites(cache.page_size) for _ in range(len(self.stages) - 1)]
        return self._deferred[cache.number]

    def _forget(self, cache: int) -> None:
        super()._forget(cache)
        self._deferred.pop(cache, None)

    def _looks_back(self, stop: int) -> bool:
        """Whether the probe behind some layers compares their rows with those in front of them."""
        exit = self.exits.get(stop)
        return exit is not None and exit.probe is not None and exit.probe.previous


def _with_counters(x_TD: torch.Tensor, budget: ExpertBudget | None) -> torch.Tensor:
    """Rows, with a column of how many experts they did without so far where they are on a budget."""
    return x_TD if budget is None else torch.cat((x_TD, budget.skipped_T.float()[:, None]), 1)
