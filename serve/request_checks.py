"""Checks beyond the schema: the operator's limits, the served model, fields that are not supported. Before validation,
``json_body.py`` has bounded all lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..dynamic.text.chat_template import message_text
from .errors import ApiError, invalid
from .settings import Limits
from .tool_messages import plain_calls
from .wire.fields import CHAT, COMPLETION, HINTS, MESSAGE, Refused
from .wire.openai import Body, ChatCompletionRequest, ChatMessage, CompletionRequest, GenerationRequest


def check_supported(body: Body, refused: Refused, where: str = "", param: str | None = None) -> None:
    """Refuse fields whose meaning is not supported; all other unknown fields are ignored.

    Arguments:
        body: validated.
        refused: fields with the values that change nothing.
        where: the body's place in the request, ending with a dot.
        param: the request's field that holds the body; None if it is the request itself.

    Raises:
        ApiError: status 400 that names the field.
    """
    for name, value in (body.model_extra or {}).items():
        if value is not None and name in refused and value not in refused[name]:
            message = f"{where}{name} is not supported by this server{HINTS.get(name, '')}."
            raise invalid(message, param=param or name, code="unsupported_parameter")


def check_model(requested: str | None, served: str) -> None:
    """Refuse requests for another model.

    Raises:
        ApiError: status 404.
    """
    if requested is not None and requested != served:
        message = f"The model {requested[:200]!r} does not exist; this server serves {served!r}."
        raise ApiError(404, message, param="model", code="model_not_found")


def plain_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """A conversation as chat templates read it: every content one string, its parts on lines of their own.

    Raises:
        ApiError: status 400 for content that is not text.
    """
    plain: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        check_supported(message, MESSAGE, f"messages[{number}].", "messages")
        try:
            text = message_text(message.model_dump(include={"content", "refusal"}))
        except ValueError as error:
            raise invalid(f"messages[{number}]: {error}.", "messages", "unsupported_content") from error
        reasoning = message.reasoning_content or message.reasoning
        plain.append({
            "role": message.role,
            "content": text or "",
            "name": message.name,
            "tool_call_id": message.tool_call_id,
            "tool_calls": plain_calls(message.tool_calls) if message.tool_calls else None,
            **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), reasoning),
        })  # fmt: skip
    return plain


@dataclass(frozen=True, kw_only=True)
class RequestChecks:
    """Checks one request against the operator's limits.

    Arguments:
        limits: set by the operator.
        vocab_size: token ids are below it.
        served_model: name of the only model.
    """

    limits: Limits
    vocab_size: int
    served_model: str

    def completion(self, body: CompletionRequest) -> list[str] | list[list[int]]:
        """Check a completion request; returns its prompts as a list of texts or of token ids.

        Raises:
            ApiError: status 400 or 404.
        """
        prompts = _as_list(body.prompt)
        if not prompts:
            raise invalid("prompt must not be empty.", param="prompt")
        for prompt in prompts:
            if not isinstance(prompt, str):
                self.token_ids(prompt, "prompt")
        self._generation(body, len(prompts))
        self._at_most("logprobs", body.logprobs, self.limits.max_logprobs)
        if body.max_tokens == 0 and not (body.echo or body.prompt_logprobs is not None):
            raise invalid("max_tokens must be at least 1 without echo or prompt_logprobs.", param="max_tokens")
        return prompts

    def chat(self, body: ChatCompletionRequest) -> list[dict[str, Any]]:
        """Check a chat request; returns its messages as templates read them.

        Raises:
            ApiError: status 400 or 404.
        """
        self._generation(body, 1)
        self._at_most("top_logprobs", body.top_logprobs, self.limits.max_logprobs)
        self._at_most("max_completion_tokens", body.max_completion_tokens, self.limits.max_tokens)
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs needs logprobs: true.", param="top_logprobs")
        return plain_messages(body.messages)

    def token_ids(self, ids: Sequence[int], param: str) -> None:
        """Refuse ids outside the vocabulary."""
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise invalid(f"{param}: token id {wrong} is not in the vocabulary of {self.vocab_size}.", param=param)

    def _generation(self, body: GenerationRequest, num_prompts: int) -> None:
        check_model(body.model, self.served_model)
        extra = body.model_extra or {}
        if extra.get("best_of") == (body.n or 1):
            del extra["best_of"]
        check_supported(body, CHAT if isinstance(body, ChatCompletionRequest) else COMPLETION)
        limits = self.limits
        n = body.n or 1
        self._at_most("n", n, limits.max_n)
        if n * num_prompts > limits.max_choices:
            raise invalid(f"n times the number of prompts is {n * num_prompts}, more than {limits.max_choices}.", "n")
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        for stop in stops:
            if not 0 < len(stop) <= limits.max_stop_length:
                raise invalid(f"A stop string must have 1 to {limits.max_stop_length} characters.", param="stop")
        self.token_ids(body.stop_token_ids or (), "stop_token_ids")
        for key in body.logit_bias or ():
            if (
                not (key.isascii() and key.isdecimal() and len(key) < 10 and str(int(key)) == key)
                or int(key) >= self.vocab_size
            ):
                raise invalid(f"logit_bias: {key[:20]!r} is no token id below {self.vocab_size}.", "logit_bias")
        self._at_most("prompt_logprobs", body.prompt_logprobs, limits.max_logprobs)
        self._at_most("max_tokens", getattr(body, "max_tokens", None), limits.max_tokens)
        if body.stream and body.prompt_logprobs is not None:
            raise invalid("prompt_logprobs cannot be streamed; use stream: false.", param="prompt_logprobs")
        if body.stream_options is not None and not body.stream:
            raise invalid("stream_options needs stream: true.", param="stream_options")

    @staticmethod
    def _at_most(name: str, value: int | None, most: int | None) -> None:
        if value is not None and most is not None and value > most:
            raise invalid(f"{name} must be at most {most}, not {value}.", param=name)


def _as_list(prompt: str | list[str] | list[int] | list[list[int]]) -> Any:
    if isinstance(prompt, str):
        return [prompt]
    return [prompt] if prompt and isinstance(prompt[0], int) else prompt
