"""A body of ``/v1/messages`` as the chat request that means the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import invalid
from .request_checks import check_supported
from .responses_input import chat_request, common_fields
from .wire.fields import MESSAGES
from .wire.messages import Block, CountTokensRequest, Message, MessagesRequest, MessageTool, TextBlock
from .wire.openai import ChatCompletionRequest

# What the fields are called in a chat, for errors about those.
NAMES = {
    "response_format": "output_config",
    "reasoning_effort": "output_config",
    "max_completion_tokens": "max_tokens",
    "thinking_token_budget": "thinking",
    "stop": "stop_sequences",
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def as_chat(body: CountTokensRequest, thinking: Mapping[str, Any]) -> ChatCompletionRequest:
    """The chat request.

    Arguments:
        thinking: variables of the chat template that ``body.thinking`` stands for.

    Raises:
        ApiError: status 400 that names what is not supported.
    """
    check_supported(body, MESSAGES)
    fields = common_fields(body)
    if "response_format" in fields:
        raise invalid("response_format is called output_config.format here.", param="response_format")
    if isinstance(body, MessagesRequest):
        if body.stop_sequences is not None and body.stop is not None:
            raise invalid("stop and stop_sequences are the same; give one of them.", param="stop")
        fields |= {"max_completion_tokens": body.max_tokens}
        fields |= {} if body.stop_sequences is None else {"stop": body.stop_sequences}
    config, choice = body.output_config, body.tool_choice
    if config is not None and config.format is not None:
        fields["response_format"] = _format(config.format)
    system = [] if body.system is None else [{"role": "system", "content": _texts(body.system, "system")}]
    messages = [message for number, given in enumerate(body.messages) for message in _messages(number, given)]
    last = messages[-1]
    return chat_request({
        **fields,
        "messages": system + messages,
        "tools": [_tool(number, tool) for number, tool in enumerate(body.tools or ())] or None,
        "tool_choice": None if choice is None else _choice(choice.type, choice.name),
        "parallel_tool_calls": None if choice is None or not choice.disable_parallel_tool_use else False,
        "reasoning_effort": None if config is None else config.effort,
        "chat_template_kwargs": {**thinking, **(body.chat_template_kwargs or {})} or None,
        "thinking_token_budget": None if body.thinking is None else body.thinking.budget_tokens,
        "include_reasoning": False if body.thinking is not None and body.thinking.display == "omitted" else None,
        "continue_final_message": last["role"] == "assistant" and not last.get("tool_calls"),
    })  # fmt: skip


def _choice(kind: str, name: str | None) -> Any:
    if kind != "tool":
        return _CHOICES[kind]
    if name is None:
        raise invalid("tool_choice of the type tool needs a name.", param="tool_choice")
    return {"type": "function", "function": {"name": name}}


def _format(given: dict[str, Any]) -> dict[str, Any]:
    if given.get("type") != "json_schema" or not set(given) <= {"type", "schema"}:
        raise invalid('output_config.format must be {"type": "json_schema", "schema": …}.', param="output_config")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": given.get("schema")}}


def _tool(number: int, tool: MessageTool) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        message = f"tools[{number}]: the type {tool.type[:50]!r} is not supported, only custom."
        raise invalid(message, param="tools", code="unsupported_parameter")
    function = tool.model_dump(include={"name", "description", "strict"}, exclude_none=True)
    return {"type": "function", "function": {**function, "parameters": tool.input_schema}}


def _messages(number: int, given: Message) -> list[dict[str, Any]]:
    """One message; results of tools are messages of their own."""
    if isinstance(given.content, str):
        return [{"role": given.role, "content": given.content}]
    messages: list[dict[str, Any]] = []
    texts: list[str] = []
    said: dict[str, Any] = {}
    for block in given.content:
        if block.type == "text" and block.text is not None:
            texts.append(block.text)
        elif block.type == "thinking" and given.role == "assistant":
            said["reasoning_content"] = said.get("reasoning_content", "") + (block.thinking or "")
        elif block.type == "tool_use" and given.role == "assistant":
            said.setdefault("tool_calls", []).append(_call(number, block))
        elif block.type == "tool_result" and given.role == "user":
            if block.tool_use_id is None:
                raise invalid(f"messages[{number}]: a tool_result needs tool_use_id.", param="messages")
            if texts:
                messages.append({"role": "user", "content": "\n".join(texts)})
                texts = []
            content = "" if block.content is None else _texts(block.content, f"messages[{number}]", "messages")
            content = f"Error: {content}" if block.is_error else content
            messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
        else:
            message = f"messages[{number}]: blocks of the type {block.type[:50]!r} are not supported in this place."
            raise invalid(message, param="messages", code="unsupported_content")
    if texts or said or not messages:
        messages.append({"role": given.role, "content": "\n".join(texts), **said})
    return messages


def _call(number: int, block: Block) -> dict[str, Any]:
    if block.id is None or block.name is None or block.input is None:
        raise invalid(f"messages[{number}]: a tool_use needs id, name and input.", param="messages")
    function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
    return {"id": block.id, "type": "function", "function": function}


def _texts(content: str | Sequence[TextBlock], where: str, param: str = "system") -> str:
    if isinstance(content, str):
        return content
    for block in content:
        if block.type != "text" or block.text is None:
            message = f"{where}: blocks of the type {block.type[:50]!r} are not supported, only text."
            raise invalid(message, param=param, code="unsupported_content")
    return "\n".join(block.text or "" for block in content)
