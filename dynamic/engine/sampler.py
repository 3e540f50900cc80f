"""Choosing tokens. Every row is treated as if it were alone: its result does not depend on the rows beside it.

What happens to a row, in this order, the one of vLLM:

1. Log-probabilities that a request asks for are taken from the model's own logits.
2. Logits processors: allowed tokens, bad words, logit bias, min_tokens, plug-ins as they are listed, penalties, the
   form of the output (:data:`.logits_processors.ORDER`).
3. A greedy row takes its largest logit, the first of equals, and is done. If that fits the form of the output, the
   tokens that do are not looked for.
4. Filters: temperature, min-p, top-k, top-p.
5. The noise of this output position chooses among the tokens that are left (:mod:`.draws`).

Where the form of the output allows few tokens, only these are looked at from step 3 on.

Shape suffixes: R rows to sample, U those of them that are not decided yet, V vocabulary, H best tokens looked at, N
allowed tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from .draws import NO_TOKEN, choose_among_all, choose_listed, choose_tokens, keys_tensor
from .grammar_processor import GrammarProcessor
from .logits_processors import edit_logits
from .selection import block_sums, first_best, largest, on_host

if TYPE_CHECKING:
    from collections.abc import Sequence as TypeSequence

    import numpy as np

    from .protocols import LogitsProcessor
    from .request import Sequence
    from .sampling_params import SamplingParams

# A nucleus rarely needs more tokens than these, and picking them is far cheaper than sorting the vocabulary.
NUCLEUS_HEADS = (64, 1024)


def sample(logits_RV: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    """Choose the next token of each row's sequence.

    Arguments:
        logits_RV: float32; overwritten.
        sequences: one per row.

    Returns: token ids; :data:`NO_TOKEN` for a row that has no finite best logit, or whose sequence a plug-in or its
        form failed.
    """
    formed = [row for row, s in enumerate(sequences) if s.grammar is not None and s.failure is None]
    plain = [s.processors[:-1] if row in formed else s.processors for row, s in enumerate(sequences)]
    _edit(logits_RV, sequences, plain)
    tokens = _fitting(logits_RV, sequences, formed) if on_host(logits_RV) else {}
    formed = [row for row in formed if row not in tokens and sequences[row].failure is None]
    GrammarProcessor.compute_masks([g for row in formed if (g := sequences[row].grammar) is not None])
    few = _few_allowed(sequences, formed) if on_host(logits_RV) else {}
    masked = [row for row in formed if row not in few and sequences[row].failure is None]
    if masked:
        _edit(logits_RV, sequences, [s.processors[-1:] if row in masked else () for row, s in enumerate(sequences)])
    others = [row for row in range(len(sequences)) if row not in few and row not in tokens]
    greedy = [row for row in others if sequences[row].request.params.greedy]
    drawn = [row for row in others if not sequences[row].request.params.greedy]
    params, keys = [sequences[row].request.params for row in drawn], [sequences[row].peek() for row in drawn]
    if on_host(logits_RV):
        found = _largest(_rows(logits_RV, greedy)) if greedy else []
        found += draw_tokens(_rows(logits_RV, drawn), params, keys) if drawn else []
    else:  # the host waits for the device once, however many rows there are
        parts = []
        if greedy:
            best_R, tokens_R = _rows(logits_RV, greedy).max(-1)
            parts.append(torch.where(best_R.isfinite(), tokens_R, NO_TOKEN))
        if drawn:
            filtered = filter_logits(_rows(logits_RV, drawn), params)
            parts.append(choose_among_all(*filtered, keys_tensor(keys, logits_RV.device)))
        found = torch.cat(parts).tolist()
    tokens |= dict(zip(greedy + drawn, found, strict=True))
    tokens |= {row: _choose_among(logits_RV[row], ids_N, sequences[row]) for row, ids_N in few.items()}
    return [NO_TOKEN if s.failure else tokens[row] for row, s in enumerate(sequences)]


def _edit(
    logits_RV: torch.Tensor, sequences: list[Sequence], processors: TypeSequence[TypeSequence[LogitsProcessor]]
) -> None:
    for row, failure in edit_logits(logits_RV, processors).items():
        sequences[row].fail(*failure)


def _fitting(logits_RV: torch.Tensor, sequences: list[Sequence], formed: list[int]) -> dict[int, int]:
    """Of greedy rows whose output has a form: the best of all tokens, where it fits."""
    rows = [row for row in formed if sequences[row].request.params.greedy and sequences[row].failure is None]
    if not rows:
        return {}
    found = {}
    for row, token in zip(rows, _largest(_rows(logits_RV, rows)), strict=True):
        grammar = sequences[row].grammar
        try:
            if token != NO_TOKEN and grammar is not None and grammar.fits(token):
                found[row] = token
        except ValueError:  # found again when all tokens are looked for
            continue
    return found


def _few_allowed(sequences: list[Sequence], formed: list[int]) -> dict[int, np.ndarray]:
    """Of the rows whose form allows few tokens, these tokens."""
    found = {}
    for row in formed:
        sequence = sequences[row]
        if (grammar := sequence.grammar) is not None:
            try:
                if (ids_N := grammar.few_allowed()) is not None:
                    found[row] = ids_N
            except ValueError as error:
                sequence.fail(grammar, error)
    return found


def _choose_among(logits_V: torch.Tensor, ids_N: np.ndarray, sequence: Sequence) -> int:
    """A row's token out of these."""
    if not len(ids_N):
        return NO_TOKEN
    logits_N = logits_V.numpy()[ids_N]
    if len(ids_N) == 1:
        return int(ids_N[0]) if math.isfinite(logits_N[0]) else NO_TOKEN
    params, logits_1N = sequence.request.params, torch.from_numpy(logits_N)[None]
    if params.greedy:
        place = _largest(logits_1N)[0]
        return NO_TOKEN if place == NO_TOKEN else int(ids_N[place])
    scaled_1N, weights_1N = filter_logits(logits_1N, [params])
    return choose_listed(scaled_1N[0].numpy(), weights_1N[0].numpy(), sequence.peek(), ids_N)


