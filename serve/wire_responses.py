"""What the server answers. The OpenAPI document and the tests use these types; hot paths write the JSON directly."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """Base of everything that the server sends."""

    model_config = ConfigDict(strict=True, extra="forbid")


class ErrorDetail(Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Answer):
    """Body of every answer that is not a success."""

    error: ErrorDetail


class PromptTokensDetails(Answer):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class ComputeUsage(Answer):
    """What was executed for the request, counted at the launches, prompts included.

    ``layers_per_token`` is the mean over generated tokens. FLOPs are those of the layers and of the LM head for the
    generated tokens, without attention over the context; ``full_flops`` is what all layers with all experts would have
    taken for the same rows. ``quality`` is ``bounded`` where a certificate held, else ``exact``; ``reason`` says why.
    """

    quality: Literal["exact", "bounded"]
    certificates: list[str]
    reason: str | None
    layers_per_token: float
    layer_rows: int
    full_layer_rows: int
    expert_rows: int
    full_expert_rows: int
    flops: int
    full_flops: int


class Usage(Answer):
    """Tokens read and written, and what they cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    compute: ComputeUsage | None = None


class PromptLogprob(Answer):
    """One alternative at one position of the prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionLogprobs(Answer):
    """Log-probabilities as the completions endpoint writes them: four lists, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    """One completion, or in a stream a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionResponse(Answer):
    """Answer of ``POST /v1/completions``, and every chunk of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(Answer):
    """One alternative. ``bytes`` is its UTF-8 form."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """One token and its best alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """Log-probabilities as the chat endpoint writes them."""

    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(Answer):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(Answer):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None = None


class ChatCompletionResponse(Answer):
    """Answer of ``POST /v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None


class ChatDelta(Answer):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Answer):
    """A piece of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None = None


class ChatCompletionChunk(Answer):
    """One event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(Answer):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(Answer):
    """Answer of ``GET /v1/models``."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeResponse(Answer):
    """Answer of ``POST /tokenize``."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(Answer):
    """Answer of ``POST /detokenize``."""

    prompt: str


class TokenizerInfo(BaseModel):
    """Answer of ``GET /tokenizer_info``: what a client needs to use the tokenizer remotely."""

    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


class HealthResponse(Answer):
    """Answer of ``GET /health`` when all is well."""

    status: Literal["ok"]


class VersionResponse(Answer):
    """Answer of ``GET /version``."""

    version: str


def answer_or_stream(answer: type[Answer]) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entry of an answer that may be streamed as server-sent events."""
    return {200: {"model": answer, "content": {"text/event-stream": {"schema": {"type": "string"}}}}}


def error_responses(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entries of a route's error codes."""
    return {code: {"model": ErrorResponse} for code in codes}
