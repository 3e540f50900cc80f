"""``/v1/responses``: OpenAI's request bodies and answers. Fields of :class:`GenerationRequest` are taken as well."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from .openai import Body, Count, GenerationRequest, Many, Positive, Text
from .openai_answers import Answer, ComputeUsage


class ContentPart(Body):
    """A part of a content."""

    type: Text
    text: Text | None = None
    refusal: Text | None = None


class Item(Body):
    """A message, a call, the result of one, or reasoning."""

    type: Text | None = Field(None, description="message (when absent), function_call(_output), or reasoning.")
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Text | Many[ContentPart] | None = None
    call_id: Text | None = None
    name: Text | None = None
    arguments: Text | None = Field(None, description="A JSON object, as text.")
    output: Text | Many[ContentPart] | None = None


class FunctionTool(Body):
    """A function that the model may call."""

    type: Text
    name: Text | None = None
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextOptions(Body):
    """What the text has to be."""

    format: dict[str, Any] | None = Field(None, description="text, json_object, or json_schema with a schema.")
    verbosity: Text | None = None


class ReasoningOptions(Body):
    """How the model reasons."""

    effort: Text | None = None
    summary: Text | None = None
    generate_summary: Text | None = None


class ResponsesRequest(GenerationRequest):
    """Body of ``POST /v1/responses``."""

    input: Text | Many[Item]
    instructions: Text | None = None
    tools: Many[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    max_output_tokens: Positive | None = None
    top_logprobs: Count | None = None
    include: Many[Text] | None = None
    store: bool | None = Field(None, description="Keep the answer for a while (default).")
    previous_response_id: Text | None = None
    metadata: dict[Text, Text] | None = Field(None, description="Returned as it is.")
    chat_template_kwargs: dict[str, Any] | None = None
    thinking_token_budget: Count | None = None


class InputTokensDetails(Answer):
    """Where the input's tokens came from."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(Answer):
    """What the generated tokens were."""

    reasoning_tokens: int


class ResponseUsage(Answer):
    """Tokens read and written, and what they cost."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    compute: ComputeUsage | None = None


class ResponseError(Answer):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(Answer):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class Response(Answer):
    """Answer of ``POST /v1/responses``. ``output`` holds items: reasoning, message, function_call."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None


class DeletedResponse(Answer):
    """Answer of ``DELETE /v1/responses/{id}``."""

    id: str
    object: Literal["response"]
    deleted: bool
