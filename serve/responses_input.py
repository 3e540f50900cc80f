"""A body of ``/v1/responses`` as the chat request that means the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from .errors import describe_problems, invalid
from .request_checks import check_supported
from .wire.fields import RESPONSES
from .wire.openai import ChatCompletionRequest, GenerationRequest
from .wire.responses import ContentPart, FunctionTool, Item, ResponsesRequest

# What the fields are called in a chat, for errors about those.
NAMES = {
    "messages": "input",
    "response_format": "text",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning",
}
LOGPROBS = "message.output_text.logprobs"
# Reasoning is in its item as it is, so that nobody needs it encrypted.
_INCLUDE = (LOGPROBS, "reasoning.encrypted_content")


def common_fields(body: GenerationRequest) -> dict[str, Any]:
    """The fields of a request that all APIs share.

    Raises:
        ApiError: status 400 for those that ask for several answers, or for what an answer cannot hold.
    """
    if (body.n or 1) != 1:
        raise invalid(f"n must be 1 here, not {body.n}: there is one answer.", param="n")
    for name, value in (("prompt_logprobs", body.prompt_logprobs), ("stream_options", body.streams_compute or None)):
        if value is not None:
            raise invalid(f"{name} is for chat completions.", param=name, code="unsupported_parameter")
    names = set(GenerationRequest.model_fields) - {"n", "stream_options"}
    return {name: value for name in names if (value := getattr(body, name)) is not None}


def as_chat(body: ResponsesRequest, earlier: Sequence[dict[str, Any]]) -> tuple[ChatCompletionRequest, list[Any]]:
    """The chat request, and its messages without the instructions.

    Arguments:
        earlier: messages of the response that this one continues.

    Raises:
        ApiError: status 400 that names what is not supported.
    """
    check_supported(body, RESPONSES)
    fields = common_fields(body)
    if "response_format" in fields:
        raise invalid("response_format is called text.format here.", param="response_format")
    if others := sorted(set(body.include or ()) - set(_INCLUDE)):
        raise invalid(f"include must not hold {others[0][:50]!r}.", param="include", code="unsupported_parameter")
    reasoning, text = body.reasoning, body.text
    if text is not None and text.format is not None:
        fields["response_format"] = _format(text.format)
    if text is not None and text.verbosity not in (None, "medium"):
        raise invalid("text.verbosity is not supported.", param="text", code="unsupported_parameter")
    for name in ("summary", "generate_summary") if reasoning is not None else ():
        if getattr(reasoning, name) not in (None, "auto"):
            message = f"reasoning.{name} is not supported: reasoning is returned as it is."
            raise invalid(message, param="reasoning", code="unsupported_parameter")
    messages = [*earlier, *_messages(body.input)]
    if not messages:
        raise invalid("input must hold a message.", param="input")
    given = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    choice = body.tool_choice
    if isinstance(choice, dict) and set(choice) == {"type", "name"} and choice["type"] == "function":
        choice = {"type": "function", "function": {"name": choice["name"]}}
    chat = {
        **fields,
        "messages": given + messages,
        "tools": [_tool(number, tool) for number, tool in enumerate(body.tools or ())] or None,
        "tool_choice": choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": None if reasoning is None else reasoning.effort,
        "max_completion_tokens": body.max_output_tokens,
        "logprobs": body.top_logprobs is not None or LOGPROBS in (body.include or ()),
        "top_logprobs": body.top_logprobs,
        "chat_template_kwargs": body.chat_template_kwargs,
        "thinking_token_budget": body.thinking_token_budget,
    }
    return chat_request(chat), messages


def chat_request(fields: dict[str, Any]) -> ChatCompletionRequest:
    """A chat request that another API's body stands for.

    Raises:
        ApiError: status 400.
    """
    try:
        return ChatCompletionRequest.model_validate(fields)
    except ValidationError as error:
        raise describe_problems(error.errors(include_url=False, include_input=False)) from None


def check_returnable(value: Any) -> int:
    """Check what an answer repeats, and return its size in bytes: numbers may be beyond JSON's, texts no UTF-8.

    Raises:
        ApiError: status 400.
    """
    try:
        return len(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
    except (ValueError, RecursionError):  # UnicodeEncodeError among them
        message = "tools, text or tool_choice hold a number beyond JSON's, or half of a surrogate pair."
        raise invalid(message, param="tools") from None


def answer_messages(output: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items of an answer as messages of a chat, for the request that continues it."""
    return _messages([Item.model_validate(item) for item in output])


def _format(given: dict[str, Any]) -> dict[str, Any]:
    if given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}


def _tool(number: int, tool: FunctionTool) -> dict[str, Any]:
    if tool.type != "function":
        message = f"tools[{number}]: the type {tool.type[:50]!r} is not supported, only function."
        raise invalid(message, param="tools", code="unsupported_parameter")
    if tool.name is None:
        raise invalid(f"tools[{number}]: a function needs a name.", param="tools")
    function = tool.model_dump(include={"name", "description", "parameters", "strict"}, exclude_none=True)
    return {"type": "function", "function": function}


def _messages(given: str | Sequence[Item]) -> list[dict[str, Any]]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    reasoning: str | None = None  # of the assistant's message that follows
    for number, item in enumerate(given):
        kind = item.type or "message"
        if kind == "reasoning":
            parts = item.content if isinstance(item.content, list) else []
            reasoning = "\n".join(filter(None, (reasoning, *(part.text for part in parts))))
        elif kind == "function_call_output":
            if item.call_id is None or item.output is None:
                raise invalid(f"input[{number}]: a function_call_output needs call_id and output.", param="input")
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)})
        elif kind == "function_call":
            if item.call_id is None or item.name is None or item.arguments is None:
                raise invalid(f"input[{number}]: a function_call needs call_id, name and arguments.", param="input")
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            if reasoning is None and messages and messages[-1]["role"] == "assistant":
                messages[-1] = {**messages[-1], "tool_calls": [*messages[-1].get("tool_calls", ()), call]}
            else:
                messages.append({"role": "assistant", "content": None, "tool_calls": [call]} | _why(reasoning))
            reasoning = None
        elif kind == "message":
            if item.role is None or item.content is None:
                raise invalid(f"input[{number}]: a message needs role and content.", param="input")
            message = {"role": item.role, "content": _content(item.content)}
            if item.role == "assistant":
                message |= _why(reasoning)
            messages.append(message)
            reasoning = None
        else:
            message = f"input[{number}]: items of the type {kind[:50]!r} are not supported."
            raise invalid(message, param="input", code="unsupported_content")
    if reasoning:  # an answer that was cut off inside of it
        messages.append({"role": "assistant", "content": "", **_why(reasoning)})
    return messages


def _why(reasoning: str | None) -> dict[str, Any]:
    return {} if not reasoning else {"reasoning_content": reasoning}


def _content(content: str | Sequence[ContentPart]) -> Any:
    if isinstance(content, str):
        return content
    return [part.model_dump(include={"type", "text", "refusal"}, exclude_none=True) for part in content]
