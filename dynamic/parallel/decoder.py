"""A decoder whose weights are spread over ranks: rank 0 is called as any decoder, the others follow its messages.

Rows are known by their slots in the cache: a message names those that go on, and every rank picks them out of what it
has. So it is rank 0 alone that decides who leaves at an exit. Shape suffixes as in ``kernels/types.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import finalize

import torch
import torch.nn.functional as F

from ...exits.segments import Segment
from ...kernels.types import AttentionBatch, ExpertBudget, ExpertWeights, KVLayer, Routing
from ..decoder import Decoder, LayerWeights
from ..decoder_exits import DecoderExit
from ..engine.kv_cache import allocate_layers, copy_pages
from ..outputs import Exchange
from ..spec import LayerSpec, ModelSpec
from .load import ExpertLoad, write_load
from .plan import Message, Operation, read_batch, read_budget, read_leaving, run_message
from .shards import Shard, part_of, width


class SharedCache(list[KVLayer]):
    """One rank's share of a cache that all ranks know by its number."""

    def __init__(self, layers: Iterable[KVLayer], number: int) -> None:
        super().__init__(layers)
        self.number = number


def number_of(kv: Sequence[KVLayer]) -> int:
    """Of a cache that :meth:`ParallelDecoder.allocate_cache` made."""
    assert isinstance(kv, SharedCache), "other ranks do not have this cache"
    return kv.number


class ParallelDecoder(Decoder):
    """One rank of a decoder.

    Arguments:
        shard: which part of the model this rank holds; others as for :class:`Decoder`.
    """

    def __init__(self, spec: ModelSpec, *arguments: Any, shard: Shard, **more: Any) -> None:
        super().__init__(spec, *arguments, **more)
        self.context = shard.context
        self.processes = str(shard.context.config) + shard.placed
        config = shard.context.config
        # For the metrics of rank 0, and for the file that is written at the end.
        self._counts_load = config.record_load is not None or (config.expert > 1 and self.context.leads)
        self.load = ExpertLoad(shard.whole, self.device)
        self._local_experts = {
            number: local_numbers(parts[self.context.expert_rank], sum(map(len, parts)), self.device)
            for number, parts in shard.placement.items()
        }
        self._rank_of_NE = shard.expert_ranks(self.load.rows_NE)
        self.local_spec = shard.spec
        self.num_heads, self.num_kv_heads = shard.spec.num_heads, shard.spec.num_kv_heads
        self.vocabulary = shard.vocabulary
        self._token_ids_T: torch.Tensor | None = None
        self._embedded_TD: torch.Tensor | None = None  # of a worker: rows that the next layer 0 runs
        self._caches = 0  # allocated so far
        self._dropped: list[int] = []  # caches that rank 0 has no use for any more, and workers still hold
        self._rows: dict[
            int, tuple[torch.Tensor, torch.Tensor]
        ] = {}  # of a worker, by cache: the last ones, their slots

    def allocate_cache(self, num_pages: int, page_size: int) -> list[KVLayer]:
        """See :meth:`Decoder.allocate_cache`; on all ranks. The workers' shares go when rank 0 lets go of its own."""
        self._caches += 1
        cache = SharedCache(self._allocate(num_pages, page_size), self._caches)
        self._tell(Message(operation=Operation.ALLOCATE, cache=cache.number, arguments=(num_pages, page_size)))
        if self.context.leads:
            finalize(cache, self._dropped.append, cache.number)
        return cache

    def _allocate(self, num_pages: int, page_size: int) -> list[KVLayer]:
        behind = self.backend.scales_behind_page
        return allocate_layers(self.local_spec, num_pages, page_size, self.kv_dtype, self.device, behind)

    def copy_pages(self, kv: list[KVLayer], copies: list[tuple[int, int]]) -> None:
        """See :meth:`Decoder.copy_pages`; on all ranks."""
        blocks = tuple(torch.tensor(copies).T)
        self._tell(Message(operation=Operation.COPY, cache=number_of(kv), blocks=blocks))
        self._copy(kv, copies)

    def _copy(self, kv: Sequence[KVLayer], copies: list[tuple[int, int]]) -> None:
        copy_pages(kv, copies)

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """See :meth:`Decoder.embed`; the ids travel with the first segment's message, where no rank needs another's
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
        """See :meth:`Decoder.run_segment`; all ranks run it."""
        self.reserve_positions(batch.max_context_len)  # refused before anybody is told
        self._tell(run_message(number_of(kv), segment.layers, self._token_ids_T, batch, budget))
        self._token_ids_T = None
        return super().run_segment(segment, x_TD, kv, batch, router_entropy_T, budget)

    def project(self, exit: DecoderExit, x_RD: torch.Tensor, kv: Sequence[KVLayer], batch: AttentionBatch) -> None:
        """See :meth:`Decoder.project`; every rank writes the keys and values of its heads."""
        arguments = (exit.after_layers, batch.max_context_len)
        blocks = (batch.positions_T, batch.slots_T)
        self._tell(Message(operation=Operation.PROJECT, cache=number_of(kv), arguments=arguments, blocks=blocks))
        super().project(exit, x_RD, kv, batch)

    def exchange(self) -> Exchange:
        """See :meth:`Decoder.exchange`."""
        expert = self.context.config.expert
        rows_P = self.load.rows_NE.new_zeros(expert if expert > 1 else 0)
        if expert > 1:
            rows_P.scatter_add_(0, self._rank_of_NE.flatten(), self.load.rows_NE.flatten())
        return Exchange(received=dict(self.context.received), expert_rows=tuple(rows_P.tolist()))

    def close(self) -> None:
        """Let the workers go, those that are still there. Only rank 0 calls this."""
        if not self.context.failed:
            with suppress(RuntimeError):  # said while rank 0 ends, maybe because a worker has died
                self._tell(Message(operation=Operation.STOP))
                self._record_load()
        self.context.close()

    def _record_load(self) -> None:
        """Bring the stages' counts together, where they are wanted; the last thing that all ranks do."""
        if self.context.config.record_load is None:
            return
        counts = self.context.gather(self.load.rows_NE.cpu())
        if self.context.leads:
            rows_NE = torch.stack(counts[:: self.context.config.stage_size]).sum(0)
            write_load(rows_NE, self.spec, Path(self.context.config.record_load).expanduser())

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
                caches[message.cache] = self.allocate_cache(*message.arguments[:2])
            elif message.operation is Operation.FREE:
                del caches[message.cache]
                self._forget(message.cache)
            elif message.operation is Operation.COPY:
                pages, copies = (block.tolist() for block in message.blocks[:2])
                self._copy(caches[message.cache], list(zip(pages, copies, strict=True)))
            elif message.operation is Operation.RUN:
                self._obey_run(message, caches[message.cache])
            elif message.operation is Operation.PROJECT:
                self._obey_project(message, caches[message.cache])
            elif message.operation is Operation.EMBED:
                if self.context.stage == 0:
                    self._embedded_TD = self._embed_together(message.blocks[0].to(self.device))
            elif message.operation is Operation.LOGITS:
                if self.context.world_rank < self.context.config.tensor:
                    self._logits_together(torch.empty(message.arguments[0], self.spec.hidden_size, device=self.device))
            else:
                self._obey_decide(message)
        self._record_load()
        self.context.close()

    def _obey_run(self, message: Message, kv: list[KVLayer]) -> None:
        batch = read_batch(message, self.device)
        x_TD = self._beginning(message) if message.arguments[0] == 0 else self._pick(message.cache, batch.slots_T)
        segment = Segment(index=0, layers=range(*message.arguments[:2]))
        budget = read_budget(message, len(batch.slots_T), self.device)
        self._rows[message.cache] = self.run_segment(segment, x_TD, kv, batch, budget=budget), batch.slots_T

    def _beginning(self, message: Message) -> torch.Tensor:
        """The rows that layer 0 runs."""
        if self._embedded_TD is None:
            return self.embed(message.blocks[5].to(self.device))
        x_TD, self._embedded_TD = self._embedded_TD, None
        return x_TD

    def _obey_project(self, message: Message, kv: list[KVLayer]) -> None:
        leaving = read_leaving(message, self.device)
        x_RD = self._pick(message.cache, leaving.slots_T)
        self.project(self.exits[message.arguments[0]], x_RD, kv, leaving)

    def _pick(self, cache: int, slots_R: torch.Tensor) -> torch.Tensor:
        x_TD, slots_T = self._rows[cache]
        return x_TD[rows_at(slots_T, slots_R)]

    def _forget(self, cache: int) -> None:
        """Drop what is remembered beside a cache that is gone."""
        self._rows.pop(cache, None)

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

    def _make_stack(self) -> None:
        """All layers in one call leave no room for sums in between."""
        return None

    def _attention(
        self, weights: LayerWeights, layer: LayerSpec, x_TD: torch.Tensor, kv: KVLayer, batch: AttentionBatch
    ) -> torch.Tensor:
        return self.context.sum(super()._attention(weights, layer, x_TD, kv, batch), self.context.tensor_group)

    def _ffn(
        self, number: int, x_TD: torch.Tensor, routed: list[torch.Tensor] | None, budget: ExpertBudget | None
    ) -> torch.Tensor:
        return self.context.sum(super()._ffn(number, x_TD, routed, budget), self.context.everyone)

    def _experts(self, x_TD: torch.Tensor, number: int, weights: ExpertWeights, routing: Routing) -> torch.Tensor:
        if self._counts_load:
            self.load.observe(number, routing)
        if routing.identity_weights_T is not None and self.context.rank:
            routing = replace(routing, identity_weights_T=torch.zeros_like(routing.identity_weights_T))
        if self.context.config.expert > 1:
            routing = held_here(routing, self._local_experts[number])
        return super()._experts(x_TD, number, weights, routing)


