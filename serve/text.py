"""Tokenises, detokenises and renders chat templates in threads, so that a long prompt does not block the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ..dynamic.text.tokenizer import Tokenizer
from .errors import invalid

Result = TypeVar("Result")


class TextPool:
    """A tokenizer with a small thread pool.

    Arguments:
        tokenizer: thread-safe.
        threads: how many texts are processed at once.
    """

    def __init__(self, tokenizer: Tokenizer, threads: int) -> None:
        self.tokenizer = tokenizer
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="text")

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        return await self.run(self.tokenizer.encode, text, add_special_tokens)

    async def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of token ids."""
        return await self.run(self.tokenizer.decode, token_ids, skip_special_tokens)

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        add_special_tokens: bool,
        variables: Mapping[str, Any],
    ) -> tuple[str, list[int]]:
        """The prompt text and the token ids of a conversation.

        Raises:
            ApiError: status 400 when the model has no template, or the template refuses the conversation.
        """

        def render_and_encode() -> tuple[str, list[int]]:
            text = self.tokenizer.chat_prompt(messages, add_generation_prompt=add_generation_prompt, **variables)
            text.encode()  # template variables may hold lone surrogates, which tokenizers refuse
            return text, self.tokenizer.encode(text, add_special_tokens)

        reserved = {"messages", "add_generation_prompt", "tools", "documents"} & set(variables)
        if reserved:
            raise invalid(f"chat_template_kwargs must not hold {sorted(reserved)}.", param="chat_template_kwargs")
        try:
            return await self.run(render_and_encode)
        except ValueError as error:
            raise invalid(f"{error}.", param="messages") from error

    def close(self) -> None:
        """Shut the threads down."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)
