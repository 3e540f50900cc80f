"""A decoder whose weights are spread over ranks: rank 0 is called as any decoder, the others follow its messages.

Rows are known by their slots in the cache: a message names those that go on, and every rank picks them out of what it
has. So it is rank 0 alone that decides which rows exit. Each KV shard runs its own rows (:mod:`.data_ranks`), and all
ranks of a stage have all rows again behind every segment.

Shape suffixes as in ``kernels/api/types.py``; W rows of a KV shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any
from weakref import finalize

import torch
import torch.nn.functional as F

from ...exits.segments import Segment
from ...kernels.api.types import AttentionBatch, ExpertBudget, KVLayer, Routing
from ...moe.placement import ExpertLoad
from ..model.counters import Exchange
from ..model.decoder import Behind, Decoder
from ..model.exits import DecoderExit
from ..model.kv_cache import Copies
from ..model.routing import read_by_experts
from ..model.spec import ModelSpec
from .data_ranks import SharedCache, cache_of, on_device, rows_at, share_rows, spread
from .expert_ranks import ExpertRanks
from .norms import norm_over_ranks, propagate_over_ranks, spread_norms
from .plan import (
    Message,
    Operation,
    allocate_message,
    copy_message,
    exit_message,
    read_batch,
    read_budget,
    read_copies,
    read_exited,
    run_message,
)
from .shards import Shard, part_of, record_load, width
from .stages import make_held_stack, parts_added_up


class ParallelDecoder(Decoder):
    """One rank of a decoder.

    Arguments:
        shard: which part of the model this rank holds; others as for :class:`Decoder`.
    """

    def __init__(self, spec: ModelSpec, *arguments: Any, shard: Shard, **more: Any) -> None:
        self._local_spec = shard.spec
        super().__init__(spec, *arguments, **more)
        self.context = shard.context
        self.processes = str(shard.context.config) + shard.placed
        config = shard.context.config
        self.kv_shards = config.kv_shards
        self.stages, self.stage, self.held = shard.stages, self.context.stage, shard.held
        self.load = ExpertLoad(shard.whole.experts_by_layer, self.device)
        self.experts = ExpertRanks(shard, self.backend, self.layers)
        self._exchange, self._shares = self.experts.exchange, self.experts.shares
        self._executed_X = torch.zeros_like(self._exchange.executed_X)  # of all KV shards
        self._spread_norms = spread_norms(shard)
        shared = self.context.shared_tensor_group
        alone = not self._shares and self._spread_norms is None and config.record_load is None
        added_up = config.tensor == 1 or shared is not None  # attention's and the experts' results
        self._held_stack = make_held_stack(self, self.held, shared) if alone and added_up else None
        self.vocabulary = shard.vocabulary
        self._token_ids_T: torch.Tensor | None = None
        self._embedded_TD: torch.Tensor | None = None  # of a worker: rows that the next layer 0 runs
        self._caches = 0  # allocated so far
        self._dropped: list[int] = []  # caches that rank 0 has no use for any more, and workers still hold
        self._ran: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of a worker, by cache: last rows, their slots

    def allocate_cache(
        self, num_pages: int, page_size: int, kv_shards: int = 1, num_states: int = 1, window_pages: Sequence[int] = ()
    ) -> list[KVLayer]:
        """See :meth:`Decoder.allocate_cache`; on all ranks. Workers' shares go with rank 0's. Every rank has all slots
        of states, and uses those of its KV shard's sequences."""
        self._caches += 1
        kv_shard, pages = self.context.kv_shard, [count // kv_shards for count in (num_pages, *window_pages)]
        layers = self._allocate(pages if kv_shard < kv_shards else [0] * len(pages), page_size, num_states)
        cache = SharedCache(layers, self._caches, pages, kv_shard, page_size)
        self._tell(allocate_message(cache.number, (num_pages, page_size, kv_shards, num_states), window_pages))
        if self.context.leads:
            finalize(cache, self._dropped.append, cache.number)
        return cache

    def _allocate(self, pages: Sequence[int], page_size: int, num_states: int) -> list[KVLayer]:
        return super().allocate_cache(pages[0], page_size, num_states=num_states, window_pages=pages[1:])

    def copy_pages(self, kv: list[KVLayer], *copies: Copies, states: Copies = ()) -> None:
        """See :meth:`Decoder.copy_pages`; on all ranks."""
        self._tell(copy_message(cache_of(kv).number, states, *copies))
        self._copy(cache_of(kv), states, *copies)

    def _copy(self, cache: SharedCache, states: Copies, *copies: Copies) -> None:
        super().copy_pages(cache.held(self.held), *cache.own_copies(*copies), states=states)

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """See :meth:`Decoder.embed`; the ids are sent in the first segment's message, where no rank needs another's
        embeddings."""
        if self.context.config.tensor == 1:
            self._token_ids_T = token_ids_T
            return super().embed(token_ids_T)
        self._tell(Message(operation=Operation.EMBED, blocks=(token_ids_T,)))
        return self._embed_together(token_ids_T)

    def _embed_together(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """Every rank looks up the tokens that it keeps; the others' rows are zeros, so that the sum is exact."""
        kept_T = (token_ids_T >= self.vocabulary.start) & (token_ids_T < self.vocabulary.stop)
        x_TD = super().embed((token_ids_T - self.vocabulary.start).where(kept_T, 0))
        return self.context.sum(x_TD * kept_T[:, None], self.context.tensor_group, "embedding")

    def logits(self, x_RD: torch.Tensor) -> torch.Tensor:
        """See :meth:`Decoder.logits`; the ranks that split the vocabulary each make their columns."""
        if self.context.config.tensor == 1:
            return super().logits(x_RD)
        self._tell(Message(operation=Operation.LOGITS, arguments=(len(x_RD),)))
        return self._logits_together(x_RD.contiguous())

    @torch.inference_mode()
    def _logits_together(self, x_RD: torch.Tensor) -> torch.Tensor:
        """On rank 0 the logits, elsewhere nothing of use."""
        group, tensor = self.context.tensor_group, self.context.config.tensor
        self.context.share(x_RD, group)
        part_RV = super().logits(x_RD)
        columns = [width(part_of(self.spec.vocab_size, tensor, rank)) for rank in range(tensor)]
        parts = self.context.collect(F.pad(part_RV, (0, columns[0] - part_RV.shape[1])), group)
        if not parts:
            return part_RV
        return torch.cat([part[:, :count] for part, count in zip(parts, columns, strict=True)], 1)

    def run_segment(
        self,
        segment: Segment,
        x_TD: torch.Tensor,
        kv: Sequence[KVLayer],
        batch: AttentionBatch,
        router_entropy_T: torch.Tensor | None = None,
        budget: ExpertBudget | None = None,
    ) -> torch.Tensor:
        """See :meth:`Decoder.run_segment`; all ranks run it. The slots, (T, 1), stand for rows on another stage."""
        self.reserve_positions(batch.num_positions)  # refused before anybody is told
        if segment.layers.start == 0 and (move := self.experts.next_move()) is not None:
            self._tell(move)
            self.experts.obey(move)
        entropy, number = router_entropy_T is not None, cache_of(kv).number
        message = run_message(number, segment.layers, self._token_ids_T, batch, budget, entropy)
        self._tell(message)
        self._token_ids_T = None
        ran_TD = self._run_layers(segment.layers, x_TD, kv, read_batch(message), router_entropy_T, budget)
        return batch.slots_T[:, None] if ran_TD is None else ran_TD

    @torch.inference_mode()
    def _run_layers(
        self,
        layers: range,
        x_TD: torch.Tensor | None,
        kv: Sequence[KVLayer],
        batch: AttentionBatch,
        entropy_T: torch.Tensor | None,
        budget: ExpertBudget | None,
    ) -> torch.Tensor | None:
        """This rank's share of some layers, of rows that all ranks of the stage have.

        Arguments:
            x_TD: the rows, where this stage has them.
            batch: on the host.

        Returns: the rows behind these layers, where this rank has them; rank 0 has them behind the last one, too.
        """
        assert x_TD is not None, "the first of these layers is here"
        cache = cache_of(kv)
        if self.kv_shards == 1:
            return self._run_own(layers, x_TD, cache, batch, entropy_T, budget)
        found = spread(batch, cache, self.kv_shards)
        own_W = found.rows[cache.kv_shard].to(self.device)
        x_WD, entropy_W = x_TD[own_W], None if entropy_T is None else entropy_T[own_W]
        own_budget = None if budget is None else budget.of_rows(own_W)
        self._exchange.begin(found.counts)
        if found.own is not None:
            x_WD = self._run_own(layers, x_WD, cache, found.own, entropy_W, own_budget)
        elif any(self._exchange.rows):
            self._lend_experts(layers)
        columns = [entropy_W, None if own_budget is None else own_budget.skipped_T.float()]
        own_WY = torch.cat((x_WD, *(column_W[:, None] for column_W in columns if column_W is not None)), 1)
        rows_TY, executed_X = share_rows(self.context, own_WY, self._exchange.executed_X, found)
        self._executed_X += executed_X
        if entropy_T is not None:
            entropy_T.copy_(rows_TY[:, x_TD.shape[1]])
        if budget is not None:
            budget.skipped_T.add_(rows_TY[:, -1].long())
        return rows_TY[:, : x_TD.shape[1]].contiguous()

    def _run_own(
        self,
        layers: range,
        x_WD: torch.Tensor,
        cache: SharedCache,
        batch: AttentionBatch,
        entropy_W: torch.Tensor | None,
        budget: ExpertBudget | None,
    ) -> torch.Tensor:
        """Run the rows of this rank's KV shard."""
        batch = on_device(batch, self.device)
        if self._held_stack is None:
            return super().run_segment(Segment(index=0, layers=layers), x_WD, cache, batch, entropy_W, budget)
        self.reserve_positions(batch.num_positions)
        first, stop, kv = self.held.start, self.held.stop, cache.held(self.held)  # the stack counts these layers only
        if budget is not None:
            keep_WL, cap_WL = (x_WL[:, first:stop].contiguous() for x_WL in (budget.keep_TL, budget.cap_TL))
            budget = replace(budget, keep_TL=keep_WL, cap_TL=cap_WL)
        own = range(layers.start - first, layers.stop - first)
        if others := self.context.config.tensor - 1:
            sums = sum(parts_added_up(self.spec.layers[number]) for number in layers)
            self.context.count_sums(sums, sums * others * x_WD.numel() * self.dtype.itemsize)
        with self.context.watched():
            return self._held_stack.run(own, x_WD, kv, self.distinct_tables, batch, entropy_W, budget)

    def _lend_experts(self, layers: range) -> None:
        """Run other KV shards' rows through the experts that are here; this one has none in this step."""
        x_0D = torch.empty(0, self.spec.hidden_size, dtype=self.dtype, device=self.device)
        for number in layers:
            if shares := self._shares.get(number):
                read_0X = read_by_experts(self.backend, self.layers[number], x_0D)
                pending = self.experts.dispatch(number, read_0X, shares.no_rows())
                self.experts.run(self.layers[number].ffn, pending)

    def propagate_kv(self, exit: DecoderExit, x_RD: torch.Tensor, kv: Sequence[KVLayer], batch: AttentionBatch) -> None:
        """See :meth:`Decoder.propagate_kv`; every rank writes those of its heads, of its KV shard's rows. The stages
        behind that of the exit write theirs when rows next go there."""
        self.reserve_positions(batch.num_positions)
        message = exit_message(cache_of(kv).number, exit.after_layers, batch)
        self._tell(message)
        self._exit(exit, x_RD, kv, read_exited(message))

    def _exit(self, exit: DecoderExit, x_RD: torch.Tensor | None, kv: Sequence[KVLayer], batch: AttentionBatch) -> None:
        """Rows exit: every stage writes its own layers; ``x_RD`` where this stage has the rows."""
        assert x_RD is not None, "one stage has all rows"
        self._write(exit, x_RD, kv, batch)

    @torch.inference_mode()
    def _write(self, exit: DecoderExit, x_RD: torch.Tensor, kv: Sequence[KVLayer], batch: AttentionBatch) -> None:
        """Write this stage's keys and values of rows that exited, for its layers behind their exit."""
        self.reserve_positions(batch.num_positions)
        own_W, own = cache_of(kv).own_rows(batch)
        if exit.projections and len(own_W):
            behind = kv[max(exit.after_layers, self.held.start) : self.held.stop]
            self._propagate(exit, x_RD[own_W.to(self.device)], behind, on_device(own, self.device))

    def _stage_of(self, exit: DecoderExit) -> int:
        return self.stages.owner(exit.after_layers - 1)

    def exchange(self) -> Exchange:
        """See :meth:`Decoder.exchange`."""
        return Exchange(
            received=dict(self.context.received),
            expert_rows=tuple(self._executed_X.tolist()),
            imbalance=self.experts.imbalance,
            expert_moves=self.experts.moves,
        )

    def close(self) -> None:
        """Let the workers go, those that are still there. Only rank 0 calls this."""
        if not self.context.failed:
            with suppress(RuntimeError):  # said while rank 0 ends, maybe because a worker has died
                self._tell(Message(operation=Operation.STOP))
                record_load(self.context, self.load, self.spec)
        self.context.close()

    @torch.inference_mode()
    def follow(self) -> None:
        """Do what rank 0 says, until it says stop.

        Raises:
            RuntimeError: when rank 0 has died, or another rank does not answer in time.
        """
        assert not self.context.leads
        caches: dict[int, list[KVLayer]] = {}
        while (message := self.context.receive()).operation is not Operation.STOP:
            if message.operation is Operation.ALLOCATE:
                windows = message.blocks[0].tolist()
                caches[message.cache] = self.allocate_cache(*message.arguments[:4], window_pages=windows)
            elif message.operation is Operation.FREE:
                del caches[message.cache]
                self._forget(message.cache)
            elif message.operation is Operation.COPY:
                self._copy(cache_of(caches[message.cache]), *read_copies(message))
            elif message.operation is Operation.RUN:
                self._obey_run(message, caches[message.cache])
            elif message.operation is Operation.PROPAGATE:
                self._obey_propagate(message, caches[message.cache])
            elif message.operation in (Operation.LOADS, Operation.MOVE):
                self.experts.obey(message)
            elif message.operation is Operation.EMBED:
                if self.stage == 0:
                    self._embedded_TD = self._embed_together(message.blocks[0].to(self.device))
            elif message.operation is Operation.LOGITS:
                if self.context.world_rank < self.context.config.tensor:
                    self._logits_together(torch.empty(message.arguments[0], self.spec.hidden_size, device=self.device))
            else:
                self._obey_decide(message)
        record_load(self.context, self.load, self.spec)
        self.context.close()

    def _obey_run(self, message: Message, kv: list[KVLayer]) -> None:
        batch, layers = read_batch(message), range(*message.arguments[:2])
        self.reserve_positions(batch.num_positions)
        x_TD: torch.Tensor | None = None
        if self.stages.owner(max(layers.start - 1, 0)) == self.stage:
            x_TD = self._beginning(message) if layers.start == 0 else self._pick(message.cache, batch.slots_T)
        count = len(batch.slots_T)
        entropy_T = torch.zeros(count, device=self.device) if message.arguments[5] else None
        ran_TD = self._run_layers(layers, x_TD, kv, batch, entropy_T, read_budget(message, count, self.device))
        if ran_TD is not None:
            self._ran[message.cache] = ran_TD, batch.slots_T

    def _beginning(self, message: Message) -> torch.Tensor:
        """The rows that layer 0 runs."""
        x_TD, self._embedded_TD = self._embedded_TD, None
        return self.embed(message.blocks[5].to(self.device)) if x_TD is None else x_TD

    def _obey_propagate(self, message: Message, kv: list[KVLayer]) -> None:
        exit, exited = self.exits[message.arguments[0]], read_exited(message)
        here = self._stage_of(exit) == self.stage
        self._exit(exit, self._pick(message.cache, exited.slots_T) if here else None, kv, exited)

    def _pick(self, cache: int, slots_R: torch.Tensor) -> torch.Tensor:
        x_TD, slots_T = self._ran[cache]
        return x_TD[rows_at(slots_T, slots_R).to(self.device)]

    def _forget(self, cache: int) -> None:
        """Drop what is remembered beside a cache that is gone."""
        self._ran.pop(cache, None)

    def _obey_decide(self, message: Message) -> None:
        """Only stages are asked: without them rank 0 has every row itself."""
        raise AssertionError(message)

    def _tell(self, message: Message) -> None:
        if not self.context.leads:
            return
        while self._dropped:
            cache = self._dropped.pop()
            self.context.send(Message(operation=Operation.FREE, cache=cache))
            self._forget(cache)
        self.context.send(message)

    def make_stack(self) -> None:
        """Steps are run segment by segment: all ranks must hear of each."""

    def _summed(self, x: torch.Tensor, purpose: str = "sums") -> torch.Tensor:
        return self.context.sum(x, self.context.tensor_group, purpose)

    def _norm_over_heads(self, *pairs: tuple[torch.Tensor, torch.Tensor]) -> Sequence[torch.Tensor]:
        if self._spread_norms is None:
            return super()._norm_over_heads(*pairs)
        parts = [(*pair, norm) for pair, norm in zip(pairs, self._spread_norms, strict=True)]
        return norm_over_ranks(self.context, self.spec.norm_eps, *parts)

    def _propagate_alike(self, layers: Sequence[Behind], x_RD: torch.Tensor, batch: AttentionBatch) -> None:
        if self._spread_norms is None:
            return super()._propagate_alike(layers, x_RD, batch)
        kind, context = self.local_spec.layers[layers[0][0]].attention, self._attention_context(layers[0][0])
        propagate_over_ranks(self.context, context, kind, self._spread_norms[1], layers, x_RD, batch)

    def _mixture(self, number: int, x_TD: torch.Tensor, routing: Routing, shared: bool = True) -> torch.Tensor:
        if self.context.config.record_load is not None:
            self.load.observe(number, routing)
        identity_T = routing.identity_weights_T
        if identity_T is not None and self.context.tensor_rank:  # the ranks of a tensor group add up
            identity_T = torch.zeros_like(identity_T)
        if number not in self._shares:
            return super()._mixture(number, x_TD, replace(routing, identity_weights_T=identity_T), shared)
        weights = self.layers[number]
        pending = self.experts.dispatch(number, read_by_experts(self.backend, weights, x_TD), routing)
        shared_TD = self._shared(number, x_TD) if shared else None  # while the rows are on their way
        total_TD = self.experts.run(weights.ffn, pending)
        if weights.latent_out is not None:
            total_TD = self.backend.linear(total_TD.to(x_TD.dtype), weights.latent_out).float()
        if identity_T is not None:
            total_TD.addcmul_(x_TD.float(), identity_T[:, None])
        if shared_TD is not None:
            total_TD += shared_TD
        return total_TD.to(x_TD.dtype)
