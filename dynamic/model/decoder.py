"""The one decoder that runs every family: layers made of blocks, one after the other.

Shape suffixes (also in ``kernels/api/types.py``):
    T tokens (rows of a step)   R rows whose logits are wanted   D hidden size    V vocabulary
    H query heads               G key/value heads                C channels of one head
    E experts                   K experts per token              L positions
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F

from ...exits.segments import Segment, split_into_segments
from ...kernels.api.quantized_weight import QuantizedWeight
from ...kernels.api.stack import Stack, StackResult
from ...kernels.api.types import (
    AttentionBatch,
    ExitDecision,
    ExpertBudget,
    KVLayer,
    KVProjection,
    LinearWeights,
    Routing,
)
from ...kernels.torch.backend import TorchBackend
from .attention.kind import AttentionContext
from .blocks import Add, Attention, FeedForwards, Norm, OutNorm, Read, Scale
from .counters import Exchange
from .dtype import rounded
from .exits import DecoderExit
from .expert_pool import ExpertPool
from .inference_mode import in_inference_mode
from .kv_cache import Copies, allocate_layers, copy_pages, copy_states
from .layer_weights import LayerWeights, MtpWeights
from .norms import NORM_KINDS, run_norm
from .rope import rope_table
from .routing import read_by_experts, router_logits, shared_experts, with_always_on
from .spec import ModelSpec
from .stack import make_stack

FIRST_TABLE_LENGTH = 4096  # positions; longer contexts grow the table
Behind = tuple[int, KVProjection, KVLayer]  # a layer behind an exit: its number, what makes its keys and values, cache


class Decoder:
    """A model that is ready to run.

    Arguments:
        spec: what it computes.
        backend: runs the operations; the weights are in its layout.
        embedding_VD: the embedding table, maybe quantised; None where it is the LM head's weight, kept once.
        layers: one entry per layer.
        final_norm_D, final_norm_bias_D: norm before the LM head.
        lm_head: projection to the vocabulary.
        exits: by the number of layers in front of them; they cut the model into segments.
        expert_impacts: by layer, see :class:`.LayerScales`; empty where the experts are not calibrated.
        quantization: what was done to the checkpoint's weights, in words.
        expert_pool: has the experts of the mixtures in memory, where not all of them are.
    """

    processes: str | None = None  # the axes of those that share the model, in words; None: there is one
    _local_spec: ModelSpec | None = None  # where several processes share the heads
    mtp: tuple[MtpWeights, ...] = ()  # layers that predict further tokens, where they were asked for
    kv_shards = 1  # places that sequences live in, each with a part of the cache

    def __init__(
        self,
        spec: ModelSpec,
        backend: TorchBackend,
        *,
        embedding_VD: torch.Tensor | QuantizedWeight | None,
        layers: Sequence[LayerWeights],
        final_norm_D: torch.Tensor,
        final_norm_bias_D: torch.Tensor | None = None,
        lm_head: LinearWeights,
        exits: Mapping[int, DecoderExit] | None = None,
        expert_impacts: Mapping[int, float] | None = None,
        quantization: str = "none",
        expert_pool: ExpertPool | None = None,
    ) -> None:
        assert len(layers) == spec.num_layers
        self.spec = spec
        self.backend = backend
        self.device, self.dtype = backend.device, backend.dtype
        backend.formats |= spec.uncommon
        self.kv_dtype = self.dtype  # of keys and values in the cache
        self.exits = dict(sorted((exits or {}).items()))
        self.segments = split_into_segments(spec.num_layers, self.exits)
        self.expert_impacts = dict(expert_impacts or {})
        self.embedding_VD, self.quantization, self.expert_pool = embedding_VD, quantization, expert_pool
        self.layers = tuple(layers)
        self.final_norm_D, self.final_norm_bias_D = final_norm_D, final_norm_bias_D
        self.lm_head = lm_head
        self.held = range(spec.num_layers)
        self._make_tables(min(spec.max_position, FIRST_TABLE_LENGTH))
        self.stack = self.make_stack()

    @property
    def local_spec(self) -> ModelSpec:
        """The model with the heads that are here."""
        return self._local_spec or self.spec

    @property
    def embedding_scale(self) -> float:
        """Factor on the embeddings; some models round it to their dtype."""
        scale = self.spec.embedding_scale
        return rounded(scale, self.dtype) if self.spec.rounded_embedding_scale else scale

    def _make_tables(self, length: int) -> None:
        """Set the layers' ``rope_tables``, ``distinct_tables``, which these are, and ``cos_sin_LC``, the model's."""
        ropes = self.spec.ropes
        tables = {rope: rope_table(rope, length, self.device) for rope in self.spec.distinct_ropes}
        self.cos_sin_LC = tables[self.spec.rope]
        self.rope_tables, self.distinct_tables = tuple(tables[rope] for rope in ropes), tuple(tables.values())

    @property
    def weight_bytes(self) -> int:
        """Size of the weights in memory."""
        parts = (self.embedding_VD, self.lm_head, self.final_norm_D, *self.layers, *self.mtp)
        absent = 0 if self.expert_pool is None else self.expert_pool.absent_bytes
        return sum(part.nbytes for part in parts if part is not None) - absent

    def reserve_positions(self, length: int) -> None:
        """Make the table of rotations long enough for contexts of ``length`` tokens.

        Raises:
            ValueError: when the model was not made for contexts that long.
        """
        if length > self.spec.max_position:
            raise ValueError(f"a context of {length} tokens exceeds {self.spec.longest_context}")
        if length > (longest := self.cos_sin_LC.shape[0]):
            self._make_tables(min(self.spec.max_position, max(length, 2 * longest)))

    def allocate_cache(
        self, num_pages: int, page_size: int, kv_shards: int = 1, num_states: int = 1, window_pages: Sequence[int] = ()
    ) -> list[KVLayer]:
        """Keys and values of every layer, zeroed; each of the ``kv_shards`` KV shards has an equal run of the pages.
        Layers with recurrent states have ``num_states`` slots. ``window_pages``: see :func:`.allocate_layers`."""
        kept, behind = (self.kv_dtype, self.device), self.backend.scales_behind_page
        return allocate_layers(self.local_spec, num_pages, page_size, *kept, behind, num_states, window_pages)

    def copy_pages(self, kv: list[KVLayer], *copies: Copies, states: Copies = ()) -> None:
        """Copy whole pages, (from, to), by group of layers; and the recurrent states of sequences by their slots."""
        copy_pages(kv, *copies)
        copy_states(kv, states)

    @in_inference_mode
    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """Embeddings of tokens (int64): the residual stream's beginning, float32, (T, D).

        The stream stays in float32 whatever the weights are: some models drive single channels into the ten thousands,
        where one step of bfloat16 is larger than what most layers add.
        """
        scale = self.embedding_scale
        if self.embedding_VD is None:
            return self.backend.embed(self.lm_head, token_ids_T, scale)
        if isinstance(self.embedding_VD, QuantizedWeight):
            x_TD = self.embedding_VD.take(token_ids_T).dequantize()
        else:
            x_TD = F.embedding(token_ids_T, self.embedding_VD).float()
        return x_TD if scale == 1.0 else x_TD * scale

    @in_inference_mode
    def run_segment(
        self,
        segment: Segment,
        x_TD: torch.Tensor,
        kv: Sequence[KVLayer],
        batch: AttentionBatch,
        router_entropy_T: torch.Tensor | None = None,
        budget: ExpertBudget | None = None,
    ) -> torch.Tensor:
        """Run the rows of a step through the layers of a segment; their keys and values are written to the cache.

        Arguments:
            x_TD: the residual stream; it may be overwritten.
            kv: the cache of every layer of the model, by layer number.
            batch: where the rows live.
            router_entropy_T: float32; if given, the mean entropy of the segment's routers is written here, in nats.
            budget: how many experts the rows may use; None is all that the routers choose.

        Returns: the residual stream after the segment, (T, D).
        """
        self.reserve_positions(batch.num_positions)
        if self.stack is not None:
            return self.stack.run(segment.layers, x_TD, kv, self.distinct_tables, batch, router_entropy_T, budget)
        spec, backend = self.spec, self.backend
        routed: list[torch.Tensor] | None = None if router_entropy_T is None else []
        read_TD: torch.Tensor = x_TD
        pending_TD: torch.Tensor | None = None  # what the last block adds to the residual stream
        for number in segment.layers:
            for block in spec.layers[number].blocks:
                if isinstance(block, Norm):
                    read_TD, x_TD = self._add_norm(number, block.weight, pending_TD, x_TD)
                    pending_TD = None
                elif isinstance(block, Read | Add):
                    x_TD, pending_TD = self._added(pending_TD, x_TD), None
                    read_TD = x_TD.to(backend.dtype) if isinstance(block, Read) else read_TD
                elif isinstance(block, OutNorm):
                    assert pending_TD is not None, "a norm of what a block adds has that block in front of it"
                    pending_TD = self._norm(number, block.weight, pending_TD)
                elif isinstance(block, Scale):
                    x_TD = self._added(pending_TD, x_TD) * self.layers[number].norms[block.weight]
                    pending_TD = None
                elif isinstance(block, FeedForwards):
                    pending_TD = self._feed_forwards(number, block, read_TD, x_TD, routed, budget)
                elif isinstance(block, Attention):
                    pending_TD = self._attention(number, read_TD, kv[number], batch)
                else:
                    pending_TD = self._ffn(number, read_TD, routed, budget)
        if routed and router_entropy_T is not None:
            router_entropy_T.copy_(backend.router_entropy(routed))
        return self._added(pending_TD, x_TD)

    def _added(self, pending_TD: torch.Tensor | None, x_TD: torch.Tensor) -> torch.Tensor:
        """The residual stream with what a block adds to it."""
        if pending_TD is None:
            return x_TD
        pending_TD, scale = pending_TD.to(x_TD.dtype), self.spec.residual_scale
        return x_TD + (pending_TD if scale == 1.0 else pending_TD * scale)

    def _norm(self, number: int, name: str, x_TD: torch.Tensor) -> torch.Tensor:
        norms, spec = self.layers[number].norms, self.spec
        return run_norm(self.backend, spec.norm, x_TD, norms[name], norms.get(f"{name}_bias"), spec.norm_eps)

    def _add_norm(
        self, number: int, name: str, pending_TD: torch.Tensor | None, x_TD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream with what a block adds to it: normed, and as it is."""
        if pending_TD is None or NORM_KINDS[self.spec.norm].centred:
            x_TD = self._added(pending_TD, x_TD)
            return self._norm(number, name, x_TD), x_TD
        weight_D, spec = self.layers[number].norms[name], self.spec
        read_TD, x_TD = self.backend.add_rms_norm(pending_TD, x_TD, weight_D, spec.norm_eps, spec.residual_scale)
        return read_TD.to(self.dtype), x_TD

    @in_inference_mode
    def run_with_exits(
        self,
        x_TD: torch.Tensor,
        kv: Sequence[KVLayer],
        batch: AttentionBatch,
        thresholds_NT: torch.Tensor,
        budget: ExpertBudget | None = None,
    ) -> StackResult:
        """All segments at once, with the decisions between them, where :attr:`stack` has all exits.

        Arguments:
            thresholds_NT: see :meth:`.Stack.run_with_exits`; others as for :meth:`run_segment`.
        """
        assert self.stack is not None
        self.reserve_positions(batch.num_positions)
        return self.stack.run_with_exits(x_TD, kv, self.distinct_tables, batch, thresholds_NT, budget)

    @in_inference_mode
    def decide(
        self,
        exit: DecoderExit,
        x_RD: torch.Tensor,
        thresholds_R: torch.Tensor,
        previous_RD: torch.Tensor | None = None,
        router_entropy_R: torch.Tensor | None = None,
    ) -> ExitDecision:
        """Which rows exit; see :meth:`TorchBackend.exit_decide`."""
        assert exit.probe is not None
        return self.backend.exit_decide(x_RD, exit.probe, thresholds_R, previous_RD, router_entropy_R)

    @in_inference_mode
    def apply_exit_head(self, exit: DecoderExit, x_RD: torch.Tensor) -> torch.Tensor:
        """What rows that exit hand to :meth:`logits`: their residual stream, through the exit's adapter."""
        inner_RJ = self.backend.linear(x_RD.to(self.dtype), exit.down)
        return x_RD + self.backend.linear(inner_RJ, exit.up)

    @in_inference_mode
    def propagate_kv(self, exit: DecoderExit, x_RD: torch.Tensor, kv: Sequence[KVLayer], batch: AttentionBatch) -> None:
        """Write the keys and values of the layers behind an exit, made of the residual stream at the exit; where layers
        keep recurrent states, advance these.

        Arguments:
            kv: the cache of every layer of the model.
            batch: only positions and slots of the rows are read, and where the states of their sequences are.
        """
        self.reserve_positions(batch.num_positions)
        self._propagate(exit, x_RD, kv[exit.after_layers :], batch)

    def _propagate(self, exit: DecoderExit, x_RD: torch.Tensor, kv: Sequence[KVLayer], batch: AttentionBatch) -> None:
        """See :meth:`propagate_kv`; ``kv`` has the layers behind the exit that are here."""
        behind = zip((number for number in self.held if number >= exit.after_layers), kv, strict=True)
        kinds = self.local_spec.layers
        kept = [(number, cache) for number, cache in behind if kinds[number].attention.keeps_rows]
        layers = ((number, own, cache) for (number, cache), own in zip(kept, exit.projections, strict=True))
        by_group = sorted(layers, key=lambda layer: layer[2].group)
        for (group, _), alike in groupby(by_group, lambda layer: (layer[2].group, kinds[layer[0]].keys_alike)):
            self._propagate_alike(list(alike), x_RD, batch.of_group(group))

    def _propagate_alike(self, layers: Sequence[Behind], x_RD: torch.Tensor, batch: AttentionBatch) -> None:
        """Of layers that are alike."""
        numbers, projections, kv = zip(*layers, strict=True)
        context, kind = self._attention_context(numbers[0]), self.local_spec.layers[numbers[0]].attention
        kind.propagate(projections, x_RD, kv, batch, context)

    @in_inference_mode
    def logits(self, x_RD: torch.Tensor) -> torch.Tensor:
        """Final norm and LM head on the rows given: float32, (R, V)."""
        spec, backend, head = self.spec, self.backend, self.lm_head
        if not NORM_KINDS[spec.norm].float32:
            logits_RV = backend.logits(x_RD, self.final_norm_D, spec.norm_eps, head, spec.logits_divisor)
        else:
            norm = self.final_norm_D, self.final_norm_bias_D
            logits_RV = backend.logits_linear(run_norm(backend, spec.norm, x_RD, *norm, spec.norm_eps), head)
            logits_RV = logits_RV if spec.logits_divisor == 1.0 else logits_RV.div_(spec.logits_divisor)
        return logits_RV if spec.logits_cap is None else backend.cap_logits(logits_RV, spec.logits_cap)

    def exchange(self) -> Exchange | None:
        """What went between the processes that share the model, so far; None where there is one."""
        return None

    def _attention_context(self, number: int) -> AttentionContext:
        eps, over_heads, over_ranks = self.spec.norm_eps, self._norm_over_heads, partial(self._summed, purpose="norms")
        return AttentionContext(self.backend, self.rope_tables[number], eps, over_heads, over_ranks)

    def _summed(self, x: torch.Tensor, purpose: str = "sums") -> torch.Tensor:
        """Of what several processes have parts of, the sum."""
        return x

    def _attention(self, number: int, x_TD: torch.Tensor, kv: KVLayer, batch: AttentionBatch) -> torch.Tensor:
        kind, own = self.local_spec.layers[number].attention, (kv, batch.of_group(kv.group))
        return self._summed(kind.forward(self.layers[number].attention, x_TD, *own, self._attention_context(number)))

    def _norm_over_heads(self, *pairs: tuple[torch.Tensor, torch.Tensor]) -> Sequence[torch.Tensor]:
        """RMS norms over all heads: rows (T, X), each with its weight (X)."""
        eps = self.spec.norm_eps
        return [self.backend.rounded_rms_norm(x_TX.contiguous(), weight_X, eps) for x_TX, weight_X in pairs]

    def _ffn(
        self, number: int, x_TD: torch.Tensor, routed: list[torch.Tensor] | None, budget: ExpertBudget | None
    ) -> torch.Tensor:
        weights, moe = self.layers[number], self.spec.layers[number].moe
        if moe is None or moe.is_dense:
            return self._summed(self.backend.all_experts(x_TD, weights.ffn))
        return self._summed(self._mixture(number, x_TD, self._routing(number, x_TD, routed, budget)))

    def _routing(
        self, number: int, x_TD: torch.Tensor, routed: list[torch.Tensor] | None, budget: ExpertBudget | None
    ) -> Routing:
        weights, moe = self.layers[number], self.spec.layers[number].moe
        assert moe is not None
        logits_TE = router_logits(self.backend, weights, moe.router, x_TD)
        if routed is not None:
            routed.append(logits_TE)
        routing = self.backend.route(logits_TE, moe.router, **weights.routing)
        if budget is not None:
            routing = self._limit(routing, number, budget)
        return with_always_on(routing, moe.num_always_on) if moe.num_always_on else routing

    def _feed_forwards(
        self,
        number: int,
        block: FeedForwards,
        read_TD: torch.Tensor,
        x_TD: torch.Tensor,
        routed: list[torch.Tensor] | None,
        budget: ExpertBudget | None,
    ) -> torch.Tensor:
        """What a shared expert and a mixture leave that have norms of their own."""
        shared_TD, routing = self._shared(number, read_TD), self._routing(number, x_TD, routed, budget)
        assert shared_TD is not None
        mixed_TD = self._mixture(number, self._norm(number, block.mixture, x_TD), routing, shared=False)
        parts = (block.shared_out, shared_TD), (block.mixture_out, mixed_TD)
        first_TD, second_TD = (self._norm(number, name, self._summed(part_TD)) for name, part_TD in parts)
        return first_TD + second_TD

    def _mixture(self, number: int, x_TD: torch.Tensor, routing: Routing, shared: bool = True) -> torch.Tensor:
        """The chosen experts of a layer, and its shared one."""
        backend, weights = self.backend, self.layers[number]
        out_TD = backend.experts(read_by_experts(backend, weights, x_TD), weights.ffn, routing)
        out_TD = out_TD if weights.latent_out is None else backend.linear(out_TD, weights.latent_out)
        shared_TD = self._shared(number, x_TD) if shared else None
        return out_TD if shared_TD is None else out_TD + shared_TD

    def _shared(self, number: int, x_TD: torch.Tensor) -> torch.Tensor | None:
        return shared_experts(self.backend, self.layers[number], self.spec.layers[number].moe, x_TD)

    def make_stack(self) -> Stack | None:
        """The layers and exits as the backend's stack; None where they run operation by operation."""
        return make_stack(self.backend, self.local_spec, self.layers, self.held, tuple(self.exits.values()))

    def _limit(self, routing: Routing, number: int, budget: ExpertBudget) -> Routing:
        """Take experts from rows that are on a budget."""
        keep_T, cap_T = (limits_TL[:, number].contiguous() for limits_TL in (budget.keep_TL, budget.cap_TL))
        limited = self.backend.limit_experts(routing, self.layers[number].contribution_scale_E, keep_T, cap_T)
        assert limited.counts_T is not None
        before = routing.expert_ids_TK.shape[1] if routing.counts_T is None else routing.counts_T
        budget.skipped_T.add_(before - limited.counts_T)
        return limited
