"""Responses of the server. The OpenAPI document and the tests use these types; hot paths write the JSON directly."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """Base of all response types."""

    model_config = ConfigDict(strict=True, extra="forbid")


class ErrorDetail(Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Answer):
    """Body of every error response."""

    error: ErrorDetail


class PromptTokensDetails(Answer):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class CompletionTokensDetails(Answer):
    """What the generated tokens were."""

    reasoning_tokens: int


class ComputeUsage(Answer):
    """What was executed for the request, counted at kernel launches, prompts included.

    ``quality`` is ``bounded`` under a certificate, ``uncertified`` with an expert cap that no certificate covers, else
    ``exact``; ``reason`` says why. A certificate covers the first ``certified_tokens`` tokens of a completion. One that
    was longer was computed anew when it had ``exact_after`` tokens, and went on exactly. Layers and experts per token
    are means over generated tokens, ``token_layers`` and ``token_experts`` their sums: of the one row that chose each
    token. Rows times layers, rows times experts and FLOPs are totals, prompts included. FLOPs are those of the layers,
    of KV propagation through skipped layers, and of the LM head for generated tokens, without attention over the
    context, probes and adapters. Weight bytes are what the generated tokens need, each as if it ran alone. ``full_…``:
    the same with all layers and experts.
    """

    quality: Literal["exact", "bounded", "uncertified"]
    certificates: list[str]
    reason: str | None
    certified_tokens: int | None
    exact_after: int | None
    layers_per_token: float
    experts_per_token: float
    token_layers: int
    token_experts: int
    layer_rows: int
    full_layer_rows: int
    expert_rows: int
    full_expert_rows: int
    flops: int
    full_flops: int
    weight_bytes: int
    full_weight_bytes: int


class Usage(Answer):
    """Tokens read and written, and what they cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None
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


class TokenCompute(Answer):
    """Per token of a chunk: layers that ran before its exit head, and experts used in them."""

    layers: list[int]
    experts: list[int]


class CompletionChoice(Answer):
    """One completion, or in a stream a part of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | None = None
    compute: TokenCompute | None = None


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


class AnsweredFunction(Answer):
    """A function and its arguments, a JSON object as text; in a stream a part of them."""

    name: str | None = None
    arguments: str


class AnsweredCall(Answer):
    """A call of a tool, or in a stream a part of it."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: AnsweredFunction


class AssistantMessage(Answer):
    """The message that the model generated."""

    role: Literal["assistant"]
    content: str | None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    tool_calls: list[AnsweredCall] | None = None


class ChatChoice(Answer):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
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
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[AnsweredCall] | None = None


class ChatChunkChoice(Answer):
    """A part of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    stop_reason: int | str | None = None
    compute: TokenCompute | None = None


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


class ContractScope(Answer):
    """The requests that a certificate covers: temperatures (0 to 0: greedy only), smallest ``max_tokens``, tokens of an
    output that are covered, kind of prompts, a hash of those that were calibrated on, and whether outputs that go on
    past the model's end of text are covered too."""

    lowest_temperature: float
    highest_temperature: float
    min_tokens: int
    max_tokens: int
    prompts: str
    prompts_hash: str
    ignore_eos: bool


class HeldOutLoss(Answer):
    """The certificate's setting on requests that were not used to choose or calibrate it: mean loss and 95 % interval;
    the mean loss with all outputs cut at ``worst_length`` tokens; the mean over all tokens; and the mean of each
    request's loss at its own worst length, which is reported and not certified. What the setting spent there: shares of
    the layers, of their experts, and of the bytes of weights that a token of the full model reads. Its
    ``tokens_per_second`` and those of the full model were measured on the machine that calibrated."""

    requests: int
    mean_loss: float
    low: float
    high: float
    layers_executed: float
    worst_length: int | None
    worst_length_loss: float | None
    token_loss: float | None
    worst_cut_loss: float | None
    experts_executed: float | None
    weight_bytes_read: float | None
    tokens_per_second: float | None
    full_tokens_per_second: float | None


class ContractBet(Answer):
    """State of the monitor, over all tenants. ``wealth`` is the largest of any bet. Where a tenant's own has reached
    ``fires_at``, the certificate is reverted for that tenant (``reverted_tenants`` counts them); where the pooled one
    has, for ``everybody``. ``fired_at_loss``: how many losses the first bet that fired had seen."""

    picks: int
    running: int
    pending: int
    interrupted: int
    losses: int
    realised_risk: float | None
    wealth: float
    fires_at: float
    fired_at_loss: int | None
    tenants: int
    reverted_tenants: int
    everybody: bool


class ContractCard(Answer):
    """A certificate in the catalog. ``state``: ``watched``, ``reverted`` (for everybody, or for all tenants so far:
    requests run exactly), or ``unwatched``. ``reference``: the original model that its losses are measured against, if
    that is not what runs with all layers and experts. ``speed``: of its setting, relative to that model, as measured
    when it was calibrated. ``evidence``: whether the losses that it rests on lie beside it, to be verified."""

    id: str
    object: Literal["contract"]
    state: Literal["watched", "reverted", "unwatched"]
    alpha: float
    delta: float
    method: str
    requests: int
    loss: str
    created: str
    scope: ContractScope
    exit_thresholds: dict[str, float]
    expert_budget: dict[str, str | int | float | bool]
    reference: dict[str, str | int | float | bool]
    speed: float | None
    evidence: bool
    held_out: HeldOutLoss
    monitor: ContractBet | None


class ContractList(Answer):
    """Answer of ``GET /v1/contracts``. ``refused``: certificates that are not in the catalog, and why.

    ``monitored_share``: share of the requests under a certificate that are run again in full.
    """

    object: Literal["list"]
    data: list[ContractCard]
    refused: list[str]
    monitored_share: float


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
    """Answer of ``GET /health`` while requests can be served."""

    status: Literal["ok"]


class LoadResponse(Answer):
    """Answer of ``GET /load``: requests in flight."""

    server_load: int


class VersionResponse(Answer):
    """Answer of ``GET /version``."""

    version: str


def error_responses(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entries of a route's error codes."""
    return {code: {"model": ErrorResponse} for code in codes}


POST_ERRORS = error_responses(400, 401, 404, 408, 413, 429, 500, 503)
