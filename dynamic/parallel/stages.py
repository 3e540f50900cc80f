"""Which layers a stage of the pipeline runs, and how a step's rows are split so that stages work at the same time.

Shape suffixes as in ``kernels/api/types.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from ...kernels.api.stack import SharedGroup, Stack
from ...kernels.api.types import AttentionBatch, ExpertBudget, ExpertWeights, GroupPages
from ..model.attention.kind import AttentionWeights
from ..model.blocks import Attention, FeedForward, FeedForwards
from ..model.decoder import Decoder
from ..model.layer_weights import LayerWeights
from ..model.spec import LayerSpec, ModelSpec
from ..model.stack import make_stack

SIZES = 4  # numbers that describe a layer


@dataclass(frozen=True)
class Stages:
    """The stages of a model.

    Arguments:
        layers: of each stage; every stage has at least one.
    """

    layers: tuple[range, ...]

    def __len__(self) -> int:
        return len(self.layers)

    def owner(self, layer: int) -> int:
        """The stage that runs a layer."""
        return next(stage for stage, layers in enumerate(self.layers) if layer in layers)


def split_into_stages(spec: ModelSpec, stages: int, exit_layers: Collection[int] = ()) -> Stages:
    """Cut a model into stages of nearly equal work per row, which is taken to be that of all its layers.

    Arguments:
        exit_layers: after how many layers rows may exit; where there are any, stages end there only.

    Raises:
        ValueError: when there are more stages than layers, or than segments between exits.
    """
    total, cuts = spec.num_layers, sorted(exit_layers) or range(1, spec.num_layers)
    if stages > len(cuts) + 1:
        what = f"{len(cuts) + 1} segments between its exits" if exit_layers else f"{total} layers"
        raise ValueError(f"parallel.pipeline={stages}: this {spec.family} model has {what}")
    work = list(accumulate((spec.layer_flops(layer) for layer in spec.layers), initial=0))
    # The least sum of squares, by the layer where the last of so many stages ends, and the ends of the stages.
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, (0,))}
    for last in range(1, stages + 1):
        best = {
            end: min(
                (squares + (work[end] - work[start]) ** 2, (*ends, end))
                for start, (squares, ends) in best.items()
                if start < end
            )
            for end in ((total,) if last == stages else cuts)
            if any(start < end for start in best)
        }
    return Stages(tuple(range(start, stop) for start, stop in pairwise(best[total][1])))


def layer_sizes(weights: LayerWeights) -> list[int]:
    """What is told about a layer to ranks that do not hold it: ``SIZES`` numbers, for :func:`stand_in`."""
    scales = weights.contribution_scale_E
    return [
        weights.nbytes,
        weights.ffn.nbytes,
        weights.attention.propagated_bytes,
        0 if scales is None else scales.nbytes,
    ]


@dataclass(frozen=True, kw_only=True)
class _AbsentAttention(AttentionWeights):
    """The attention of a layer that another stage holds."""

    total: int
    propagated: int

    @property
    def nbytes(self) -> int:
        return self.total

    @property
    def propagated_bytes(self) -> int:
        return self.propagated


def stand_in(spec: ModelSpec, sizes: Sequence[int]) -> LayerWeights:
    """A layer that another stage holds: it can be weighed, not run."""
    total, ffn, propagated, scales = sizes
    return LayerWeights(
        norms={},
        attention=_AbsentAttention(total=total - ffn - scales, propagated=propagated),
        ffn=ExpertWeights.none(spec.hidden_size, spec.activation, ffn),
        contribution_scale_E=torch.empty(scales, dtype=torch.uint8, device="meta") if scales else None,
    )


def make_held_stack(decoder: Decoder, held: range, shared: SharedGroup | None) -> Stack | None:
    """The layers that a rank holds in one call of the C++ kernels; None where that cannot be.

    Arguments:
        shared: where ranks that have parts of the heads add up attention's and the experts' results.
    """
    stack = make_stack(decoder.backend, decoder.local_spec, decoder.layers, held, ())
    if stack is not None and shared is not None:
        stack.share(shared)
    return stack


def parts_added_up(layer: LayerSpec) -> int:
    """How many results of a layer those ranks add up that share its heads and neurons."""
    return sum(2 if isinstance(b, FeedForwards) else isinstance(b, Attention | FeedForward) for b in layer.blocks)


def micro_batches(batch: AttentionBatch, count: int) -> list[tuple[slice, AttentionBatch]]:
    """Split a batch between sequences into at most ``count`` parts of nearly equal rows: (rows, their batch)."""
    if count == 1 or batch.num_sequences == 1:
        return [(slice(0, len(batch.slots_T)), batch)]
    starts = batch.query_start_S1.tolist()
    contexts = batch.context_len_S.tolist()
    return [
        (slice(starts[first], starts[stop]), _part(batch, starts, contexts, first, stop))
        for first, stop in _runs(starts, count)
    ]


def _runs(starts: Sequence[int], count: int) -> Iterator[tuple[int, int]]:
    """Runs of sequences: each takes sequences until the rows so far reach its share of them all."""
    first = 0
    for part in range(1, count + 1):
        wanted = starts[-1] * part / count
        stop = next(number for number, start in enumerate(starts) if start >= wanted)
        if stop > first:
            yield first, stop
        first = max(first, stop)


def _part(
    batch: AttentionBatch, starts: Sequence[int], contexts: Sequence[int], first: int, stop: int
) -> AttentionBatch:
    rows = slice(starts[first], starts[stop])
    return AttentionBatch(
        positions_T=batch.positions_T[rows],
        slots_T=batch.slots_T[rows],
        query_start_S1=batch.query_start_S1[first : stop + 1] - starts[first],
        context_len_S=batch.context_len_S[first:stop],
        block_table_SM=batch.block_table_SM[first:stop].contiguous(),
        max_query_len=max(end - start for start, end in pairwise(starts[first : stop + 1])),
        max_context_len=max(contexts[first:stop]),
        max_position=batch.max_position,
        state_slots_S=None if batch.state_slots_S is None else batch.state_slots_S[first:stop],
        kept_slots_S=None if batch.kept_slots_S is None else batch.kept_slots_S[first:stop],
        groups=tuple(GroupPages(slots[rows], table[first:stop].contiguous()) for slots, table in batch.groups),
    )


def budget_part(budget: ExpertBudget | None, rows: slice) -> ExpertBudget | None:
    """The budget of some rows; what they do without is added to the counters of the whole."""
    if budget is None:
        return None
    return ExpertBudget(keep_TL=budget.keep_TL[rows], cap_TL=budget.cap_TL[rows], skipped_T=budget.skipped_T[rows])
