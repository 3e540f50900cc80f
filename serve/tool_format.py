"""Writes answers that are calls of tools."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..dynamic.engine.outputs import CompletionDelta, CompletionOutput
from .formats import ChatFormat, Output, PromptLogprobs
from .tools import Call, CallReader


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
        if self.compute:
            choice["compute"] = {"layers": delta.layers, "experts": delta.experts}
        return choice

    @staticmethod
    def _ended(choice: dict[str, Any], output: Output) -> dict[str, Any]:
        if output.finish_reason == "stop" and output.stop_reason is None:
            choice["finish_reason"] = "tool_calls"
        return choice


def _write(call: Call, arguments: str | None = None) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments if arguments is None else arguments}
    return {"id": call.id, "type": "function", "function": function}
