"""The loss of served requests: how many of their tokens are not what the full model would have chosen.

Each served token is judged after the prefix that was *served* before it, in one full pass over prompt and output.

Shape suffixes as in ``kernels/types.py``; R rows that chose a token.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch

from ..exits.segments import Segment
from .decoder import Decoder
from .outputs import RequestOutput
from .prompt_pass import fresh_cache

_ROWS = 4096  # of a pass
_LOGIT_BYTES = 64 << 20
_T = TypeVar("_T")
Steps = Generator[None, None, _T]


def disagreements(decoder: Decoder, outputs: Sequence[RequestOutput]) -> np.ndarray:
    """The share of each request's served tokens that differ from the full model's choice, float64, (N,).

    All completions of a request count together. The first token comes from the prompt, which always runs in full; it
    counts as served like the others. A request without a token has no loss: 0.
    """
    return _run(disagreement_steps(decoder, outputs))


@torch.inference_mode()
def disagreement_steps(decoder: Decoder, outputs: Sequence[RequestOutput]) -> Steps[np.ndarray]:
    """:func:`disagreements`, layer by layer: what it yields says nothing; others may use the model in between."""
    wrong, served = np.zeros(len(outputs)), np.zeros(len(outputs))
    for group in _groups(outputs):
        sequences, firsts = [tokens for _, tokens, _ in group], [first for _, _, first in group]
        choices_R = yield from _choice_steps(decoder, sequences, firsts)
        start = 0
        for number, tokens, first in group:
            count = len(tokens) - first
            said_L = torch.tensor(tokens[first:])
            wrong[number] += int((choices_R[start : start + count] != said_L).sum())
            served[number] += count
            start += count
    return wrong / np.maximum(served, 1)


def full_states(decoder: Decoder, sequences: Sequence[Sequence[int]], firsts: Sequence[int]) -> torch.Tensor:
    """What the full model hands to its read-out in front of the tokens from ``firsts`` on, float32, (R, D).

    Arguments:
        sequences: token ids, prompt and output; firsts: in each, the position of the first token that is judged, at
            least 1.
    """
    return _run(_state_steps(decoder, sequences, firsts))


@torch.inference_mode()
def _choice_steps(decoder: Decoder, sequences: Sequence[Sequence[int]], firsts: Sequence[int]) -> Steps[torch.Tensor]:
    x_RD = yield from _state_steps(decoder, sequences, firsts)
    chunk = max(1, _LOGIT_BYTES // (4 * decoder.spec.vocab_size))
    return torch.cat([decoder.logits(part).argmax(-1).cpu() for part in x_RD.split(chunk)])


@torch.inference_mode()
def _state_steps(decoder: Decoder, sequences: Sequence[Sequence[int]], firsts: Sequence[int]) -> Steps[torch.Tensor]:
    device = torch.device(decoder.device)
    lengths = [len(tokens) - 1 for tokens in sequences]
    kv, batch = fresh_cache(decoder, lengths)
    rows = torch.tensor([token for tokens in sequences for token in tokens[:-1]], device=device)
    x_TD = rows
    for layer in range(decoder.spec.num_layers):
        yield
        if layer == 0:  # not before: a step in between would come between a ParallelDecoder's ids and their first layer
            x_TD = decoder.embed(rows)
        x_TD = decoder.run_segment(Segment(index=layer, layers=range(layer, layer + 1)), x_TD, kv, batch)
    yield
    taken, start = [], 0
    for length, first in zip(lengths, firsts, strict=True):
        taken.append(torch.arange(start + first - 1, start + length))
        start += length
    return x_TD[torch.cat(taken).to(device)]


def _run(steps: Steps[_T]) -> _T:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def _groups(outputs: Sequence[RequestOutput]) -> Iterator[list[tuple[int, list[int], int]]]:
    """(request, tokens, first judged) of every completion that has tokens, as many together as one pass takes."""
    group: list[tuple[int, list[int], int]] = []
    rows = 0
    for number, output in enumerate(outputs):
        for completion in output.outputs:
            if not completion.token_ids:
                continue
            tokens = [*output.prompt_token_ids, *completion.token_ids]
            if group and rows + len(tokens) > _ROWS:
                yield group
                group, rows = [], 0
            group.append((number, tokens, len(output.prompt_token_ids)))
            rows += len(tokens)
    if group:
        yield group
