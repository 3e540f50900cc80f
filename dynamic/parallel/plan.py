"""What rank 0 tells the others, as integers: a fixed header and one block of numbers behind it.

A message is one broadcast of ``FIRST`` int64; what does not fit follows in a second one, whose length the header says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch

from ...kernels.api.types import AttentionBatch, ExpertBudget, GroupPages
from ..model.kv_cache import Copies

FIRST = 2048
ARGUMENTS, BLOCKS = 6, 10
HEADER = 2 + ARGUMENTS + BLOCKS


class Operation(IntEnum):
    """What the workers do next."""

    STOP = 0
    ALLOCATE = 1  # pages, tokens per page, KV shards, slots of recurrent states; pages of groups with windows
    COPY = 2  # how many slots of states, and pages by group of layers; all pairs of them that are read, and written
    RUN = 3  # layers from, to; longest query, longest context; number of sequences; whether routers' entropy is wanted
    PROPAGATE = 4  # layers in front of the exit; highest position; groups of layers
    DECIDE = 5  # layers in front of the exit
    FREE = 6
    EMBED = 7  # token ids
    LOGITS = 8  # rows
    LOADS = 9  # a window ends in which experts' loads were counted
    MOVE = 10  # layer, ranks of the expert axis; the experts in each rank's places


@dataclass(frozen=True, kw_only=True)
class Message:
    """One instruction: at most 6 numbers, and at most 10 blocks of them; ``cache`` says by number on which cache."""

    operation: Operation
    cache: int = 0
    arguments: tuple[int, ...] = ()
    blocks: tuple[torch.Tensor, ...] = ()

    def encode(self) -> torch.Tensor:
        """Everything in one int64 vector of at least ``FIRST`` entries."""
        assert len(self.arguments) <= ARGUMENTS
        assert len(self.blocks) <= BLOCKS
        sizes = [block.numel() for block in self.blocks]
        header = [int(self.operation), self.cache, *_padded(self.arguments, ARGUMENTS), *_padded(sizes, BLOCKS)]
        parts = [torch.tensor(header), *(block.reshape(-1).to("cpu", torch.int64) for block in self.blocks)]
        total = HEADER + sum(sizes)
        return torch.cat([*parts, torch.zeros(max(FIRST - total, 0), dtype=torch.int64)])


def length(first: torch.Tensor) -> int:
    """Entries of the whole message, from its first ``FIRST``."""
    return HEADER + int(first[2 + ARGUMENTS : HEADER].sum())


def decode(numbers: torch.Tensor) -> Message:
    """The message; it always has 6 arguments and 10 blocks, zeros and empty ones where none was given."""
    header = numbers[:HEADER].tolist()
    sizes = header[2 + ARGUMENTS :]
    blocks = numbers[HEADER : HEADER + sum(sizes)].split(sizes)
    operation, cache, *arguments = header[: 2 + ARGUMENTS]
    return Message(operation=Operation(operation), cache=cache, arguments=tuple(arguments), blocks=tuple(blocks))


def _padded(numbers: Sequence[int], count: int) -> list[int]:
    return [*numbers, *[0] * (count - len(numbers))]


def allocate_message(cache: int, sizes: tuple[int, ...], window_pages: Sequence[int]) -> Message:
    """Allocate a cache: the arguments of :meth:`.Decoder.allocate_cache`, the last one by itself."""
    blocks = (torch.tensor(window_pages, dtype=torch.int64),)
    return Message(operation=Operation.ALLOCATE, cache=cache, arguments=sizes, blocks=blocks)


def copy_message(cache: int, *copies: Copies) -> Message:
    """Copy recurrent states, and whole pages by group of layers."""
    counts, pairs = [len(some) for some in copies], [pair for some in copies for pair in some]
    blocks = (torch.tensor(counts), torch.tensor(pairs, dtype=torch.int64))
    return Message(operation=Operation.COPY, cache=cache, blocks=blocks)


def read_copies(message: Message) -> list[Copies]:
    """What :func:`copy_message` was given."""
    counts, pairs = message.blocks[:2]
    return [[(source, target) for source, target in some.tolist()] for some in pairs.view(-1, 2).split(counts.tolist())]


def run_message(
    cache: int,
    layers: range,
    token_ids_T: torch.Tensor | None,
    batch: AttentionBatch,
    budget: ExpertBudget | None,
    entropy: bool = False,
) -> Message:
    """Run some layers.

    Arguments:
        cache: its number.
        token_ids_T: of the rows, where they begin; None goes on with those of the last message whose slots are named.
        entropy: whether the mean entropy of the routers is wanted.
    """
    blocks = [
        batch.positions_T,
        _slots(batch),
        batch.query_start_S1,
        batch.context_len_S,
        torch.stack([batch.block_table_SM, *(pages.block_table_SM for pages in batch.groups)]),
        torch.empty(0) if token_ids_T is None else token_ids_T,
        torch.empty(0) if batch.state_slots_S is None else batch.state_slots_S,
        torch.empty(0) if batch.kept_slots_S is None else batch.kept_slots_S,
    ]
    if budget is not None:
        blocks += [budget.keep_TL.float().contiguous().view(torch.int32), budget.cap_TL]
    arguments = (layers.start, layers.stop, batch.max_query_len, batch.max_context_len, batch.num_sequences, entropy)
    blocks = [block.cpu() for block in blocks]
    return Message(operation=Operation.RUN, cache=cache, arguments=arguments, blocks=tuple(blocks))


def read_batch(message: Message) -> AttentionBatch:
    """The rows of :func:`run_message`, on the host."""
    positions, slots, starts, lengths, table, _, states, kept = message.blocks[:8]
    slots, *more_slots = slots.view(-1, len(positions))
    table, *more_tables = table.int().view(1 + len(more_slots), message.arguments[4], -1)
    return AttentionBatch(
        positions_T=positions,
        slots_T=slots,
        query_start_S1=starts.int(),
        context_len_S=lengths.int(),
        block_table_SM=table,
        max_query_len=message.arguments[2],
        max_context_len=message.arguments[3],
        max_position=int(positions.max()),
        state_slots_S=states if states.numel() else None,
        kept_slots_S=kept if kept.numel() else None,
        groups=tuple(map(GroupPages, more_slots, more_tables)),
    )


def _slots(batch: AttentionBatch) -> torch.Tensor:
    """Of all groups of layers, one behind the other."""
    return torch.cat([batch.slots_T, *(pages.slots_T for pages in batch.groups)])


def exit_message(cache: int, after_layers: int, batch: AttentionBatch) -> Message:
    """Rows exit; where each is written is read of the batch, with the states of its sequence."""
    states_R = batch.state_slots_T
    blocks = batch.positions_T.cpu(), _slots(batch).cpu(), torch.empty(0) if states_R is None else states_R.cpu()
    arguments = (after_layers, batch.num_positions - 1, 1 + len(batch.groups))
    return Message(operation=Operation.PROPAGATE, cache=cache, arguments=arguments, blocks=blocks)


def read_exited(message: Message) -> AttentionBatch:
    """The rows of :func:`exit_message`: a batch for writing to the cache only, on the host."""
    positions_R, slots, states_R = message.blocks[:3]
    slots_R, *more_slots = slots.view(message.arguments[2], -1)
    states = states_R if states_R.numel() else None
    return rows_to_write(positions_R, slots_R, message.arguments[1], states, more_slots)


def rows_to_write(
    positions_R: torch.Tensor,
    slots_R: torch.Tensor,
    max_position: int,
    states_R: torch.Tensor | None = None,
    group_slots: Sequence[torch.Tensor] = (),
) -> AttentionBatch:
    """A batch for writing to the cache only.

    Arguments:
        states_R: where each row's sequence has its recurrent states, if it has any; rows of a sequence are neighbours.
        group_slots: of the rows in groups of layers behind the first.
    """
    empty = torch.empty(0, dtype=torch.int32)
    batch = AttentionBatch(
        positions_T=positions_R,
        slots_T=slots_R,
        query_start_S1=empty,
        context_len_S=empty,
        block_table_SM=empty,
        max_query_len=1,
        max_context_len=0,
        max_position=max_position,
        groups=tuple(GroupPages(slots, empty) for slots in group_slots),
    )
    if states_R is None:
        return batch
    slots_S, counts_S = states_R.unique_consecutive(return_counts=True)
    ends_S = counts_S.cumsum(0)
    starts_S1 = torch.cat((ends_S.new_zeros(1), ends_S))
    lengths_S = positions_R[ends_S - 1] + 1
    return replace(
        batch,
        query_start_S1=starts_S1.int(),
        context_len_S=lengths_S.int(),
        max_query_len=int(counts_S.max()) if len(counts_S) else 1,
        state_slots_S=slots_S,
    )


def read_budget(message: Message, num_rows: int, device: torch.device) -> ExpertBudget | None:
    """The expert budget of :func:`run_message`."""
    keep, cap = message.blocks[8:10]
    if not keep.numel():
        return None
    return ExpertBudget(
        keep_TL=keep.int().view(torch.float32).view(num_rows, -1).to(device),
        cap_TL=cap.int().view(num_rows, -1).to(device),
        skipped_T=torch.zeros(num_rows, dtype=torch.int64, device=device),
    )
