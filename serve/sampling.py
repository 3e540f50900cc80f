"""A request's fields as :class:`SamplingParams`: the client's value, else the model's default, else OpenAI's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..dynamic.engine.quality import Quality
from ..dynamic.engine.sampling_params import SamplingParams
from ..dynamic.engine.structured_outputs import StructuredOutputsParams
from .errors import invalid
from .wire.openai import ChatCompletionRequest, CompletionRequest, Contract, GenerationRequest

COMPLETION_MAX_TOKENS = 16
_SAME_NAME = (
    "n",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "min_tokens",
    "include_stop_str_in_output",
    "ignore_eos",
    "prompt_logprobs",
    "skip_special_tokens",
)
_MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_params(
    body: GenerationRequest,
    defaults: Mapping[str, Any],
    default_quality: Quality | None = None,
    form: StructuredOutputsParams | None = None,
) -> SamplingParams:
    """A request's sampling settings without ``max_tokens`` (see :func:`with_length`).

    Arguments:
        body: the request, checked.
        defaults: the model's generation defaults.
        default_quality: contract of a request without ``quality``.
        form: of the answer.

    Raises:
        ApiError: status 400 for invalid combinations.
    """
    chosen = {name: value for name in _SAME_NAME if (value := getattr(body, name)) is not None}
    for name in _MODEL_DEFAULTS:
        value = getattr(body, name)
        if value is None:
            value = defaults.get(name)
        if value is not None:
            chosen[name] = value
    if body.seed == -1:  # as in vLLM, SGLang and llama.cpp: a random one
        del chosen["seed"]
    chosen["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    chosen["stop_token_ids"] = tuple(body.stop_token_ids or ())
    chosen["logit_bias"] = {int(token): bias for token, bias in (body.logit_bias or {}).items()}
    if isinstance(body, ChatCompletionRequest):
        chosen["logprobs"] = (body.top_logprobs or 0) if body.logprobs else None
    elif isinstance(body, CompletionRequest):
        chosen["logprobs"] = body.logprobs
        if body.echo and body.logprobs is not None:
            chosen["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    chosen["structured_outputs"] = form
    if isinstance(body.quality, Contract):
        chosen["quality"] = Quality(**vars(body.quality))
    elif body.quality is None and body.experts_per_token is None and default_quality is not None:
        chosen["quality"] = default_quality
    if body.experts_per_token is not None:
        if body.quality is not None:
            message = "experts_per_token contradicts quality: no certificate covers an additional cap."
            raise invalid(message, param="experts_per_token")
        chosen |= {"quality": None, "experts_per_token": body.experts_per_token}
    try:
        return SamplingParams(**chosen, max_tokens=None)
    except ValueError as error:
        raise invalid(f"{error}.") from error


def requested_length(body: GenerationRequest) -> int | None:
    """The output length that the client asks for."""
    if isinstance(body, ChatCompletionRequest):
        return body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    assert isinstance(body, CompletionRequest)
    return body.max_tokens


def with_length(
    params: SamplingParams,
    *,
    requested: int | None,
    default: int | None,
    cap: int | None,
    prompt_tokens: int,
    max_model_len: int,
) -> SamplingParams:
    """Set ``max_tokens`` for one prompt.

    Arguments:
        requested: what the client asks for; 0 (score the prompt only) runs one token, which the answer then drops.
        default: used when the client asks for nothing; None goes up to the model's maximum length.
        cap: the operator's limit on the default.
        prompt_tokens, max_model_len: in tokens.

    Raises:
        ApiError: status 400 when prompt and output do not fit together.
    """
    room = max_model_len - prompt_tokens
    wanted = max(1, requested or 0)
    if room < wanted:
        # Client libraries recognise the case by these words and by the code.
        message = (
            f"This model's maximum context length is {max_model_len} tokens. However, you requested "
            f"{prompt_tokens + wanted} tokens ({prompt_tokens} in the prompt, {wanted} in the completion); shorten the "
            "prompt or ask for fewer tokens (context_length_exceeded)."
        )
        raise invalid(message, param="max_tokens" if room > 0 else "prompt", code="context_length_exceeded")
    if requested is not None:
        length = max(1, requested)
    else:
        length = min(value for value in (default, cap, room) if value is not None)
    if params.min_tokens > length:
        raise invalid(f"min_tokens={params.min_tokens} is greater than max_tokens={length}.", param="min_tokens")
    return dataclasses.replace(params, max_tokens=length)
