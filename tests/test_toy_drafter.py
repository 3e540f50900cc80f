"""A drafter that lives here runs through its protocol only: whatever it proposes, the output stays the same."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from dynamoe.dynamic.engine.plugins import load_plugins
from dynamoe.dynamic.engine.protocols import Drafter, SequenceSnapshot
from dynamoe.dynamic.engine.request import Sequence as Completion
from dynamoe.dynamic.engine.sampler import sample
from request_maker import make_sequence

VOCABULARY = 12


class Echo:
    """Proposes what followed the newest token when it came before."""

    def __init__(self) -> None:
        self.outputs: dict[tuple[str, int], list[int]] = {}

    def propose(self, sequences: Sequence[SequenceSnapshot], limits: Sequence[int]) -> list[list[int]]:
        return [self._propose(s, limit) for s, limit in zip(sequences, limits, strict=True)]

    def _propose(self, sequence: SequenceSnapshot, limit: int) -> list[int]:
        known = [*sequence.token_ids[: sequence.num_prompt], *self.outputs.get(sequence.key, [])]
        assert known == list(sequence.token_ids)
        for place in range(len(known) - 2, -1, -1):
            if known[place] == known[-1]:
                return known[place + 1 : place + 1 + limit]
        return []

    def accept(self, key: tuple[str, int], token_ids: Sequence[int]) -> None:
        self.outputs.setdefault(key, []).extend(token_ids)

    def rollback(self, key: tuple[str, int], count: int) -> None:
        del self.outputs[key][len(self.outputs[key]) - count :]

    def forget(self, key: tuple[str, int]) -> None:
        self.outputs.pop(key, None)


def model(token_ids: Sequence[int]) -> torch.Tensor:
    """Logits after some tokens, (1, V): a model that sees two tokens back and likes to repeat itself."""
    generator = torch.Generator().manual_seed(token_ids[-1] * VOCABULARY + token_ids[-2])
    return 3 * torch.randn(1, VOCABULARY, generator=generator)


def plainly(sequence: Completion, length: int) -> list[int]:
    while sequence.num_output < length:
        sequence.append(sample(model(sequence.token_ids), [sequence])[0])
    return sequence.token_ids[sequence.num_prompt :]


def with_drafts(sequence: Completion, drafter: Drafter, length: int) -> tuple[list[int], int]:
    """The rows of a draft are sampled one after the other; the first that differs from the draft is the last."""
    key, agreed = sequence.snapshot().key, 0
    while sequence.num_output < length:
        (draft,) = drafter.propose([sequence.snapshot()], [length - sequence.num_output - 1])
        # As rows of one step: logits of every prefix of the draft, before any of them is sampled.
        rows = [model([*sequence.token_ids, *draft[:n]]) for n in range(len(draft) + 1)]
        emitted: list[int] = []
        for logits_1V, drafted in zip(rows, [*draft, None], strict=True):
            (token,) = sample(logits_1V, [sequence])
            sequence.append(token)
            emitted.append(token)
            if token != drafted:
                break
            agreed += 1
        drafter.accept(key, emitted)
    return sequence.token_ids[sequence.num_prompt :], agreed


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"seed": 4},
        {"seed": 5, "temperature": 0.6, "top_p": 0.9},
        {"seed": 6, "top_k": 4, "frequency_penalty": 0.1, "min_tokens": 30, "max_tokens": 60},
    ],
)
def test_drafts_never_change_the_output(settings: dict) -> None:
    expected = plainly(make_sequence([1, 2], **settings), 60)
    found, agreed = with_drafts(make_sequence([1, 2], **settings), Echo(), 60)
    assert found == expected
    assert agreed > 3


def test_what_was_taken_back_comes_again() -> None:
    drafter, sequence = Echo(), make_sequence([1, 2], seed=4, frequency_penalty=0.3, max_tokens=60)
    expected, _ = with_drafts(sequence, drafter, 60)
    for kept in (59, 31, 0):
        count = sequence.num_output - kept
        sequence.rollback(count)
        drafter.rollback(sequence.snapshot().key, count)
        again, _ = with_drafts(sequence, drafter, 60)
        assert again == expected
    drafter.forget(sequence.snapshot().key)
    assert not drafter.outputs


def test_it_loads_as_a_plug_in_and_sees_its_draws() -> None:
    (plugin,) = load_plugins([f"{__file__}:Echo"], Drafter)
    assert plugin.implementation().propose([], []) == []
    sequence = make_sequence([1, 2], seed=4)
    snapshot = sequence.snapshot()
    assert snapshot.draws.peek(snapshot.num_output) == sequence.peek()
