"""Request bodies. Field names and defaults are OpenAI's, with vLLM's extensions.

Numbers may be written as strings and integers as ``2.0``, as in pydantic's lax mode; ``true`` is no number, and NaN is
refused. All else is strict. Limits that the operator may set are checked in ``json_body.py`` and ``request_checks.py``,
fields that the server does not have in ``fields.py``. Every list is a :data:`Many`, so that its first wrong element
ends its validation.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
)
from pydantic_core import CoreSchema, core_schema

from ...dynamic.engine.quality import check_fields

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1


def _encodable(text: str) -> str:
    # JSON can spell half of a surrogate pair, which no tokenizer and no answer can hold.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must not hold lone surrogates") from None
    return text


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not a boolean")
    return value


def _no_booleans(values: Any) -> Any:
    # One look at all types: a prompt may have very many ids.
    if isinstance(values, list) and bool in set(map(type, values)):
        raise ValueError("must hold numbers, no booleans")
    return values


class _Lax:
    """Marks a number that is validated in pydantic's lax mode, but may not be a boolean.

    Arguments:
        check: whether to look for booleans; otherwise the list around the number does.
    """

    def __init__(self, check: bool = True) -> None:
        self._check = check

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema: Any = handler(source)
        assert schema["type"] in ("int", "float")
        schema["strict"] = False
        return core_schema.no_info_before_validator_function(_no_boolean, schema) if self._check else schema

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [handler(schema), {"type": "string"}]}


LAX = _Lax()
Item = TypeVar("Item")
Many = Annotated[list[Item], Field(fail_fast=True)]
Text = Annotated[str, AfterValidator(_encodable)]
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX), _Lax(check=False)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True), BeforeValidator(_no_booleans)]
Count = Annotated[int, Field(ge=0, le=INT32_MAX), LAX]
Positive = Annotated[int, Field(ge=1, le=INT32_MAX), LAX]
Penalty = Annotated[float, Field(ge=-2, le=2), LAX]


class Body(BaseModel):
    """Base of all request bodies."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: bool | None = Field(None, description="End the stream with a chunk that holds the usage.")
    continuous_usage_stats: bool | None = Field(
        None, description="With include_usage: the usage so far in every chunk."
    )
    include_compute: bool | None = Field(
        None, description="Report with every token how many layers and experts ran for it."
    )


def _named(value: Any) -> Any:
    if isinstance(value, dict):
        check_fields(value)
    return value


class Contract(Body):
    """The risk that the client accepts."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")

    alpha: Annotated[float, Field(gt=0, lt=1), LAX] = Field(
        description="Share of tokens, in the mean over requests, that may differ from the full model's choice."
    )
    delta: Annotated[float, Field(gt=0, lt=1), LAX] = Field(
        0.05, description="Probability that the calibration behind the certificate is wrong."
    )
    require: bool = Field(
        False, description="Answer 409 where no certificate covers the request, instead of running it exactly."
    )


class GenerationRequest(Body):
    """Fields that text and chat completions share."""

    model: Text | None = Field(None, description="The served model's name; may be absent.")
    temperature: Annotated[float, Field(ge=0, le=100), LAX] | None = None
    top_p: Annotated[float, Field(gt=0, le=1), LAX] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX), LAX] | None = Field(None, description="-1 and 0 turn it off.")
    min_p: Annotated[float, Field(ge=0, le=1), LAX] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100), LAX] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100), LAX]] | None = Field(
        None, description="Token id, as a string, to the amount added to its logit."
    )
    seed: Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX), LAX] | None = Field(
        None, description="-1, like none: a random one."
    )
    n: Positive | None = None
    stop: Text | Many[Text] | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Count | None = Field(None, description="Alternatives per prompt token; not with stream.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-INT32_MAX, le=INT32_MAX), LAX] | None = Field(
        None, description="Lower is earlier."
    )
    cache_salt: Annotated[Text, Field(min_length=1, max_length=256)] | None = Field(
        None, description="Only requests with the same salt share cached prompt beginnings."
    )
    quality: Annotated[Literal["exact"] | Contract | None, BeforeValidator(_named)] = Field(
        None, description="exact (default): all layers and experts; or the accepted risk, which may cost less compute."
    )
    experts_per_token: Positive | None = Field(
        None,
        description="Most experts that a generated token uses in a layer; uncertified, so not together with quality.",
    )
    response_format: dict[str, Any] | None = Field(
        None, description="text, json_object, or json_schema with a schema: the form of the answer."
    )
    structured_outputs: dict[str, Any] | None = Field(
        None, description="The form of the answer: one of json, json_object, regex, choice and grammar."
    )
    guided_json: dict[str, Any] | Text | None = Field(None, description="A JSON schema, or its text.")
    guided_regex: Text | None = None
    guided_choice: Many[Text] | None = None
    guided_grammar: Text | None = Field(None, description="In Lark's syntax or in GBNF.")
    guided_whitespace_pattern: Text | None = Field(None, description="With guided_json: whitespace between its parts.")
    json_schema: dict[str, Any] | Text | None = Field(None, description="As guided_json.")
    regex: Text | None = Field(None, description="As guided_regex.")
    grammar: Text | None = Field(None, description="As guided_grammar.")
    ebnf: Text | None = Field(None, description="As guided_grammar.")
    user: str | None = None

    @property
    def streams_compute(self) -> bool:
        """Whether the stream reports each token's compute."""
        return self.stream_options is not None and bool(self.stream_options.include_compute)


