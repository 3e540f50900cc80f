"""The package's own logits processors, but for the one of grammars, and how a step's rows go through all of them.

:data:`ORDER` is the order in which they edit a row, the one of vLLM; what follows them is in :mod:`.sampler`.

All but the list of allowed tokens touch few tokens of the vocabulary, so they are kept and applied as lists of (row,
token) entries that change by one token a step, never as tables over the vocabulary.

Shape suffixes: R rows, V vocabulary, N (row, token) entries.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch

from .grammar_processor import GrammarProcessor
from .protocols import LogitsProcessor, ProcessorContext
from .reasoning import ReasoningProcessor
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

FORBIDDEN = float("-inf")


class _OfRows:
    """A processor that edits many rows as cheaply as one."""

    changes_distribution: ClassVar[bool] = True

    @staticmethod
    def edit_rows(logits_RV: torch.Tensor, rows: list[int], processors: list[Any]) -> None:
        """Edit some rows, each for its own processor of this kind."""
        raise NotImplementedError

    def edit(self, logits_V: torch.Tensor) -> None:
        self.edit_rows(logits_V[None], [0], [self])

    def accept(self, token_id: int) -> None:
        """Nothing to remember."""

    def rollback(self, count: int) -> None:
        """Nothing was remembered."""

    def fork(self) -> Self:
        return self


class AllowedTokens(_OfRows):
    """``allowed_token_ids``: forbids all tokens but these."""

    def __init__(self, context: ProcessorContext) -> None:
        self._ids = torch.tensor(context.params.allowed_token_ids)
        self._forbidden_V: torch.Tensor | None = None

    @staticmethod
    def needed(params: SamplingParams) -> bool:
        return params.allowed_token_ids is not None

    @staticmethod
    def edit_rows(logits_RV: torch.Tensor, rows: list[int], processors: list[AllowedTokens]) -> None:
        for row, processor in zip(rows, processors, strict=True):
            logits_RV[row].masked_fill_(processor._mask(logits_RV[row]), FORBIDDEN)

    def _mask(self, like_V: torch.Tensor) -> torch.Tensor:
        if self._forbidden_V is None:
            self._forbidden_V = torch.ones_like(like_V, dtype=torch.bool)
            self._forbidden_V[self._ids.to(like_V.device)] = False
        return self._forbidden_V


class BadWords(_OfRows):
    """``bad_words``: forbids the last token of a word whose other tokens the output ends with."""

    def __init__(self, context: ProcessorContext) -> None:
        assert context.tokenizer is not None
        self._words = word_token_ids(context.tokenizer, context.params.bad_words)
        self._output = array("i")

    @staticmethod
    def needed(params: SamplingParams) -> bool:
        return bool(params.bad_words)

    @staticmethod
    def edit_rows(logits_RV: torch.Tensor, rows: list[int], processors: list[BadWords]) -> None:
        _forbid(logits_RV, ((row, token) for row, p in zip(rows, processors, strict=True) for token in p._forbidden()))

    def _forbidden(self) -> Iterable[int]:
        output = self._output
        return (
            word[-1]
            for word in self._words
            if len(word) == 1 or output[-len(word) + 1 :] == word[:-1]  # a shorter output equals no beginning
        )

    def accept(self, token_id: int) -> None:
        self._output.append(token_id)

    def rollback(self, count: int) -> None:
        del self._output[len(self._output) - count :]

    def fork(self) -> Self:
        copy = type(self).__new__(type(self))
        copy._words, copy._output = self._words, self._output[:]
        return copy


class LogitBias(_OfRows):
    """``logit_bias``: adds to the logits of some tokens."""

    def __init__(self, context: ProcessorContext) -> None:
        self._biases = list(context.params.logit_bias.items())

    @staticmethod
    def needed(params: SamplingParams) -> bool:
        return bool(params.logit_bias)

    @staticmethod
    def edit_rows(logits_RV: torch.Tensor, rows: list[int], processors: list[LogitBias]) -> None:
        entries = [(row, *bias) for row, p in zip(rows, processors, strict=True) for bias in p._biases]
        rows_N, tokens_N, biases_N = zip(*entries, strict=True)
        device = logits_RV.device
        index = (torch.tensor(rows_N, device=device), torch.tensor(tokens_N, device=device))
        logits_RV[index] = logits_RV[index] + torch.tensor(biases_N, dtype=torch.float32, device=device)


class MinTokens(_OfRows):
    """``min_tokens``: forbids the tokens that would end the output too early."""

    def __init__(self, context: ProcessorContext) -> None:
        self._stops = sorted(context.stop_token_ids)
        self._missing = context.params.min_tokens

    @staticmethod
    def needed(params: SamplingParams) -> bool:
        return params.min_tokens > 0

    @staticmethod
    def edit_rows(logits_RV: torch.Tensor, rows: list[int], processors: list[MinTokens]) -> None:
        short = ((row, p) for row, p in zip(rows, processors, strict=True) if p._missing > 0)
        _forbid(logits_RV, ((row, token) for row, p in short for token in p._stops))

    def accept(self, token_id: int) -> None:
        self._missing -= 1

    def rollback(self, count: int) -> None:
        self._missing += count

    def fork(self) -> Self:
        copy = type(self).__new__(type(self))
        copy._stops, copy._missing = self._stops, self._missing
        return copy


class TokenCounts:
    """The distinct tokens of a prompt and its output, and how often the output holds each."""

    def __init__(self, prompt_token_ids: Sequence[int]) -> None:
        distinct = np.unique(np.asarray(prompt_token_ids, dtype=np.int64))
        self._place = {token: i for i, token in enumerate(distinct.tolist())}
        self._ids = distinct
        self._counts = np.zeros(len(distinct), dtype=np.float32)
        self._size = self._num_prompt = len(distinct)
        self._output = array("i")

    def add(self, token_id: int) -> None:
        """Count one more output token."""
        place = self._place.setdefault(token_id, self._size)
        if place == self._size:
            if self._size == len(self._ids):
                room = max(64, self._size)
                self._ids = np.concatenate([self._ids, np.zeros(room, np.int64)])
                self._counts = np.concatenate([self._counts, np.zeros(room, np.float32)])
            self._ids[place], self._counts[place] = token_id, 0.0
            self._size += 1
        self._counts[place] += 1.0
        self._output.append(token_id)

    def remove_last(self) -> None:
        """Take the newest output token back."""
        token_id = self._output.pop()
        place = self._place[token_id]
        self._counts[place] -= 1.0
        if self._counts[place] == 0 and place >= self._num_prompt:  # then it is the one that was found last
            del self._place[token_id]
            self._size -= 1

    def copy(self) -> TokenCounts:
        """Counts that go their own way from here."""
        other = TokenCounts(())
        other._place, other._ids, other._counts = self._place.copy(), self._ids.copy(), self._counts.copy()
        other._size, other._num_prompt, other._output = self._size, self._num_prompt, self._output[:]
        return other

    @property
    def ids(self) -> np.ndarray:
        """Distinct tokens, int64."""
        return self._ids[: self._size]

    @property
    def counts(self) -> np.ndarray:
        """How often the output holds each of ``ids``, float32; 0 for tokens of the prompt alone."""
        return self._counts[: self._size]


class Penalties(_OfRows):
    """``repetition_penalty``, ``frequency_penalty`` and ``presence_penalty``."""

    def __init__(self, context: ProcessorContext) -> None:
        params = context.params
        self._settings = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        self.counts = TokenCounts(context.prompt_token_ids)

    @staticmethod
    def needed(params: SamplingParams) -> bool:
        return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0

    @staticmethod
    def edit_rows(logits_RV: torch.Tensor, rows: list[int], processors: list[Penalties]) -> None:
        sizes = [len(p.counts.ids) for p in processors]
        device = logits_RV.device

        def spread(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.repeat(values, sizes)).to(device)

        settings = np.asarray([p._settings for p in processors], dtype=np.float32)
        repetition_N, presence_N, frequency_N = map(spread, settings.T)
        rows_N = spread(np.asarray(rows))
        ids_N = torch.from_numpy(np.concatenate([p.counts.ids for p in processors])).to(device)
        counts_N = torch.from_numpy(np.concatenate([p.counts.counts for p in processors])).to(device)
        values_N = logits_RV[rows_N, ids_N]
        values_N = torch.where(values_N > 0, values_N / repetition_N, values_N * repetition_N)
        values_N = values_N - frequency_N * counts_N - presence_N * (counts_N > 0)
        logits_RV[rows_N, ids_N] = values_N

    def accept(self, token_id: int) -> None:
        self.counts.add(token_id)

    def rollback(self, count: int) -> None:
        for _ in range(count):
            self.counts.remove_last()

    def fork(self) -> Self:
        copy = type(self).__new__(type(self))
        copy._settings, copy.counts = self._settings, self.counts.copy()
        return copy


# How processors follow each other. LogitsProcessor stands for the plug-ins, in the order in which they are given.
ORDER: tuple[Any, ...] = (
    *(AllowedTokens, BadWords, LogitBias, MinTokens, LogitsProcessor, Penalties),
    *(ReasoningProcessor, GrammarProcessor),
)


def processor_classes(plugins: Iterable[type[LogitsProcessor]] = ()) -> tuple[type[LogitsProcessor], ...]:
    """All kinds of processors of an engine, in :data:`ORDER`."""
    place = ORDER.index(LogitsProcessor)
    return (*ORDER[:place], *plugins, *ORDER[place + 1 :])


def changes_distribution(params: SamplingParams, classes: Iterable[type[LogitsProcessor]]) -> bool:
    """Whether a request's processors may change the model's distribution."""
    return any(kind.changes_distribution and kind.needed(params) for kind in classes)


def edit_logits(
    logits_RV: torch.Tensor, processors: Sequence[Sequence[LogitsProcessor]]
) -> dict[int, tuple[LogitsProcessor, Exception]]:
    """Let each row's processors edit it, in place.

    Arguments:
        logits_RV: float32.
        processors: of each row, as :func:`processor_classes` orders them.

    Returns: rows whose plug-in, or grammar, has raised something, which are of no use.
    """
    failed: dict[int, tuple[LogitsProcessor, Exception]] = {}
    rows_of: dict[type, tuple[list[int], list[Any]]] = {}
    for row, found in enumerate(processors):
        for processor in found:
            kind = type(processor) if type(processor) in ORDER else LogitsProcessor
            rows, others = rows_of.setdefault(kind, ([], []))
            rows.append(row)
            others.append(processor)
    for kind in ORDER:
        rows, found = rows_of.get(kind, ([], []))
        if kind in (LogitsProcessor, GrammarProcessor):
            for row, processor in zip(rows, found, strict=True):
                try:
                    processor.edit(logits_RV[row])
                except Exception as error:  # whatever the code raises
                    failed[row] = processor, error
        elif rows:
            kind.edit_rows(logits_RV, rows, found)
    return failed


def word_token_ids(tokenizer: Tokenizer, words: Sequence[str]) -> list[array[int]]:
    """The tokens of words, as a text begins with them and as they follow a space."""
    texts = dict.fromkeys(space + word.lstrip() for word in words for space in ("", " "))
    return [array("i", tokenizer.encode(text, add_special_tokens=False)) for text in texts]


def _forbid(logits_RV: torch.Tensor, entries: Iterable[tuple[int, int]]) -> None:
    if found := list(entries):
        rows_N, tokens_N = zip(*found, strict=True)
        device = logits_RV.device
        logits_RV[torch.tensor(rows_N, device=device), torch.tensor(tokens_N, device=device)] = FORBIDDEN
