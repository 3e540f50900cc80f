"""The logits processor of structured outputs: only tokens with which an output can still get the wanted form.

Shape suffixes: V vocabulary, W words of 32 bits, N some tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Self, TypeVar

import numpy as np
import torch

from ..text.tokenizer_file import run_rust
from .protocols import ProcessorContext
from .reasoning import Phase, ReasoningTracker
from .sampling_params import SamplingParams

Result = TypeVar("Result")
TOGETHER = 4  # outputs whose masks are worth several threads
FEW = 4096  # tokens that are picked one by one, out of a row or in it


class GrammarError(ValueError):
    """An output cannot go on in the wanted form."""


class GrammarProcessor:
    """Keeps one output in the form that ``structured_outputs`` asks for.

    Where the form is complete, the tokens that end the output are allowed too. Its state is a function of the output's
    tokens. It comes last in a row, so that no other processor can allow what it forbids. The form begins behind a block
    of reasoning, inside of which only the tokens that end the output are forbidden.
    """

    changes_distribution: ClassVar[bool] = True

    def __init__(self, context: ProcessorContext) -> None:
        assert context.grammar is not None
        self._grammar = context.grammar
        self._matcher = context.grammar.matcher.deep_copy()
        self._vocab_size = context.grammar.vocab_size
        self._ends = np.array(sorted(context.stop_token_ids), dtype=np.int64)
        self._ended = False  # by one of these, which the matcher does not see
        self._words_W: np.ndarray | None = None  # of the next token, once they are needed
        self._count = 0  # of the tokens that they allow
        self._reasoning: ReasoningTracker | None = None
        if context.params.reasoning is not None:
            assert context.tokenizer is not None
            self._reasoning = ReasoningTracker(context.params.reasoning, context.tokenizer, formed=True)
        self._in_form = bytearray()  # per token, where there may be reasoning: whether it belongs to the form

    @staticmethod
    def needed(params: SamplingParams) -> bool:
        return params.structured_outputs is not None

    @staticmethod
    def compute_masks(processors: Sequence[GrammarProcessor]) -> None:
        """Find the next tokens of several outputs at once, on several threads; each would find the same alone."""
        missing = [processor for processor in processors if processor._words_W is None and processor._follows]
        executor = missing[0]._grammar.executor if len(missing) >= TOGETHER else None
        if executor is None:
            return
        masks_PW = np.empty((len(missing), missing[0]._vocab_size // 32 + 1), dtype=np.uint32)
        matchers = [(processor._matcher, place) for place, processor in enumerate(missing)]
        size = masks_PW.strides[0]
        compute = executor.unsafe_compute_mask_ptr  # the memory is that of the array
        try:
            _call(lambda: compute(matchers, masks_PW.ctypes.data, size, len(missing)))
        except GrammarError:  # of one of them: it is found again when that one asks for its own
            return
        for processor, words_W in zip(missing, masks_PW, strict=True):
            if not processor._matcher.is_error():  # else it is found again
                processor._take(words_W)

    def edit(self, logits_V: torch.Tensor) -> None:
        if not self._follows and self._forced is None:
            logits_V[torch.from_numpy(self._ends).to(logits_V.device)] = -torch.inf
            return
        if (few := self.few_allowed()) is not None:
            ids_N = torch.from_numpy(few).to(logits_V.device)
            kept_N = logits_V[ids_N]
            logits_V.fill_(-torch.inf)
            logits_V[ids_N] = kept_N
            return
        words_W = self._allowed()
        if self._vocab_size - self._count <= FEW:
            forbidden = _tokens(~words_W, len(logits_V))
        else:
            bits = np.unpackbits(words_W.view(np.uint8), count=len(logits_V), bitorder="little")
            forbidden = bits == 0
        logits_V[torch.from_numpy(forbidden).to(logits_V.device)] = -torch.inf

    def few_allowed(self) -> np.ndarray | None:
        """The allowed tokens, rising, int64, (N,); None where they are more than :data:`FEW`.

        Raises:
            GrammarError: the grammar has become too complex to be followed.
        """
        if not self._follows:
            return None if self._forced is None else np.array([self._forced], dtype=np.int64)
        words_W = self._allowed()
        return _tokens(words_W, self._vocab_size) if self._count <= FEW else None

    def fits(self, token_id: int) -> bool:
        """Whether the output may go on with this token; far cheaper than to find all that may come next."""
        if not self._follows:
            return token_id == self._forced if self._forced is not None else token_id not in self._ends
        if self._words_W is not None:
            return bool(self._words_W[token_id // 32] >> (token_id % 32) & 1)
        if self._reasoning is not None and self._reasoning.undecided and token_id == self._reasoning.begin_ids[0]:
            return True
        if token_id in self._ends and self._accepting():
            return True
        # Whatever is wrong with the grammar is found again when all tokens are looked for.
        return not self._matcher.is_error() and _call(lambda: self._matcher.validate_tokens([token_id])) == 1

    @property
    def _follows(self) -> bool:
        """Whether the form says what comes next."""
        return self._reasoning is None or self._reasoning.over or self._reasoning.undecided

    @property
    def _forced(self) -> int | None:
        return None if self._reasoning is None else self._reasoning.forced

    @property
    def complete(self) -> bool:
        """Whether the output has the wanted form, and nothing could follow but its end."""
        if self._ended or self._matcher.is_error() or not (self._reasoning is None or self._reasoning.over):
            return False
        if self._matcher.is_stopped():
            return True
        if not self._matcher.is_accepting():
            return False
        try:
            few = self.few_allowed()
        except GrammarError:  # found again when the next token is chosen
            return False
        return few is not None and bool(np.isin(few, self._ends).all())

    def accept(self, token_id: int) -> None:
        if self._reasoning is not None and self._reads(self._reasoning, token_id):
            self._words_W = None
            return
        self._words_W = None
        if token_id in self._ends and self._accepting():
            self._ended = True
        elif not _call(lambda: self._matcher.consume_token(token_id)):
            raise self._error()

    def _reads(self, reasoning: ReasoningTracker, token_id: int) -> bool:
        """Follow the reasoning; whether the token belongs to it and not to the form."""
        in_form = self._follows
        if reasoning.undecided and token_id == reasoning.begin_ids[0]:
            in_form = _call(lambda: self._matcher.validate_tokens([token_id])) == 1
        reasoning.accept(token_id, in_form)
        self._in_form.append(in_form)
        place = reasoning.place
        if not in_form and place.phase is Phase.AFTER and place.tail.strip():
            raise GrammarError("the output cannot keep its form: a token holds the end of the reasoning and more")
        return not in_form

    def rollback(self, count: int) -> None:
        self._words_W = None
        if self._reasoning is not None:
            self._reasoning.rollback(count)
            first = len(self._in_form) - count
            count = sum(self._in_form[first:])
            del self._in_form[first:]
        if self._ended and count:
            self._ended = False
            count -= 1
        if count and not self._matcher.rollback(count):
            raise self._error()

    def fork(self) -> Self:
        other = type(self).__new__(type(self))
        other._grammar, other._matcher = self._grammar, self._matcher.deep_copy()
        other._vocab_size, other._ends, other._ended = self._vocab_size, self._ends, self._ended
        other._words_W, other._count = self._words_W, self._count
        other._reasoning = None if self._reasoning is None else self._reasoning.fork()
        other._in_form = self._in_form[:]
        return other

    def _accepting(self) -> bool:
        return self._matcher.is_stopped() or self._matcher.is_accepting()

    def _allowed(self) -> np.ndarray:
        """Bits of the tokens that may come next; those that end the output are set where it may end."""
        if self._words_W is None:
            data = _call(self._matcher.compute_bitmask)
            if self._matcher.is_error():
                raise self._error()
            return self._take(np.frombuffer(data, dtype=np.uint32).copy())
        return self._words_W

    def _take(self, words_W: np.ndarray) -> np.ndarray:
        words_W[self._vocab_size // 32 :] &= np.uint32((1 << self._vocab_size % 32) - 1)  # not the library's end
        if self._accepting():
            np.bitwise_or.at(words_W, self._ends // 32, (1 << (self._ends % 32)).astype(np.uint32))
        if self._reasoning is not None and self._reasoning.undecided:
            word, bit = divmod(self._reasoning.begin_ids[0], 32)
            words_W[word] |= np.uint32(1 << bit)
        self._words_W, self._count = words_W, int(np.bitwise_count(words_W).sum())
        return words_W

    def _error(self) -> GrammarError:
        lines = self._matcher.get_error().splitlines() or ["a token does not fit"]
        return GrammarError(f"the output cannot keep the form that was asked for: {lines[0][:200]}")


def _call(call: Callable[[], Result]) -> Result:
    try:
        return run_rust(call, "the output cannot be followed")
    except ValueError as error:
        raise GrammarError(str(error)) from error


def _tokens(words_W: np.ndarray, vocab_size: int) -> np.ndarray:
    """The ids whose bits are set, rising; words without any are not looked into."""
    some = np.flatnonzero(words_W)
    bits = np.unpackbits(words_W[some].view(np.uint8), bitorder="little").reshape(-1, 32)
    which, places = np.nonzero(bits)
    tokens = some[which] * 32 + places
    return tokens[tokens < vocab_size]
