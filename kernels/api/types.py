"""Plain data that operations exchange: routing tables, expert weights, attention batches.

Shape suffixes used in this package:
    T tokens (rows of a step)   D hidden size          V vocabulary
    H query heads               G key/value heads      C channels of one head
    E experts                   K experts per token    F width of one expert
    O output features           I input features       S sequences
    B pages of the cache        P tokens per page      M pages in a block table row
    L layers
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Which experts every row uses, and with what weight.

    Slots ``k >= counts_T[t]`` of row ``t`` are unused: their weight is zero and no kernel may read the expert's weights
    for them. ``counts_T is None`` means that every row uses all K slots.

    ``identity_weights_T`` is the weight with which the row itself joins the sum (zero experts, whose output is their
    input). With ``weight_on_input`` a slot's weight multiplies the expert's input instead of its output.
    ``index`` belongs to the backend that routed: tables it built in the same launch.
    """

    expert_ids_TK: torch.Tensor  # int32
    weights_TK: torch.Tensor  # float32
    counts_T: torch.Tensor | None = None  # int32
    identity_weights_T: torch.Tensor | None = None  # float32
    weight_on_input: bool = False
    index: Any = field(default=None, repr=False, compare=False)

    @property
    def used_TK(self) -> torch.Tensor:
        """Which slots are used, bool."""
        if self.counts_T is None:
            return torch.ones_like(self.expert_ids_TK, dtype=torch.bool)
        return torch.arange(self.expert_ids_TK.shape[1], device=self.counts_T.device) < self.counts_T[:, None]


@dataclass(frozen=True, kw_only=True)
class ExpertBudget:
    """How many of its chosen experts each row of a step may use, layer by layer (:mod:`.budget_reference`).

    Arguments:
        keep_TL: float32 in 0 … 1, share of the row's estimated contributions that is kept; 1 keeps all.
        cap_TL: int32, most experts, at least 1.
        skipped_T: int64; whatever runs under the budget adds here how many experts the row did without.
    """

    keep_TL: torch.Tensor
    cap_TL: torch.Tensor
    skipped_T: torch.Tensor

    def of_rows(self, rows_R: torch.Tensor) -> ExpertBudget:
        """The budget of some of a step's rows (int64), with separate counters."""
        return ExpertBudget(
            keep_TL=self.keep_TL[rows_R],
            cap_TL=self.cap_TL[rows_R],
            skipped_T=torch.zeros_like(self.skipped_T[rows_R]),
        )


@dataclass(frozen=True, kw_only=True)
class LinearWeights:
    """A linear layer as one backend keeps it. ``data`` belongs to that backend; callers only carry it around."""

    out_features: int
    in_features: int
    dtype: torch.dtype
    data: Any = field(repr=False)

    nbytes: int = 0

    @classmethod
    def of(cls, shape: Sequence[int], dtype: torch.dtype, data: Any, *parts: Any) -> LinearWeights:
        """A layer whose weight is (O, I); ``parts`` are what counts of ``data``, None for what is not there."""
        outputs, inputs = shape
        return cls(out_features=outputs, in_features=inputs, dtype=dtype, data=data, nbytes=count_bytes(*parts))


@dataclass(frozen=True, kw_only=True)
class ExpertWeights:
    """The experts of one layer as one backend keeps them (see :class:`LinearWeights`)."""

    num_experts: int
    hidden_size: int
    expert_size: int
    activation: str
    dtype: torch.dtype
    data: Any = field(repr=False)

    nbytes: int = 0

    @classmethod
    def of(cls, shape: Sequence[int], activation: str, dtype: torch.dtype, data: Any, *parts: Any) -> ExpertWeights:
        """Experts whose gate is (E, F, D); ``parts`` as for :meth:`LinearWeights.of`."""
        sizes = dict(zip(("num_experts", "expert_size", "hidden_size"), shape, strict=True))
        return cls(**sizes, activation=activation, dtype=dtype, data=data, nbytes=count_bytes(*parts))

    @classmethod
    def none(cls, hidden_size: int, activation: str, nbytes: int = 0) -> ExpertWeights:
        """Of a layer that has no experts, or none that are here: they can be weighed, not run."""
        sizes = {"num_experts": 0, "hidden_size": hidden_size, "expert_size": 0}
        return cls(**sizes, activation=activation, dtype=torch.float32, data=None, nbytes=nbytes)


