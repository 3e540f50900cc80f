"""``/v1/messages``: Anthropic's request bodies, answers and errors. Fields of :class:`GenerationRequest` are taken as
well."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .openai import Body, Count, GenerationRequest, Many, Positive, Text
from .openai_answers import Answer, ComputeUsage


class TextBlock(Body):
    """A part of a system prompt, or of a tool's result."""

    type: Text
    text: Text | None = None


class Block(TextBlock):
    """A part of a message: text, thinking, a call of a tool, or its result."""

    thinking: Text | None = None
    id: Text | None = None
    name: Text | None = None
    input: dict[str, Any] | None = None
    tool_use_id: Text | None = None
    content: Text | Many[TextBlock] | None = None
    is_error: bool | None = None


class Message(Body):
    """One message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: Text | Many[Block]


class MessageTool(Body):
    """A tool that the model may call."""

    type: Text | None = None
    name: Text
    description: Text | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(Body):
    """Whether tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: Text | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    """Whether the model thinks first, and how long."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputConfig(Body):
    """How hard the model tries, and the form of its answer."""

    effort: Text | None = None
    format: dict[str, Any] | None = None


class CountTokensRequest(GenerationRequest):
    """Body of ``POST /v1/messages/count_tokens``."""

    messages: Annotated[Many[Message], Field(min_length=1)]
    system: Text | Many[TextBlock] | None = None
    tools: Many[MessageTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class MessagesRequest(CountTokensRequest):
    """Body of ``POST /v1/messages``."""

    max_tokens: Positive
    stop_sequences: Many[Text] | None = None


class ThinkingTokens(Answer):
    """What the generated tokens were."""

    thinking_tokens: int


class MessageUsage(Answer):
    """Tokens read and written, and what they cost. ``input_tokens`` leaves out the cached ones."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens | None = None
    compute: ComputeUsage | None = None


class MessageAnswer(Answer):
    """Answer of ``POST /v1/messages``. ``content`` holds blocks: thinking, text, tool_use."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(Answer):
    """Answer of ``POST /v1/messages/count_tokens``."""

    input_tokens: int


class MessageErrorDetail(Answer):
    """What went wrong."""

    type: str
    message: str


class MessageErrorResponse(Answer):
    """Body of every error of these endpoints."""

    type: Literal["error"]
    error: MessageErrorDetail
    request_id: str | None = None
