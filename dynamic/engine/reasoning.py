"""Blocks of reasoning in an output: following them token by token, and closing them when their budget is used up.

Shape suffixes: R rows, V vocabulary.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from .reasoning_params import ReasoningParams

if TYPE_CHECKING:
    import torch

    from ..text.tokenizer import Tokenizer
    from .protocols import ProcessorContext
    from .sampling_params import SamplingParams

_LAST_BYTES = 3  # of a character that may be missing at the end of a text


class Phase(Enum):
    """Where an output is."""

    BEFORE = "before"  # a block may begin
    INSIDE = "inside"
    AFTER = "after"


class Place(NamedTuple):
    """What is known behind some token of an output.

    Arguments:
        tail: bytes that may belong to a marker; behind a block, what its last token holds beyond the marker.
        used: tokens in blocks so far, those of the closing markers included.
        forced: tokens that have to follow.
    """

    phase: Phase
    tail: bytes = b""
    used: int = 0
    forced: tuple[int, ...] = ()


class ReasoningTracker:
    """Follows one output.

    Arguments:
        params: how the model writes its reasoning.
        tokenizer: of the model.
        formed: the answer must have a form, which begins behind ``params.after``.

    Raises:
        ValueError: the tokenizer cannot write a marker that has to be written.
    """

    def __init__(self, params: ReasoningParams, tokenizer: Tokenizer, formed: bool = False) -> None:
        self._params, self._tokenizer, self._formed = params, tokenizer, formed
        self._begin, self._end = params.begin.encode(), params.end.encode()
        self.begin_ids: tuple[int, ...] = self._ids(params.begin) if formed else ()
        if params.opened:
            first = self._within(b"", 0, ())
        else:
            first = Place(Phase.BEFORE, forced=self.begin_ids if params.again is not None else ())
        self._places = [first]

    @property
    def place(self) -> Place:
        """Behind the newest token."""
        return self._places[-1]

    @property
    def forced(self) -> int | None:
        """The token that has to come next, if so."""
        return self.place.forced[0] if self.place.forced else None

    @property
    def over(self) -> bool:
        """Whether the answer's form begins here, or has begun."""
        return self.place.phase is Phase.AFTER and not self.place.forced

    @property
    def undecided(self) -> bool:
        """Whether the next token may begin a block or the answer."""
        return len(self._places) == 1 and self.place.phase is Phase.BEFORE and not self.place.forced

    def accept(self, token_id: int, answer: bool = False) -> None:
        """The output has one more token; ``answer``: it belongs to the answer, whatever its text."""
        self._places.append(self._next(token_id, answer))

    def rollback(self, count: int) -> None:
        """The newest tokens are taken back."""
        del self._places[len(self._places) - count :]

    def fork(self) -> ReasoningTracker:
        """Another one in the same state."""
        other = type(self).__new__(type(self))
        other.__dict__ |= {**self.__dict__, "_places": self._places[:]}
        return other

    def _next(self, token_id: int, answer: bool) -> Place:
        place = self.place
        forced = place.forced[1:]
        if answer or place.phase is Phase.AFTER:
            return (
                place
                if place.phase is Phase.AFTER and not place.forced
                else Place(Phase.AFTER, b"", place.used, forced)
            )
        data = self._tokenizer.token_bytes(token_id) or b""
        if place.phase is Phase.INSIDE:
            return self._within(place.tail + data, place.used + 1, forced)
        if self.undecided and self.begin_ids[:1] == (token_id,):
            forced = self.begin_ids[1:]
        text = (place.tail + data).lstrip()
        again = (self._params.again or "").encode()
        said = text.removeprefix(again)
        if said.startswith(self._begin):
            return self._within(said[len(self._begin) :], place.used, forced)
        if self._begin.startswith(said) or again.startswith(text):
            return Place(Phase.BEFORE, text, place.used, forced)
        return Place(Phase.AFTER, b"", place.used)

    def _within(self, text: bytes, used: int, forced: tuple[int, ...]) -> Place:
        """Inside a block, of which ``text`` is the end."""
        params = self._params
        at = text.find(self._end)
        if at >= 0:
            rest = text[at + len(self._end) :]
            if not self._formed:
                return Place(Phase.AFTER if params.again is None else Phase.BEFORE, rest, used, forced)
            after = params.after.encode()
            missing = after[len(rest) :] if after.startswith(rest) else b""
            return Place(Phase.AFTER, rest, used, self._ids(missing.decode("utf-8", "ignore")))
        spent = params.budget is not None and used >= params.budget
        if spent and not forced and not (_cut(text) and used < (params.budget or 0) + _LAST_BYTES):
            begun = next(n for n in range(len(self._end) - 1, -1, -1) if text.endswith(self._end[:n]))
            forced = self._ids(params.end[begun:] if begun and params.end.isascii() else params.close or params.end)
        return Place(Phase.INSIDE, text[-len(self._end) - _LAST_BYTES :], used, forced)

    def _ids(self, text: str) -> tuple[int, ...]:
        """The tokens of a text that stands within another one."""
        encode = self._tokenizer.encode
        for before in ("", "\x02") if text else ():  # some tokenizers put a space in front of a text
            ids = encode(before + text, False)[len(encode(before, False)) if before else 0 :]
            if b"".join(self._tokenizer.token_bytes(token) or b"" for token in ids) == text.encode():
                return tuple(ids)
        if text:
            raise ValueError(f"the tokenizer cannot write the marker {text[:50]!r}")
        return ()


def _cut(text: bytes) -> bool:
    """Whether a text ends within a character."""
    for count, byte in enumerate(reversed(text[-_LAST_BYTES:]), 1):
        if byte & 0xC0 != 0x80:
            return count < (4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1)
    return False


class ReasoningProcessor:
    """Closes blocks of reasoning whose budget is used up: their end is the only text that may come. The answers of
    requests with structured outputs are :class:`.grammar_processor.GrammarProcessor`'s."""

    changes_distribution: ClassVar[bool] = True

    def __init__(self, context: ProcessorContext) -> None:
        assert context.params.reasoning is not None
        assert context.tokenizer is not None
        self._tracker = ReasoningTracker(context.params.reasoning, context.tokenizer)

    @staticmethod
    def needed(params: SamplingParams) -> bool:
        reasoning = params.reasoning
        return reasoning is not None and reasoning.budget is not None and params.structured_outputs is None

    @staticmethod
    def edit_rows(logits_RV: torch.Tensor, rows: list[int], processors: list[Any]) -> None:
        """Edit some rows, each for its own processor."""
        for row, processor in zip(rows, processors, strict=True):
            processor.edit(logits_RV[row])

    def edit(self, logits_V: torch.Tensor) -> None:
        if (token := self._tracker.forced) is not None:
            logits_V.fill_(float("-inf"))
            logits_V[token] = 0.0

    def accept(self, token_id: int) -> None:
        self._tracker.accept(token_id)

    def rollback(self, count: int) -> None:
        self._tracker.rollback(count)

    def fork(self) -> Self:
        other = type(self).__new__(type(self))
        other._tracker = self._tracker.fork()
        return other