def count_bytes(*parts: Any) -> int:
    """Size of the tensors and quantised weights that are there."""
    return sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True, kw_only=True)
class ProbeWeights:
    """The classifier of one exit, all float32; every backend keeps it as it is.

    Arguments:
        weight_JX, bias_J: its first layer; X is D, + D with ``previous``, + 1 with ``router_entropy``.
        out_J, out_bias: the layer behind a SiLU; None for a linear probe, whose J is 1.
        previous, router_entropy: what it looks at beside the hidden state.
    """

    weight_JX: torch.Tensor
    bias_J: torch.Tensor
    out_J: torch.Tensor | None = None
    out_bias: torch.Tensor | None = None
    previous: bool = False
    router_entropy: bool = False


@dataclass(frozen=True, kw_only=True)
class ExitDecision:
    """Which rows exit.

    Arguments:
        logits_T: of the probe, float32.
        order_T: int64; rows that continue, then rows that exit, both rising.
        num_staying: how many continue.
        host_order_T: ``order_T`` on the host, where it came from the device together with ``num_staying``.
    """

    logits_T: torch.Tensor
    order_T: torch.Tensor
    num_staying: int
    host_order_T: np.ndarray | None = None

    @property
    def order(self) -> np.ndarray:
        """``order_T`` on the host."""
        return self.order_T.cpu().numpy() if self.host_order_T is None else self.host_order_T


@dataclass(frozen=True, kw_only=True)
class KVProjection:
    """What turns a residual stream into a layer's keys and values: norm, projection (keys, then values), key norm.

    Without a norm the projection reads the stream itself. ``centred`` makes it a layer norm, which may have a bias.
    """

    norm_D: torch.Tensor | None
    kv: LinearWeights
    k_norm: torch.Tensor | None
    centred: bool = False
    norm_bias_D: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class KVLayer:
    """Paged keys and values of one layer, floating, or int8 codes with scales (``kv_codes.py``).

    Arguments:
        keys_BGPC, values_BGPC: with int8 codes C + 2 bytes per token and head. One tensor where values are keys.
        scales_behind_page: whether the scales of a page lie behind its codes, not each behind its own.
        group: number of the layers that have pages with the same numbers, see :class:`AttentionBatch`.
    """

    keys_BGPC: torch.Tensor
    values_BGPC: torch.Tensor
    scales_behind_page: bool = False
    group: int = 0

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that holds the layer's cache; the first dimension is that of the pages."""
        shared = self.values_BGPC is self.keys_BGPC
        return (self.keys_BGPC,) if shared else (self.keys_BGPC, self.values_BGPC)

    @property
    def coded(self) -> bool:
        """Whether codes and scales stand for the numbers."""
        return self.keys_BGPC.dtype == torch.int8

    @property
    def page_size(self) -> int:
        return self.keys_BGPC.shape[2]


@dataclass(frozen=True, kw_only=True)
class StateLayer(KVLayer):
    """The cache of a layer that keeps a state of fixed size for each sequence, and no keys or values.

    Arguments:
        states: float32; the first dimension is that of the slots, one for each sequence.
    """

    states: tuple[torch.Tensor, ...]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return ()


class KVLayers(list[KVLayer]):
    """The cache of all layers, which stay the same. ``native`` is what a backend has made of them, to be used again."""

    native: Any = None