def _largest(logits_RV: torch.Tensor) -> list[int]:
    tokens, best = first_best(logits_RV)
    return [token if math.isfinite(value) else NO_TOKEN for token, value in zip(tokens, best, strict=True)]


def _rows(logits_RV: torch.Tensor, rows: list[int]) -> torch.Tensor:
    if len(rows) == logits_RV.shape[0]:  # all, in their order
        return logits_RV
    return logits_RV[torch.tensor(rows, device=logits_RV.device)]


def draw_tokens(logits_RV: torch.Tensor, params: list[SamplingParams], keys: list[int]) -> list[int]:
    """Filter each row's distribution and draw a token from what is left.

    Tokens as likely as the last one that a filter keeps are kept too: which of several equals go must not depend on
    how they were sorted.

    Arguments:
        logits_RV: float32; overwritten.
        params: one per row; none of them greedy.
        keys: of each row's noise.

    Returns: token ids; ``NO_TOKEN`` for a row whose logits are not numbers.
    """
    return choose_tokens(*filter_logits(logits_RV, params), keys)


def filter_logits(logits_RV: torch.Tensor, params: list[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits over temperature, and their softmax with zeros for what the filters take out; see :func:`draw_tokens`."""
    temperatures = [p.temperature for p in params]
    scaled_RV = logits_RV
    if any(temperature != 1.0 for temperature in temperatures):
        scaled_RV = logits_RV.div_(_column(temperatures, logits_RV))
    weights_RV = scaled_RV.softmax(-1)
    floor_R1, floored_R1 = _floor(weights_RV, params)
    if floor_R1 is not None:
        _zero_below(weights_RV, floor_R1)
    if any(p.top_p < 1.0 for p in params):
        _keep_nucleus(weights_RV, params, floored_R1)
    return scaled_RV, weights_RV


def _zero_below(weights_RV: torch.Tensor, floor_R1: torch.Tensor) -> None:
    """Zero the weights below each row's floor, in place; on the host in one pass without a mask."""
    if not on_host(weights_RV):
        weights_RV.masked_fill_(weights_RV < floor_R1, 0.0)
        return
    below = torch.nextafter(floor_R1, torch.full_like(floor_R1, -1.0)).squeeze(1).tolist()
    for weights_V, limit in zip(weights_RV, below, strict=True):
        if limit > 0.0:
            torch.threshold_(weights_V, limit, 0.0)


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _floor(weights_RV: torch.Tensor, params: list[SamplingParams]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The least weight that min-p and top-k keep in each row, and which rows have such a limit."""
    vocabulary = weights_RV.shape[1]
    top_k = [p.top_k if 0 < p.top_k < vocabulary else 0 for p in params]
    limited = [k > 0 or p.min_p > 0.0 for k, p in zip(top_k, params, strict=True)]
    if not any(limited):
        return None, None
    # Each keeps a beginning of the falling order, so the two together keep the shorter beginning.
    floor_R1 = weights_RV.amax(-1, keepdim=True) * _column([p.min_p for p in params], weights_RV)
    if any(top_k):
        best_RK, _ = largest(weights_RV, max(top_k))
        last_R1 = torch.tensor([max(k - 1, 0) for k in top_k], device=weights_RV.device)[:, None]
        has_k_R1 = torch.tensor([k > 0 for k in top_k], device=weights_RV.device)[:, None]
        kth_R1 = best_RK.gather(1, last_R1).masked_fill_(~has_k_R1, 0.0)
        floor_R1 = torch.maximum(floor_R1, kth_R1)
    return floor_R1, torch.tensor(limited, device=weights_RV.device)[:, None]


def _keep_nucleus(weights_RV: torch.Tensor, params: list[SamplingParams], floored_R1: torch.Tensor | None) -> None:
    """Zero all weights but the smallest set of best tokens that holds ``top_p`` of the row's sum (Holtzman 2019)."""
    vocabulary = weights_RV.shape[1]
    goal_R1 = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=weights_RV.device)[:, None]
    if floored_R1 is not None:  # rows without a limit sum to 1
        total_R1 = block_sums(weights_RV).cumsum(-1)[:, -1:]
        goal_R1 = goal_R1 * torch.where(floored_R1, total_R1, 1.0)
    least_R1 = torch.zeros_like(goal_R1, dtype=torch.float32)
    open_U = torch.tensor([row for row, p in enumerate(params) if p.top_p < 1.0], device=weights_RV.device)
    # A device sorts all tokens rather than wait for the host to ask whether few were enough.
    heads = NUCLEUS_HEADS if on_host(weights_RV) else ()
    for head in (*(h for h in heads if h < vocabulary), vocabulary):
        rows_UV = weights_RV if len(open_U) == len(params) else weights_RV[open_U]
        best_UH, _ = largest(rows_UV, head)
        least_R1[open_U], reached_U1 = _nucleus_limit(best_UH, goal_R1[open_U])
        if head == vocabulary:
            break
        open_U = open_U[~reached_U1.squeeze(1)]
        if not len(open_U):
            break
    _zero_below(weights_RV, least_R1)


def _nucleus_limit(best_RH: torch.Tensor, goal_R1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight of the token with which the falling weights reach the goal, and whether they do."""
    cumulative_RH = best_RH.cumsum(-1, dtype=torch.float64)
    place_R1 = torch.searchsorted(cumulative_RH, goal_R1).clamp_(max=best_RH.shape[1] - 1)
    return best_RH.gather(1, place_R1), cumulative_RH[:, -1:] >= goal_R1
