"""Writes answers that are calls of tools, or may hold some."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..dynamic.engine.outputs import CompletionDelta, CompletionOutput
from .formats import ChatFormat, Output, PromptLogprobs, write_compute
from .tool_calls import Call, CallReader
from .tool_markers import CallMarkers


@dataclass(kw_only=True)
class ToolCallFormat(ChatFormat):
    """Choices of ``/v1/chat/completions`` whose texts have the form of :func:`.tools.calls_schema`."""

    _readers: dict[int, CallReader] = field(default_factory=dict, init=False)  # by choice

    def whole(
        self, prompt_number: int, output: CompletionOutput, prompt_logprobs: PromptLogprobs | None
    ) -> dict[str, Any]:
        reader = CallReader()
        reader.add(output.text)
        message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
        if reader.calls:
            message["tool_calls"] = [_write(call) for call in reader.calls]
        else:  # it was cut off too early
            message["content"] = output.text
        return self._ended(self._choice(output, "message", message), output)

    def chunk(
        self, prompt_number: int, delta: CompletionDelta, prompt_logprobs: PromptLogprobs | None
    ) -> dict[str, Any] | None:
        message: dict[str, Any] = {}
        if delta.index not in self._readers:
            self._readers[delta.index] = CallReader()
            message = {"role": "assistant", "content": None}
        reader = self._readers[delta.index]
        if parts := reader.add(delta.text):
            message["tool_calls"] = [
                {"index": number, **_write(reader.calls[number], "")}
                if new
                else {"index": number, "function": {"arguments": more}}
                for number, new, more in parts
            ]
        per_token = self.top_logprobs is not None or self.compute
        if not (message or delta.finish_reason or (per_token and delta.token_ids)):
            return None
        choice = self._ended(self._choice(delta, "delta", message), delta)
        return {**choice, "compute": write_compute(delta)} if self.compute else choice

    @staticmethod
    def _ended(choice: dict[str, Any], output: Output) -> dict[str, Any]:
        if output.finish_reason == "stop" and output.stop_reason is None:
            choice["finish_reason"] = "tool_calls"
        return choice


@dataclass(kw_only=True)
class AutoToolFormat(ChatFormat):
    """Choices of ``/v1/chat/completions`` that are text, calls in the model's own markers, or both.

    In a stream, text is held back from where a call may begin, and calls are sent whole at the end. A text that only
    looks like a call is content.

    Arguments:
        markers: of the model.
        names: of the functions.
        special: texts of special tokens, which are not content.
        one_call: leave out all calls but the first.
    """

    markers: CallMarkers
    names: frozenset[str]
    special: tuple[str, ...]
    one_call: bool = False
    _held: dict[int, str] = field(default_factory=dict, init=False)  # by choice

    def whole(
        self, prompt_number: int, output: CompletionOutput, prompt_logprobs: PromptLogprobs | None
    ) -> dict[str, Any]:
        content, calls = self._read(output.text)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        choice = self._choice(output, "message", message)
        if calls:
            message |= {"content": content or None, "tool_calls": [_write(call) for call in calls]}
            self._end(choice, output)
        return choice

    def chunk(
        self, prompt_number: int, delta: CompletionDelta, prompt_logprobs: PromptLogprobs | None
    ) -> dict[str, Any] | None:
        message: dict[str, Any] = {}
        if delta.index not in self._held:
            message = {"role": "assistant", "content": ""}
        held = self._held.get(delta.index, "") + delta.text
        place = len(held) if delta.finish_reason else self.markers.begin(held)[0]
        calls: list[Call] = []
        if delta.finish_reason:
            content, calls = self._read(held)
        else:
            content = self._shown(held[:place])
        self._held[delta.index] = held[place:]
        if content:
            message["content"] = message.get("content", "") + content
        if calls:
            message["tool_calls"] = [{"index": number, **_write(call)} for number, call in enumerate(calls)]
        per_token = self.top_logprobs is not None or self.compute
        if not (message or delta.finish_reason or (per_token and delta.token_ids)):
            return None
        choice = self._choice(delta, "delta", message)
        if calls:
            self._end(choice, delta)
        return {**choice, "compute": write_compute(delta)} if self.compute else choice

    def _read(self, text: str) -> tuple[str, list[Call]]:
        content, calls = self.markers.read(text, self.names)
        return self._shown(content), calls[:1] if self.one_call else calls

    def _shown(self, text: str) -> str:
        for token in self.special:
            text = text.replace(token, "")
        return text

    @staticmethod
    def _end(choice: dict[str, Any], output: Output) -> None:
        if output.finish_reason == "stop":
            choice["finish_reason"] = "tool_calls"


def _write(call: Call, arguments: str | None = None) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments if arguments is None else arguments}
    return {"id": call.id, "type": "function", "function": function}
