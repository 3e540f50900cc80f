"""The loss of served requests: how far their outputs are from the full model's.

Each token is judged after the *served* prefix, in one full pass over prompt and output. The loss of a greedy token is
whether the full model would have chosen another one; that of a drawn token is the total-variation distance between the
distribution that it was drawn from and the full model's. A completion's loss is the mean over its tokens, a request's
the mean over its completions: each of these is as likely as a request of one completion.

Shape suffixes as in ``kernels/api/types.py``; R rows that chose a token.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch

from ...exits.segments import Segment
from ..engine.outputs import CompletionOutput, RequestOutput
from ..engine.sampling_params import GREEDY_EPSILON
from ..model.decoder import Decoder
from ..model.prompt_pass import fresh_cache

_ROWS = 4096  # of a pass
_LOGIT_BYTES = 64 << 20
_T = TypeVar("_T")
Steps = Generator[None, None, _T]
_Group = list[tuple[int, CompletionOutput]]  # numbers of requests, completions


def disagreements(decoder: Decoder, outputs: Sequence[RequestOutput]) -> np.ndarray:
    """The share of each request's served tokens that differ from the full model's choice, float64, (N,).

    First tokens, which come from the full prompt pass, are included. A request without a token has loss 0.
    """
    return losses(decoder, outputs, 0.0)


def losses(decoder: Decoder, outputs: Sequence[RequestOutput], temperature: float) -> np.ndarray:
    """The loss of each request, between 0 and 1, float64, (N,): :func:`disagreements`, or with a temperature the mean
    distance between served and full distributions.

    Arguments:
        outputs: with a temperature, including the states that the tokens were chosen from (``keep_states``).
        temperature: of these requests; 0 is greedy.
    """
    return np.array([request_loss(found) for found in token_losses(decoder, outputs, temperature)])


def token_losses(
    decoder: Decoder, outputs: Sequence[RequestOutput], temperature: float, served: Decoder | None = None
) -> list[list[np.ndarray]]:
    """The losses of every served token, float64: of each request, those of each completion that has tokens.

    Arguments:
        outputs, temperature: see :func:`losses`.
        served: whose LM head made the distributions that tokens were drawn from; None: ``decoder``.
    """
    return _run(loss_steps(decoder, outputs, temperature, served))


def request_loss(completions: Sequence[np.ndarray]) -> float:
    """The loss of a request from those of its completions' tokens."""
    return float(np.mean([losses_T.mean() for losses_T in completions])) if completions else 0.0


@torch.inference_mode()
def loss_steps(
    decoder: Decoder, outputs: Sequence[RequestOutput], temperature: float, served: Decoder | None = None
) -> Steps[list[list[np.ndarray]]]:
    """:func:`token_losses`, yielding after every layer; others may use the model in between."""
    found: list[list[np.ndarray]] = [[] for _ in outputs]
    for group in _groups(outputs):
        sequences = [[*outputs[n].prompt_token_ids, *completion.token_ids] for n, completion in group]
        x_RD = yield from _state_steps(decoder, sequences, [len(outputs[n].prompt_token_ids) for n, _ in group])
        if temperature < GREEDY_EPSILON:
            loss_R = _greedy_losses(decoder, x_RD, group)
        else:
            loss_R = _distances(decoder, served or decoder, x_RD, group, temperature)
        lengths = [len(completion.token_ids) for _, completion in group]
        for (number, _), loss_T in zip(group, loss_R.split(lengths), strict=True):
            found[number].append(loss_T.numpy())
    return found


def _greedy_losses(decoder: Decoder, x_RD: torch.Tensor, group: _Group) -> torch.Tensor:
    choices_R = torch.cat([decoder.logits(part).argmax(-1).cpu() for part in x_RD.split(_rows_at_once(decoder))])
    served_R = torch.tensor([token for _, completion in group for token in completion.token_ids])
    return (choices_R != served_R).double()


def _distances(
    decoder: Decoder, serving: Decoder, x_RD: torch.Tensor, group: _Group, temperature: float
) -> torch.Tensor:
    """Total-variation distances, float64, (R,), each at most 1."""
    for _, completion in group:
        assert len(completion.states) == len(completion.token_ids), "requests that sample are judged by their states"
    served_RD = torch.stack([state for _, completion in group for state in completion.states]).to(x_RD.device)
    found = []
    for full, served in zip(*(x.split(_rows_at_once(decoder)) for x in (x_RD, served_RD)), strict=True):
        p, q = ((head.logits(x) / temperature).softmax(-1) for head, x in ((decoder, full), (serving, served)))
        found.append((p - q).abs().sum(-1).double().cpu() / 2)
    return torch.cat(found).clamp(max=1.0)


def _rows_at_once(decoder: Decoder) -> int:
    return max(1, _LOGIT_BYTES // (4 * decoder.spec.vocab_size))


def full_states(decoder: Decoder, sequences: Sequence[Sequence[int]], firsts: Sequence[int]) -> torch.Tensor:
    """The full model's inputs to the LM head for the tokens from ``firsts`` on, float32, (R, D).

    Arguments:
        sequences: token ids, prompt and output.
        firsts: position of the first judged token in each sequence, at least 1.
    """
    return _run(_state_steps(decoder, sequences, firsts))


@torch.inference_mode()
def _state_steps(decoder: Decoder, sequences: Sequence[Sequence[int]], firsts: Sequence[int]) -> Steps[torch.Tensor]:
    device = torch.device(decoder.device)
    lengths = [len(tokens) - 1 for tokens in sequences]
    kv, batch = fresh_cache(decoder, lengths)
    rows = torch.tensor([token for tokens in sequences for token in tokens[:-1]], device=device)
    x_TD = rows
    for layer in range(decoder.spec.num_layers):
        yield
        if layer == 0:  # not before the yield: a step must not separate a ParallelDecoder's ids from their first layer
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


def _groups(outputs: Sequence[RequestOutput]) -> Iterator[_Group]:
    """Every completion that has tokens, in groups of one pass."""
    group: _Group = []
    rows = 0
    for number, output in enumerate(outputs):
        for completion in output.outputs:
            if not completion.token_ids:
                continue
            length = len(output.prompt_token_ids) + len(completion.token_ids)
            if group and rows + length > _ROWS:
                yield group
                group, rows = [], 0
            group.append((number, completion))
            rows += length
    if group:
        yield group
