"""How a model marks its reasoning, found in its chat template by rendering a message that has some, in the template's
text, or among the tokenizer's tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..dynamic.engine.reasoning_params import ReasoningParams
from ..dynamic.text.chat_template import TemplateEnded

Render = Callable[[Sequence[Mapping[str, Any]]], str]

REASON, ANSWER = "rsnqzwhy", "ansqzthat"  # texts that no template holds
START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"  # of harmony, the format of gpt-oss
ENDS = ("<|end|>", "<|return|>", "<|call|>")  # of its messages
_TAG = re.compile(r"<[^<>\s]{1,60}>|\[[^\[\]\s]{1,60}\]|◁[^◁▷\s]{1,60}▷")
_WORDS = ("think", "thought", "reason")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReasoningMarkers:
    """What a model writes around its reasoning.

    Arguments:
        begin, end: the markers.
        close: the end as the template writes it, with the white space in front of it.
        after: what the template writes between the end and the answer.
        again: what stands between a block and the next, where there may be several; only harmony has it.
    """

    begin: str
    end: str
    close: str
    after: str = ""
    again: str | None = None

    @property
    def channels(self) -> bool:
        """Whether all of an answer stands in harmony's channels."""
        return self.again is not None

    def opened(self, prompt: str, continued: str = "") -> bool | None:
        """Whether a prompt ends inside a block; None where the model may begin one, False where it may not.

        Arguments:
            continued: the content of the message that the answer continues.
        """
        if self.channels:
            last = prompt[prompt.rfind(START) :]
            return None if MESSAGE not in last else f"{CHANNEL}analysis" in last
        begun, ended = continued.rfind(self.begin), continued.rfind(self.end)
        if begun > ended or prompt.rstrip().endswith(self.begin):
            return True
        return False if continued.strip() or prompt.rstrip().endswith(self.end) else None

    def params(self, opened: bool, budget: int | None = None) -> ReasoningParams:
        """As the engine reads them."""
        return ReasoningParams(
            begin=self.begin,
            end=self.end,
            opened=opened,
            budget=budget,
            close=self.close,
            after=self.after,
            again=self.again,
        )


HARMONY = ReasoningMarkers(
    begin=f"{CHANNEL}analysis{MESSAGE}",
    end=ENDS[0],
    close=ENDS[0],
    after=f"{START}assistant{CHANNEL}final{MESSAGE}",
    again=f"{START}assistant",
)


def derive(render: Render, source: str, tokens: Iterable[str]) -> ReasoningMarkers | None:
    """The markers of a model; None where nothing speaks of reasoning.

    Arguments:
        render: a conversation in the template.
        source: the template's text.
        tokens: that were added to the vocabulary.

    Raises:
        TemplateEnded: the template could not be rendered this time.
    """
    if CHANNEL in source and MESSAGE in source:
        return HARMONY
    found = [tag for text in (source, *tokens) for tag in _TAG.findall(text)]
    tags = list(dict.fromkeys(tag for tag in found if any(word in _stem(tag) for word in _WORDS)))
    if not tags and not any(word in source for word in _WORDS):
        return None
    return _rendered(render) or _listed(tags)


def _rendered(render: Render) -> ReasoningMarkers | None:
    said = {"content": ANSWER, **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), REASON)}
    try:
        text = render([{"role": "user", "content": "q"}, {"role": "assistant", **said}])
    except TemplateEnded:
        raise
    except ValueError:  # the template takes no such message
        return None
    before, found, rest = text.partition(REASON)
    between, answered, _ = rest.partition(ANSWER)
    tags, end = _TAG.findall(before), _TAG.search(between)
    if not (found and answered and tags and end) or not before.rstrip().endswith(tags[-1]):
        return None
    if between[: end.start()].strip() or tags[-1] == end[0] or _stem(tags[-1]) != _stem(end[0]):
        return None
    after = between[end.end() :]
    return ReasoningMarkers(
        begin=tags[-1], end=end[0], close=between[: end.end()], after="" if after.strip() else after
    )


def _listed(tags: Sequence[str]) -> ReasoningMarkers | None:
    for end in tags:
        if "/" not in end and "end" not in end.lower():
            continue
        begins = [tag for tag in tags if tag != end and _stem(tag) == _stem(end)]
        if begins or "/" in end:
            begin = begins[0] if begins else end.replace("/", "", 1)
            return ReasoningMarkers(begin=begin, end=end, close=f"\n{end}", after="\n\n")
    return None


def _stem(tag: str) -> str:
    """The letters of a tag, without those that say which of a pair it is."""
    return re.sub("begin|start|end|open|close", "", re.sub("[^a-z]", "", tag.lower()))
