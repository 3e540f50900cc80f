"""Request bodies. Field names and defaults are OpenAI's, with vLLM's extensions.

Validation is strict (``"5"`` is not a number, ``true`` not an integer, NaN is refused). Limits that the operator may
set are checked in ``json_body.py`` and ``request_checks.py``; unknown fields are ignored unless they change the meaning
of the answer. Every list is a :data:`Many`, so that its first wrong element ends its validation.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1


def _encodable(text: str) -> str:
    # JSON can spell half of a surrogate pair, which no tokenizer and no answer can hold.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must not hold lone surrogates") from None
    return text


Item = TypeVar("Item")
Many = Annotated[list[Item], Field(fail_fast=True)]
Text = Annotated[str, AfterValidator(_encodable)]
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
Count = Annotated[int, Field(ge=0, le=INT32_MAX)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Body(BaseModel):
    """Base of all request bodies."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: bool | None = Field(None, description="End the stream with a chunk that holds the usage.")
    include_compute: bool | None = Field(
        None, description="Report with every token how many layers and experts ran for it."
    )


class Contract(Body):
    """The risk that the client accepts."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")

    alpha: Annotated[float, Field(gt=0, lt=1)] = Field(
        description="Share of tokens, in the mean over requests, that may differ from the full model's choice."
    )
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.05, description="Probability that the calibration behind the certificate is wrong."
    )


class GenerationRequest(Body):
    """Fields that text and chat completions share."""

    model: Text | None = Field(None, description="The served model's name; may be absent.")
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = Field(None, description="-1 and 0 turn it off.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="Token id, as a string, to the amount added to its logit."
    )
    seed: Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX)] | None = None
    n: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    stop: Text | Many[Text] | None = None
    stop_token_ids: Many[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Count | None = Field(None, description="Alternatives per prompt token; not with stream.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-INT32_MAX, le=INT32_MAX)] | None = Field(None, description="Lower is earlier.")
    cache_salt: Annotated[Text, Field(min_length=1, max_length=256)] | None = Field(
        None, description="Only requests with the same salt share cached prompt beginnings."
    )
    quality: Literal["exact"] | Contract | None = Field(
        None, description="exact (default): all layers and experts; or the accepted risk, which may cost less compute."
    )
    experts_per_token: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = Field(
        None,
        description="Most experts that a generated token uses in a layer; uncertified, so not together with quality.",
    )
    user: str | None = None

    @property
    def streams_compute(self) -> bool:
        """Whether the stream reports each token's compute."""
        return self.stream_options is not None and bool(self.stream_options.include_compute)


class CompletionRequest(GenerationRequest):
    """Body of ``POST /v1/completions``."""

    prompt: Text | Many[Text] | Many[TokenId] | Many[Many[TokenId]]
    max_tokens: Count | None = Field(None, description="16 when absent; 0 is allowed with echo or prompt_logprobs.")
    echo: bool | None = Field(None, description="Begin the answer with the prompt.")
    logprobs: Count | None = Field(None, description="Alternatives per token.")
    add_special_tokens: bool | None = Field(None, description="Put BOS and the like around text prompts (default).")


class TextPart(Body):
    """A part of a message's content."""

    type: str
    text: Text | None = None


class ChatMessage(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Many[TextPart] | None = None
    name: Text | None = None


class ChatCompletionRequest(GenerationRequest):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[Many[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = Field(
        None, description="The newer name of max_tokens. Without either: up to the model's maximum length."
    )
    logprobs: bool | None = None
    top_logprobs: Count | None = Field(None, description="Alternatives per token; needs logprobs.")
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = Field(None, description="Off when absent: the template writes them itself.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Variables of the model's chat template, such as enable_thinking."
    )


class TokenizeRequest(Body):
    """Body of ``POST /tokenize``: a prompt or a conversation."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[Many[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = Field(None, description="On for prompts, off for conversations when absent.")
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class ReloadRequest(Body):
    """Body of ``POST /v1/contracts/reload``: an empty object. Web pages cannot send it without asking first."""

    model_config = ConfigDict(strict=True, extra="forbid")


class DetokenizeRequest(Body):
    """Body of ``POST /detokenize``."""

    model: Text | None = None
    tokens: Many[TokenId]
    skip_special_tokens: bool | None = None
