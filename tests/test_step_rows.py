"""The rows of a step: where their keys and values live, decodes and prompts alike."""

from __future__ import annotations

import numpy as np
import torch
from dynamoe.dynamic.engine.schedule import Entry
from dynamoe.dynamic.engine.staging import HostStaging
from dynamoe.dynamic.engine.step_rows import StepRows
from request_maker import make_sequence


def entry(tokens: list[int], pages: list[int], start: int, count: int = 1) -> Entry:
    sequence = make_sequence(tokens)
    sequence.pages.extend(pages)
    return Entry(sequence, start, count)


def test_rows_of_decodes_and_of_a_prompt() -> None:
    entries = [
        entry(list(range(10, 19)), [7, 2, 5], 8),
        entry([3, 4], [6], 1),
        entry([1, 2, 3, 4, 5, 6], [0, 10], 1, 4),  # a chunk over two pages
        entry(list(range(20, 28)), [1, 3], 7),  # the last slot of its page
        entry([9, 8], [4, 8, 9, 11], 0),  # with pages that nobody reads yet
    ]
    rows = StepRows(entries, 4, HostStaging(torch.device("cpu")))
    batch = rows.batch()
    assert len(rows) == 8
    assert rows.token_ids().tolist() == [18, 4, 2, 3, 4, 5, 27, 9]
    assert batch.positions_T.tolist() == [8, 1, 1, 2, 3, 4, 7, 0]
    assert batch.slots_T.tolist() == [20, 25, 1, 2, 3, 40, 15, 16]
    assert batch.query_start_S1.tolist() == [0, 1, 2, 6, 7, 8]
    assert batch.context_len_S.tolist() == [9, 2, 5, 8, 1]
    assert (batch.max_query_len, batch.max_context_len) == (4, 9)
    used = [[7, 2, 5], [6], [0, 10], [1, 3], [4]]
    assert batch.block_table_SM.shape == (5, 3)
    assert [row[: len(pages)] for row, pages in zip(batch.block_table_SM.tolist(), used, strict=True)] == used
    for name, dtype in {"positions_T": torch.int64, "slots_T": torch.int64, "query_start_S1": torch.int32}.items():
        assert getattr(batch, name).dtype == dtype
    kept = np.array([0, 2, 3, 4, 5, 7])
    some = rows.batch_of(kept, torch.from_numpy(kept))
    assert some.positions_T.tolist() == [8, 1, 2, 3, 4, 0]
    assert some.query_start_S1.tolist() == [0, 1, 5, 6]
    assert some.context_len_S.tolist() == [9, 5, 1]
