"""The rows of a step: decodes alone, which take a way of their own, are what they are beside a prompt."""

from __future__ import annotations

import torch
from dynamoe.dynamic.engine.request import Request, Sequence, StopTokens
from dynamoe.dynamic.engine.scheduler import Entry
from dynamoe.dynamic.engine.step_rows import StepRows
from dynamoe.dynamic.sampling_params import SamplingParams

PAGE = 4


def sequence_of(tokens: list[int], pages: list[int]) -> Sequence:
    request = Request(
        "r",
        tokens,
        SamplingParams(),
        priority=0,
        cache_salt=None,
        arrival=0,
        max_total_tokens=99,
        stop_tokens=StopTokens(eos=frozenset(), listed=frozenset()),
        base_seed=0,
    )
    sequence = request.sequences[0]
    sequence.pages.extend(pages)
    return sequence


def test_decodes_alone_are_the_same_rows_as_beside_a_prompt() -> None:
    device = torch.device("cpu")
    decodes = [
        Entry(sequence_of(list(range(10, 19)), [7, 2, 5]), 8, 1),
        Entry(sequence_of([3, 4], [6]), 1, 1),
        Entry(sequence_of(list(range(20, 28)), [1, 3]), 7, 1),  # the last slot of its page
        Entry(sequence_of([9, 8], [4, 8, 9, 11]), 0, 1),  # with pages that nobody reads yet
    ]
    prompt = Entry(sequence_of([1, 2, 3, 4, 5], [0, 10]), 0, 5)
    alone, beside = StepRows(decodes, PAGE, device), StepRows([*decodes, prompt], PAGE, device)
    count = len(decodes)
    assert len(alone) == count
    assert alone.token_ids().tolist() == beside.token_ids()[:count].tolist() == [18, 4, 27, 9]
    one, other = alone.batch(), beside.batch()
    assert one.positions_T.tolist() == other.positions_T[:count].tolist() == [8, 1, 7, 0]
    assert one.slots_T.tolist() == other.slots_T[:count].tolist() == [20, 25, 15, 16]
    assert one.query_start_S1.tolist() == other.query_start_S1[: count + 1].tolist()
    assert one.context_len_S.tolist() == other.context_len_S[:count].tolist() == [9, 2, 8, 1]
    for row, pages in enumerate((3, 1, 2, 1)):
        assert one.block_table_SM[row, :pages].tolist() == other.block_table_SM[row, :pages].tolist()
    assert (one.max_query_len, one.max_context_len) == (1, 9)
    for name in ("positions_T", "slots_T", "query_start_S1", "context_len_S", "block_table_SM"):
        assert getattr(one, name).dtype == getattr(other, name).dtype
    assert alone.batch_of(torch.tensor([0, 2]).numpy()).positions_T.tolist() == [8, 7]