class GroupPages(NamedTuple):
    """What of an :class:`AttentionBatch` is another in some layers."""

    slots_T: torch.Tensor
    block_table_SM: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionBatch:
    """Where the rows of a step live. All tensors are on the model's device.

    Sequence ``s`` owns rows ``query_start_S1[s] : query_start_S1[s + 1]``; they are the last rows of its context, which
    holds ``context_len_S[s]`` tokens once this step's keys have been written.

    A token has two numbers. Its *position* in the text is what rotates its query and key. Its *cache index* counts the
    tokens of its sequence that are still in the cache, and says where it lies and what sees it: entry ``i`` is in page
    ``block_table_SM[s, i // P]``, and the last row of ``s`` has index ``context_len_S[s] - 1``, the row before it one
    less. A row sees the indices up to its own. Both are equal unless a cache policy has evicted earlier tokens.

    Layers that see a window only may have pages of their own, and none of what lies behind it: ``groups`` has those of
    the groups 1, 2 …, ``slots_T`` and ``block_table_SM`` are those of group 0. Where it is empty, all layers have the
    same pages.
    """

    positions_T: torch.Tensor  # int64, position of each row in its text, for rotation only
    slots_T: torch.Tensor  # int64, page * P + offset where the row's key and value are written
    query_start_S1: torch.Tensor  # int32
    context_len_S: torch.Tensor  # int32
    block_table_SM: torch.Tensor  # int32, page numbers; entries beyond the context are never read
    max_query_len: int
    max_context_len: int
    max_position: int | None = None  # of positions_T; None: max_context_len - 1, for nothing was evicted
    # For layers with recurrent states, int64: where each sequence's are, and where they are kept as they are behind its
    # rows, -1: nowhere. Sequences that follow each other may be parts of one, in one slot.
    state_slots_S: torch.Tensor | None = None
    kept_slots_S: torch.Tensor | None = None
    groups: tuple[GroupPages, ...] = ()

    def of_group(self, group: int) -> AttentionBatch:
        """The same rows with the pages of a group of layers, see :attr:`KVLayer.group`."""
        return self._of_groups[group - 1] if group and self.groups else self

    @cached_property
    def _of_groups(self) -> list[AttentionBatch]:
        return [replace(self, **pages._asdict(), groups=()) for pages in self.groups]

    @property
    def num_positions(self) -> int:
        """How long the table of rotations must be."""
        return self.max_context_len if self.max_position is None else self.max_position + 1

    @cached_property
    def state_runs(self) -> list[tuple[int, int, int, bool, int]]:
        """For layers with recurrent states, by sequence: its slot, its rows' first and end, whether it begins here, and
        where its states are kept behind these rows, -1: nowhere."""
        assert self.state_slots_S is not None, "the batch does not say where its sequences' states are"
        kept = [-1] * self.num_sequences if self.kept_slots_S is None else self.kept_slots_S.tolist()
        slots, starts, lengths = (
            numbers.tolist() for numbers in (self.state_slots_S, self.query_start_S1, self.context_len_S)
        )
        runs = zip(slots, starts, starts[1:], lengths, kept, strict=False)
        return [(slot, first, end, length == end - first, target) for slot, first, end, length, target in runs]

    @property
    def state_slots_T(self) -> torch.Tensor | None:
        """``state_slots_S`` for every row."""
        if self.state_slots_S is None:
            return None
        return self.state_slots_S.repeat_interleave(self.query_start_S1.diff(), output_size=len(self.slots_T))

    @property
    def num_sequences(self) -> int:
        return self.context_len_S.shape[0]

    @cached_property
    def derived(self) -> dict[Hashable, AttentionBatch]:
        """Batches that were made of this one, for layers that see parts of the contexts only."""
        return {}

    @cached_property
    def cache_index_T(self) -> torch.Tensor:
        """The cache index of every row, int64."""
        if self.max_position is None:
            return self.positions_T
        lengths_S = self.query_start_S1[1:] - self.query_start_S1[:-1]
        behind_S = self.context_len_S - self.query_start_S1[1:]
        rows_T = torch.arange(len(self.slots_T), device=self.slots_T.device)
        return rows_T + behind_S.repeat_interleave(lengths_S, output_size=len(rows_T))