def local_numbers(experts: Sequence[int], count: int, device: torch.device | str) -> torch.Tensor:
    """Of all ``count`` experts, the numbers of these ones on their rank, and -1 for the others, int32, (E,)."""
    local_E = torch.full((count,), -1, dtype=torch.int32)
    local_E[list(experts)] = torch.arange(len(experts), dtype=torch.int32)
    return local_E.to(device)


def held_here(routing: Routing, local_E: torch.Tensor) -> Routing:
    """The slots of a routing whose experts lie on this rank, in front and in their order.

    Arguments:
        local_E: of :func:`local_numbers`.
    """
    ids_TK = local_E[routing.expert_ids_TK.long()]
    here_TK = ids_TK >= 0
    if routing.counts_T is not None:
        here_TK &= torch.arange(ids_TK.shape[1], device=ids_TK.device) < routing.counts_T[:, None]
    order_TK = here_TK.int().argsort(dim=1, descending=True, stable=True)
    here_TK = here_TK.gather(1, order_TK)
    return replace(
        routing,
        expert_ids_TK=ids_TK.gather(1, order_TK).where(here_TK, 0).contiguous(),
        weights_TK=routing.weights_TK.gather(1, order_TK).where(here_TK, 0).contiguous(),
        counts_T=here_TK.sum(1, dtype=torch.int32),
        index=None,
    )


def rows_at(slots_T: torch.Tensor, wanted_R: torch.Tensor) -> torch.Tensor:
    """Numbers of the rows that live at some slots; every slot is one row's."""
    sorted_T, order_T = slots_T.sort()
    return order_T[torch.searchsorted(sorted_T, wanted_R)]
