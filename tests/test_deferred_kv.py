"""Deferred KV writes of the rows that exited on an earlier stage of a pipeline."""

from __future__ import annotations

import torch
from dynamoe.dynamic.parallel.deferred_kv import DeferredWrites, exited_rows, slots_read, take_vectors
from dynamoe.dynamic.parallel.plan import rows_to_write
from dynamoe.kernels.api.types import AttentionBatch

PAGE = 4


def deferred(*slots: int, with_vectors: bool = False) -> DeferredWrites:
    writes = DeferredWrites(PAGE)
    slots_R = torch.tensor(slots)
    x_RD = slots_R[:, None].float().expand(-1, 3) if with_vectors else None
    writes.add(exited_rows(rows_to_write(slots_R, slots_R, 98), 2, x_RD))
    return writes


def slots_of(writes: DeferredWrites) -> list[int]:
    return [row.slot for row in writes.take()]


def test_only_rows_on_pages_that_are_read_go() -> None:
    writes = deferred(1, 9, 2, 17, with_vectors=True)
    taken = writes.take({0: 4, 2: 4, 30: 4})
    assert [row.slot for row in taken] == [1, 2, 9]
    assert len(writes) == 1
    assert take_vectors(taken, 3, torch.device("cpu"))[:, 0].tolist() == [1, 2, 9]
    assert all(row.x_D is None for row in taken)
    assert take_vectors([], 3, torch.device("cpu")).shape == (0, 3)


def test_rows_behind_those_that_are_read_stay() -> None:
    writes = deferred(4, 5, 6)
    assert [row.slot for row in writes.take({1: 2})] == [4, 5]
    assert slots_of(writes) == [6]


def test_vectors_outlive_the_step_that_made_them() -> None:
    writes, x_RD = DeferredWrites(PAGE), torch.ones(1, 3)
    writes.add(exited_rows(rows_to_write(torch.tensor([5]), torch.tensor([5]), 5), 2, x_RD))
    x_RD.zero_()
    assert take_vectors(writes.take(), 3, torch.device("cpu")).tolist() == [[1, 1, 1]]


def test_a_new_owner_of_a_page_drops_the_writes_of_the_last_one() -> None:
    writes = deferred(5, 6, 7, 9)
    writes.overwrite([4])  # the first slot of the page of 5, 6 and 7
    assert writes.dropped == 3
    assert slots_of(writes) == [9]


def test_a_sequence_that_continues_keeps_the_writes_before() -> None:
    writes = deferred(4, 5)
    writes.overwrite([6, 7, 8])
    assert writes.dropped == 0
    assert slots_of(writes) == [4, 5]


def test_a_copied_page_drops_the_writes_that_were_deferred_there() -> None:
    writes = deferred(4, 5, 9)
    writes.drop({1})
    assert writes.dropped == 2
    assert slots_of(writes) == [9]


def test_entries_of_the_block_table_behind_the_context_are_not_read() -> None:
    batch = AttentionBatch(
        positions_T=torch.tensor([8, 3]),
        slots_T=torch.tensor([48, 23]),
        query_start_S1=torch.tensor([0, 1, 2], dtype=torch.int32),
        context_len_S=torch.tensor([9, 4], dtype=torch.int32),
        block_table_SM=torch.tensor([[7, 3, 12], [5, 0, 0]], dtype=torch.int32),
        max_query_len=1,
        max_context_len=9,
    )
    assert slots_read(batch, PAGE) == {7: 4, 3: 4, 12: 1, 5: 4}
