"""Answers of ``/v1/completions`` and ``/v1/chat/completions``: choices in an envelope, whole or as chunks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ..dynamic.engine.outputs import RequestDelta, RequestOutput
from .errors import ApiError
from .formats import AnswerFormat, PromptLogprobs, Used, write_prompt_logprobs, write_usage
from .streaming import DONE, event
from .wire.openai import ChatCompletionRequest, GenerationRequest


class AnswerWriter(Protocol):
    """How one API writes an answer."""

    @property
    def id(self) -> str:
        """Of the answer."""
        ...

    @property
    def large(self) -> bool:
        """Whether single events may be so large that they are written in a thread."""
        ...

    def whole(self, results: Sequence[RequestOutput], used: Used) -> dict[str, Any]:
        """The whole answer, one result per prompt."""
        ...

    def add(self, batch: Sequence[tuple[int, RequestDelta]], before: Used) -> bytes:
        """The events of a batch of (number of the prompt, delta).

        Arguments:
            before: what the batches before it have cost, and the cached tokens of this one.
        """
        ...

    def end(self, used: Used) -> bytes:
        """The events behind the last batch."""
        ...

    def fail(self, error: ApiError) -> bytes:
        """The events of a stream that ends with an error: its status line was sent already."""
        ...


@dataclass(kw_only=True)
class ChoicesWriter:
    """Writes the choices of one answer.

    Arguments:
        body: of the request, which says what a stream holds.
        model: its name.
        format: of the choices.
    """

    body: GenerationRequest
    model: str
    format: AnswerFormat
    large: bool = field(default=False, init=False)
    _created: int = field(default_factory=lambda: int(time.time()), init=False)
    _prompt_logprobs: dict[int, PromptLogprobs] = field(default_factory=dict, init=False)

    @property
    def id(self) -> str:
        return self.format.id

    def whole(self, results: Sequence[RequestOutput], used: Used) -> dict[str, Any]:
        choices = [
            self.format.whole(number, output, result.prompt_logprobs)
            for number, result in enumerate(results)
            for output in result.outputs
        ]
        answer = {**self._envelope(self.format.whole_object), "choices": choices, "usage": self._usage(used)}
        if isinstance(self.body, ChatCompletionRequest) and self.body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = write_prompt_logprobs(results[0].prompt_logprobs)
        return answer

    def add(self, batch: Sequence[tuple[int, RequestDelta]], before: Used) -> bytes:
        options, envelope = self.body.stream_options, self._envelope(self.format.chunk_object)
        if self._with_usage:
            envelope["usage"] = None  # as in OpenAI's chunks before the last one
        continuous = self._with_usage and options is not None and options.continuous_usage_stats
        events, used = [], before
        for number, delta in batch:
            if delta.prompt_logprobs:
                self._prompt_logprobs[number] = delta.prompt_logprobs
            for completion in delta.completions:
                used = replace(used, completion_tokens=used.completion_tokens + len(completion.token_ids))
                choice = self.format.chunk(number, completion, self._prompt_logprobs.get(number))
                if continuous:
                    envelope = {**envelope, "usage": self._usage(used)}
                if choice is not None:
                    events.append(event({**envelope, "choices": [choice]}, large=number in self._prompt_logprobs))
        return b"".join(events)

    def end(self, used: Used) -> bytes:
        if not self._with_usage:
            return DONE
        envelope = self._envelope(self.format.chunk_object)
        return event({**envelope, "choices": [], "usage": self._usage(used)}) + DONE

    def fail(self, error: ApiError) -> bytes:
        return event(error.body()) + DONE

    @property
    def _with_usage(self) -> bool:
        return self.body.stream_options is not None and bool(self.body.stream_options.include_usage)

    def _usage(self, used: Used) -> dict[str, Any]:
        return write_usage(used, self.format.reasoning_tokens)

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.format.id, "object": kind, "created": self._created, "model": self.model}
