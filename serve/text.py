"""Tokenises, detokenises, renders chat templates and parses large bodies in threads, so that none of it blocks the
event loop."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ..dynamic.text.chat_template import ALLOWED_VARIABLES, TemplateEnded
from ..dynamic.text.tokenizer import Tokenizer
from .errors import invalid, overloaded, unavailable
from .reasoning_markers import ReasoningMarkers
from .reasoning_markers import derive as derive_reasoning
from .tool_markers import IN_WORDS, PROBE, CallMarkers, derive
from .tool_messages import introduced, with_text_arguments

logger = logging.getLogger("dynamoe.server")

Result = TypeVar("Result")
LARGE_TEXT = 1 << 16  # characters or tokens
MAX_RENDERINGS = 256  # conversations that wait for the chat template or are in it
# Fields of the request, or not supported.
_RESERVED = frozenset({"tools", "documents"})
# Variables with an effect that a caller must not wait for in vain.
_OF_REASONING = ("enable_thinking", "thinking", "thinking_budget", "reasoning_effort")


class TextPool:
    """A tokenizer with a small thread pool. Chat templates have a thread of their own, and so has everything large, so
    that neither keeps ordinary texts waiting.

    Arguments:
        tokenizer: thread-safe.
        threads: how many texts are processed at once.
        max_characters: of one text; a tokenizer needs some 200 bytes of memory for each.
    """

    def __init__(self, tokenizer: Tokenizer, threads: int, max_characters: int) -> None:
        self.tokenizer = tokenizer
        self._max_characters = max_characters
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="text")
        self._templates = ThreadPoolExecutor(1, thread_name_prefix="template")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="large")
        self._renderings = 0
        self._markers: tuple[CallMarkers | None] | None = None  # once they have been looked for
        self._reasoning: tuple[ReasoningMarkers | None] | None = None

    async def encode(self, text: str, add_special_tokens: bool, *, param: str = "prompt") -> list[int]:
        """Token ids of a text.

        Arguments:
            param: the request's field that it comes from.

        Raises:
            ApiError: status 400 when it is too long, or the tokenizer refuses it.
        """
        return await self._encode(self.tokenizer.encode, text, add_special_tokens, param)

    async def encode_with_starts(self, text: str, add_special_tokens: bool) -> tuple[list[int], list[int]]:
        """As :meth:`encode`, and where each token begins in the text."""
        return await self._encode(self.tokenizer.encode_with_starts, text, add_special_tokens, "prompt")

    async def _encode(
        self, encode: Callable[[str, bool], Result], text: str, add_special_tokens: bool, param: str
    ) -> Result:
        if len(text) > self._max_characters:
            raise invalid(f"A text of {len(text)} characters is longer than {self._max_characters}.", param=param)
        try:
            return await self.run_sized(len(text), encode, text, add_special_tokens)
        except ValueError as error:
            raise invalid(f"{error}.", param=param) from error

    async def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of token ids."""
        return await self.run_sized(len(token_ids), self.tokenizer.decode, token_ids, skip_special_tokens)

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        add_special_tokens: bool,
        variables: Mapping[str, Any],
        continue_final_message: bool = False,
        reasoning_effort: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> tuple[str, list[int]]:
        """The prompt text and the token ids of a conversation.

        Arguments:
            tools: that the model may call; said in words where the template does not read them.

        Raises:
            ApiError: status 400 when the model has no template, or the template refuses the conversation.
        """

        def prompt(messages: Sequence[Mapping[str, Any]]) -> str:
            return self.tokenizer.chat_prompt(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **variables,
            )

        def render() -> str:
            try:
                return prompt(messages)
            except ValueError:
                if not any(message.get("tool_calls") for message in messages):
                    raise
                return prompt(with_text_arguments(messages))  # some templates join them to other texts

        allowed = ALLOWED_VARIABLES - _RESERVED
        if wrong := sorted(set(variables) - allowed):
            shown = [name[:50].encode("utf-8", "replace").decode() for name in wrong[:5]]
            message = f"chat_template_kwargs must not hold {shown}; allowed: {sorted(allowed)}."
            raise invalid(message, param="chat_template_kwargs")
        if add_generation_prompt and continue_final_message:
            raise invalid(
                "add_generation_prompt and continue_final_message exclude each other.", "continue_final_message"
            )
        source = self.tokenizer.chat_source or ""
        marked = await self.reasoning_markers() is not None
        variables = {**self._effort(source, reasoning_effort), **variables}
        for name in _OF_REASONING:
            value = variables.get(name)
            if value is not None and source and not _reads(source, name) and (marked or value is not False):
                message = f"chat_template_kwargs.{name} is not supported: the model's chat template does not read it."
                raise invalid(message, param="chat_template_kwargs", code="unsupported_parameter")
        if tools and self.tokenizer.reads_tools:
            variables["tools"] = list(tools)
        elif tools:
            messages = introduced(messages, tools)
        if self._renderings >= MAX_RENDERINGS:
            raise overloaded("Too many conversations wait for the chat template.", 5.0)
        self._renderings += 1
        try:
            text = await _call(self._templates, render)
        except ValueError as error:
            raise invalid(f"{error}.", param="messages") from error
        finally:
            self._renderings -= 1
        return text, await self.encode(text, add_special_tokens, param="messages")

    async def call_markers(self) -> CallMarkers | None:
        """How the model writes calls of tools; None where its chat template does not show it in a way that is read.

        Raises:
            ApiError: status 503 when the template's process ended before that was found; the next call tries again.
        """
        if not self.tokenizer.reads_tools:
            return IN_WORDS
        if self._markers is None:
            try:
                self._markers = (await _call(self._templates, derive, self._with_probe),)
            except TemplateEnded as error:
                raise unavailable(f"{error}.", "chat_template_failed") from error
        return self._markers[0]

    async def reasoning_markers(self) -> ReasoningMarkers | None:
        """How the model marks its reasoning; None where it has none.

        Raises:
            ApiError: status 503 when the template's process ended before that was found; the next call tries again.
        """
        if self._reasoning is None and not self.tokenizer.has_chat_template:
            return None
        if self._reasoning is None:
            try:
                self._reasoning = (await _call(self._templates, self._find_reasoning),)
            except TemplateEnded as error:
                raise unavailable(f"{error}.", "chat_template_failed") from error
        return self._reasoning[0]

    async def thinking_variables(self, enabled: bool) -> dict[str, Any]:
        """Variables of the chat template that turn reasoning on or off.

        Raises:
            ApiError: status 400 where the template cannot.
        """
        markers, source = await self.reasoning_markers(), self.tokenizer.chat_source or ""
        if (markers is None) != enabled and (markers is None or markers.channels):
            return {}  # it does so anyway
        for name in ("enable_thinking", "thinking") if markers is not None and not markers.channels else ():
            if _reads(source, name):
                return {name: enabled}
        if enabled and markers is not None:
            return {}
        message = f"thinking cannot be {'enabled' if enabled else 'disabled'} with the model's chat template."
        raise invalid(message, param="thinking", code="unsupported_parameter")

    def _find_reasoning(self) -> ReasoningMarkers | None:
        def render(messages: Sequence[Mapping[str, Any]]) -> str:
            return self.tokenizer.chat_prompt(messages, add_generation_prompt=False)

        return derive_reasoning(render, self.tokenizer.chat_source or "", self.tokenizer.added_tokens)

    def _with_probe(self, messages: Sequence[Mapping[str, Any]], begin_next: bool) -> str:
        return self.tokenizer.chat_prompt(messages, add_generation_prompt=begin_next, tools=PROBE)

    @staticmethod
    def _effort(source: str, effort: str | None) -> dict[str, Any]:
        """The template's variable for a ``reasoning_effort``."""
        if effort is None:
            return {}
        if "reasoning_effort" in source:
            return {"reasoning_effort": effort}
        if effort == "none" and "enable_thinking" in source:
            return {"enable_thinking": False}
        message = f"reasoning_effort {effort[:50]!r} is not supported: the model's chat template does not read it."
        raise invalid(message, param="reasoning_effort", code="unsupported_parameter")

    async def warm_up(self) -> None:
        """Start the chat template's process before the first conversation."""
        if self.tokenizer.has_chat_template:
            try:
                await _call(self._templates, self.tokenizer.chat_template)
            except ValueError as error:
                logger.warning("%s; conversations will be refused", error)

    def close(self) -> None:
        """Shut the threads down, and end what chat templates are doing."""
        self.tokenizer.close()
        for pool in (self._pool, self._templates, self._large):
            pool.shutdown(wait=False, cancel_futures=True)

    async def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function in one of the threads for ordinary texts."""
        return await _call(self._pool, function, *arguments)

    async def run_sized(self, size: int, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function in the thread that suits a text of ``size`` characters or tokens."""
        return await (self.run if size <= LARGE_TEXT else self.run_large)(function, *arguments)

    async def run_large(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function in the thread for everything large."""
        return await _call(self._large, function, *arguments)


async def _call(pool: ThreadPoolExecutor, function: Callable[..., Result], *arguments: Any) -> Result:
    return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)


def _reads(source: str, name: str) -> bool:
    """Whether a template reads a variable, and not just a field or a key of that name."""
    return re.search(rf"(?<![\w.'\"]){name}\b", source) is not None
