"""Tools and calls in a conversation, as chat templates read them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .wire.openai import ToolCall


def introduced(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A conversation that begins by saying which tools there are, for chat templates that do not read them."""
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = (
        f"You may call these functions:\n{functions}\n\nTo call them, answer with a JSON list of objects with the"
        ' function\'s "name" and its "arguments".'
    )
    first, *rest = (dict(message) for message in messages)
    if first["role"] in ("system", "developer"):
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *rest]
    return [{"role": "system", "content": text}, first, *rest]


def plain_calls(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """The calls of an assistant's earlier message as chat templates read them: arguments are an object."""
    found = []
    for call in calls:
        arguments: Any = call.function.arguments
        with contextlib.suppress(ValueError, RecursionError):
            read = json.loads(arguments)
            arguments = read if isinstance(read, dict) else arguments
        function = {"name": call.function.name, "arguments": arguments}
        found.append({"id": call.id, "type": "function", "function": function})
    return found


def with_text_arguments(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose calls have their arguments as text again."""
    found = []
    for message in messages:
        calls = [
            {**call, "function": {**call["function"], "arguments": _as_text(call["function"]["arguments"])}}
            for call in message.get("tool_calls") or ()
        ]
        found.append({**message, "tool_calls": calls} if calls else dict(message))
    return found


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
