"""What an answer's text says: reasoning, content, calls of tools. Every API writes these parts in its own way.

A reader takes one choice's text, whole or in pieces, and says what each piece adds.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from ..dynamic.engine.outputs import CompletionDelta, CompletionOutput
from ..dynamic.engine.reasoning import Phase, ReasoningTracker
from ..dynamic.engine.reasoning_params import ReasoningParams
from ..dynamic.text.tokenizer import Tokenizer
from .reasoning_markers import CHANNEL, ENDS, MESSAGE, START, ReasoningMarkers
from .tool_calls import Call, CallReader
from .tool_markers import CallMarkers

Output = CompletionDelta | CompletionOutput


@dataclass(frozen=True, slots=True)
class Part:
    """What a piece of text adds to an answer: text of some kind, a call that begins, or more of its arguments."""

    kind: Literal["reasoning", "content", "call", "arguments"]
    text: str = ""
    number: int = 0  # of the call
    call: Call | None = None  # that begins


class AnswerReader(Protocol):
    """Reads one choice."""

    def add(self, text: str, ended: bool) -> list[Part]:
        """Take more text; ``ended``: it is the last."""
        ...

    def finish_reason(self, output: Output) -> str | None:
        """Why the choice has ended, if it has."""
        ...


class PlainReader:
    """An answer that is content and nothing else."""

    def add(self, text: str, ended: bool) -> list[Part]:
        return [Part("content", text)] if text else []

    def finish_reason(self, output: Output) -> str | None:
        return output.finish_reason


@dataclass(slots=True)
class ListReader:
    """An answer in the form of :func:`.tools.calls_schema`; content where it was cut off before the first call."""

    _calls: CallReader = field(default_factory=CallReader)
    _text: str = ""

    def add(self, text: str, ended: bool) -> list[Part]:
        found = self._calls.add(text)
        self._text = "" if self._calls.calls else self._text + text
        if ended and self._text:
            return [Part("content", self._text)]
        return [
            Part("call", number=number, call=self._calls.calls[number]) if new else Part("arguments", more, number)
            for number, new, more in found
        ]

    def finish_reason(self, output: Output) -> str | None:
        complete = output.finish_reason == "stop" and output.stop_reason is None and self._calls.calls
        return "tool_calls" if complete else output.finish_reason


@dataclass(slots=True)
class MarkedReader:
    """An answer that is text, calls in the model's own markers, or both.

    Text is held back from where a call may begin, and calls are told whole at the end. A text that only looks like a
    call is content.

    Arguments:
        markers: of the model.
        names: of the functions.
        one_call: leave out all calls but the first.
    """

    markers: CallMarkers
    names: Collection[str]
    one_call: bool = False
    _held: str = ""
    _called: bool = False

    def add(self, text: str, ended: bool) -> list[Part]:
        held = self._held + text
        calls: list[Call] = []
        if ended:
            content, calls = self.markers.read(held, self.names)
            calls, self._called = calls[:1] if self.one_call else calls, bool(calls)
        else:
            place = self.markers.begin(held)[0]
            content, self._held = held[:place], held[place:]
        parts = [Part("content", content)] if content else []
        return parts + [part for number, call in enumerate(calls) for part in _whole(number, call)]

    def finish_reason(self, output: Output) -> str | None:
        return "tool_calls" if self._called and output.finish_reason == "stop" else output.finish_reason


@dataclass(slots=True)
class ReasoningReader:
    """An answer in front of which may stand a block of reasoning.

    Arguments:
        markers: of the model.
        answer: reads what follows the block.
        opened: the prompt has begun the block.
    """

    markers: ReasoningMarkers
    answer: AnswerReader
    opened: bool
    _over: bool = False
    _begun: bool = False  # the reasoning has a text
    _trim: bool = False  # white space behind the block is not the answer's
    _held: str = ""

    def add(self, text: str, ended: bool) -> list[Part]:
        if self._over:
            return self._answer(text, ended)
        held, self._held = self._held + text, ""
        if not self.opened:
            said = held.lstrip()
            if said.startswith(self.markers.begin):
                self.opened, held = True, said[len(self.markers.begin) :]
            elif self.markers.begin.startswith(said) and not ended:
                self._held = held
                return []
            else:
                self._over = True
                return self._answer(held, ended)
        if not self._begun:
            held = held.lstrip()
        at = held.find(self.markers.end)
        if at >= 0:
            reasoning, rest = held[:at].rstrip(), held[at + len(self.markers.end) :]
            self._over = self._trim = True
        else:
            shown = len(held) if ended else len(held) - unfinished(held, [self.markers.end])
            reasoning, rest = held[:shown].rstrip(), ""
            self._held = held[len(reasoning) :]
        self._begun = self._begun or bool(reasoning)
        parts = [Part("reasoning", reasoning)] if reasoning else []
        return parts + (self._answer(rest, ended) if self._over or ended else [])

    def _answer(self, text: str, ended: bool) -> list[Part]:
        if self._trim:
            text = text.lstrip()
            self._trim = not text
        return self.answer.add(text, ended)

    def finish_reason(self, output: Output) -> str | None:
        return self.answer.finish_reason(output)


_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"to=(?:functions\.)?([^\s<]+)")


@dataclass(slots=True)
class ChannelReader:
    """An answer in harmony's channels: reasoning in ``analysis``, calls of functions in messages to them, content in
    all others. A call that is malformed, or of an unknown function, is content.

    Arguments:
        answer: reads the contents.
        names: of the functions.
        one_call: leave out all calls but the first.
        inside: the prompt ends inside of a message: of reasoning (True) or content (False); None: in front of one.
    """

    answer: AnswerReader
    names: Collection[str] = ()
    one_call: bool = False
    inside: bool | None = None
    _held: str = ""
    _kind: str | None = field(init=False)  # of the message that is open: reasoning, content, or a function's name
    _said: bool = False  # an earlier message was content
    _calls: int = 0

    def __post_init__(self) -> None:
        self._kind = None if self.inside is None else "reasoning" if self.inside else "content"

    def add(self, text: str, ended: bool) -> list[Part]:
        self._held += text
        parts: list[Part] = []
        while self._kind is not None or self._begin(ended):
            ends = [(at, mark) for mark in (*ENDS, START) if (at := self._held.find(mark)) >= 0]
            at, mark = min(ends, default=(len(self._held), ""))
            is_text = self._kind in ("reasoning", "content")
            if not ends and not ended:
                at = len(self._held) - unfinished(self._held, (*ENDS, START)) if is_text else 0
            said, self._held = self._held[:at], self._held[at:]
            if mark != START:
                self._held = self._held[len(mark) :]
            parts += self._message(said, bool(ends) or ended)
            if not ends:
                break
            self._said = self._said or self._kind == "content"
            self._kind = None
        return parts + self.answer.add("", True) if ended else parts

    def _begin(self, ended: bool) -> bool:
        """Find the header of the next message; whether it is there."""
        held = self._held.lstrip()
        if held and not any(held.startswith(mark[: len(held)]) for mark in (START, CHANNEL)):
            self._kind = "content"  # no header at all
            return True
        header, found, rest = held.partition(MESSAGE)
        if not found:
            if ended:
                self._held = ""
            return False
        channel, to = _CHANNEL.search(header), _RECIPIENT.search(header)
        self._held = rest
        if to is not None:
            self._kind = f"to={to[1]}"
        else:
            self._kind = "reasoning" if channel is not None and channel[1] == "analysis" else "content"
        if self._kind == "content" and self._said:
            self._held = f"\n{rest}"
        return True

    def _message(self, text: str, whole: bool) -> list[Part]:
        if self._kind == "reasoning":
            return [Part("reasoning", text)] if text else []
        if self._kind != "content":
            if not whole:
                return []
            name, value = str(self._kind).removeprefix("to="), None
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(text)
            if name in self.names and isinstance(value, dict):
                self._calls += 1
                call = Call(name, json.dumps(value, ensure_ascii=False))
                return [] if self.one_call and self._calls > 1 else _whole(self._calls - 1, call)
        return self.answer.add(text, False)

    def finish_reason(self, output: Output) -> str | None:
        if self._calls and output.finish_reason == "stop":
            return "tool_calls"
        return self.answer.finish_reason(output)


def unfinished(text: str, marks: Sequence[str]) -> int:
    """The length of the longest end of a text with which one of these marks may begin."""
    longest = min(len(text), max(map(len, marks)) - 1)
    return next((n for n in range(longest, 0, -1) if any(mark.startswith(text[-n:]) for mark in marks)), 0)


def _whole(number: int, call: Call) -> list[Part]:
    return [Part("call", number=number, call=call), Part("arguments", call.arguments, number)]


@dataclass(kw_only=True)
class AnswerParts:
    """Reads the choices of one answer.

    Arguments:
        tokenizer: of the model.
        reader: makes the reader of a choice.
        special: texts of special tokens, which are neither content nor reasoning.
        reasoning: how the model writes reasoning, whose tokens are counted; None where it writes none.
        hide_reasoning: leave it out.
    """

    tokenizer: Tokenizer
    reader: Callable[[], AnswerReader] = PlainReader
    special: Sequence[str] = ()
    reasoning: ReasoningParams | None = None
    hide_reasoning: bool = False
    in_answer: list[bool] = field(default_factory=list, init=False)  # which of the tokens read last are no reasoning
    _readers: dict[int, AnswerReader] = field(default_factory=dict, init=False)  # by choice
    _trackers: dict[int, ReasoningTracker] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._firsts = {name[0] for name in self.special}  # letters without which a text holds none of them

    def read(self, output: Output) -> list[Part]:
        """What a whole choice says, or what a part of one adds."""
        self.in_answer = [True] * len(output.token_ids)
        if self.reasoning is not None:
            if output.index not in self._trackers:
                self._trackers[output.index] = ReasoningTracker(self.reasoning, self.tokenizer)
            tracker = self._trackers[output.index]
            for number, token in enumerate(output.token_ids):
                used = tracker.place.used
                tracker.accept(token)
                self.in_answer[number] = tracker.place.phase is Phase.AFTER and tracker.place.used == used
        if output.index not in self._readers:
            self._readers[output.index] = self.reader()
        parts = self._readers[output.index].add(output.text, output.finish_reason is not None)
        if self.hide_reasoning:
            parts = [part for part in parts if part.kind != "reasoning"]
        if self.special:
            parts = [self._shown(part) for part in parts]
        return [part for part in parts if part.text or part.call is not None]

    def finish_reason(self, output: Output) -> str | None:
        """Why a choice that was read has ended, if it has."""
        return self._readers[output.index].finish_reason(output)

    @property
    def reasoning_tokens(self) -> int:
        """Of all choices, as far as they were read."""
        return sum(tracker.place.used for tracker in self._trackers.values())

    def _shown(self, part: Part) -> Part:
        if part.kind not in ("reasoning", "content"):
            return part
        text = part.text
        for token in self.special if any(first in text for first in self._firsts) else ():
            text = text.replace(token, "")
        return replace(part, text=text)