class CompletionRequest(GenerationRequest):
    """Body of ``POST /v1/completions``."""

    prompt: Text | Many[Text] | TokenIds | Many[TokenIds]
    max_tokens: Count | None = Field(None, description="16 when absent; 0 is allowed with echo or prompt_logprobs.")
    echo: bool | None = Field(None, description="Begin the answer with the prompt.")
    logprobs: Count | None = Field(None, description="Alternatives per token.")
    add_special_tokens: bool | None = Field(None, description="Put BOS and the like around text prompts (default).")


class Function(Body):
    """A function that the model may call."""

    name: Text
    description: Text | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of an object.")
    strict: bool | None = Field(None, description="Refuse parameters whose keywords are not all enforced.")


class Tool(Body):
    """A tool of the type function."""

    type: Literal["function"]
    function: Function


class CalledFunction(Body):
    """What an earlier message called."""

    name: Text
    arguments: Text = Field(description="A JSON object, as text.")


class ToolCall(Body):
    """A call in an earlier message of the assistant."""

    id: Text | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class TextPart(Body):
    """A part of a message's content."""

    type: str
    text: Text | None = None
    refusal: Text | None = None


class ChatMessage(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Many[TextPart] | None = None
    name: Text | None = None
    tool_call_id: Text | None = None
    tool_calls: Many[ToolCall] | None = None
    reasoning_content: Text | None = Field(None, description="For templates that read it; reasoning is the same.")
    reasoning: Text | None = None
    refusal: Text | None = Field(None, description="Stands for a content that is absent.")


class ConversationRequest(Body):
    """Fields that say how a conversation becomes a prompt."""

    tools: Many[Tool] | None = None
    add_generation_prompt: bool | None = Field(None, description="On when absent, but not with continue_final_message.")
    continue_final_message: bool | None = Field(None, description="Leave the last message open, to be continued.")
    add_special_tokens: bool | None = None
    reasoning_effort: Text | None = Field(None, description="For templates that read it, or enable_thinking.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Variables of the model's chat template, such as enable_thinking."
    )

    @property
    def rendering(self) -> dict[str, Any]:
        """How the conversation becomes a prompt, as arguments of ``TextPool.encode_chat``."""
        begin, continued = self.add_generation_prompt, bool(self.continue_final_message)
        return {
            "add_generation_prompt": not continued if begin is None else begin,
            "continue_final_message": continued,
            "add_special_tokens": bool(self.add_special_tokens),
            "reasoning_effort": self.reasoning_effort,
            "variables": self.chat_template_kwargs or {},
        }


class ChatCompletionRequest(ConversationRequest, GenerationRequest):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[Many[ChatMessage], Field(min_length=1)]
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = Field(
        None, description="auto (default with tools), none, required, or a function of tools by name."
    )
    parallel_tool_calls: bool | None = Field(None, description="false: one call at most.")
    thinking_token_budget: Annotated[int, Field(ge=-1, le=INT32_MAX), LAX] | None = Field(
        None, description="Tokens after which a block of reasoning is closed; -1, like none: never."
    )
    include_reasoning: bool | None = Field(None, description="false: leave the reasoning out of the answer.")
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = Field(
        None, description="The newer name of max_tokens. Without either: up to the model's maximum length."
    )
    logprobs: bool | None = None
    top_logprobs: Count | None = Field(None, description="Alternatives per token; needs logprobs.")
    add_special_tokens: bool | None = Field(None, description="Off when absent: the template writes them itself.")
    echo: bool | None = Field(None, description="Begin the answer with the last message if it is the assistant's.")


class TokenizeRequest(ConversationRequest):
    """Body of ``POST /tokenize``: a prompt or a conversation."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[Many[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = Field(None, description="On for prompts, off for conversations when absent.")
    return_token_strs: bool | None = None


class ReloadRequest(Body):
    """Body of ``POST /v1/contracts/reload``: an empty object. Web pages cannot send it without asking first."""

    model_config = ConfigDict(strict=True, extra="forbid")


class DetokenizeRequest(Body):
    """Body of ``POST /detokenize``."""

    model: Text | None = None
    tokens: TokenIds
    skip_special_tokens: bool | None = None
