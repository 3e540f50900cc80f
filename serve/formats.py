"""Writes tokens, probabilities and usage into answers. Plain dicts, since this runs once per token and stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..dynamic.engine.outputs import CompletionDelta, CompletionOutput, Logprob, PositionLogprobs
from ..dynamic.text.detokenizer import TokenStarts
from ..dynamic.text.tokenizer import Tokenizer
from .answer_parts import AnswerParts, Output, Part

LOWEST_LOGPROB = -9999.0  # JSON has no infinity
PromptLogprobs = Sequence[PositionLogprobs | None]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a request."""

    token_ids: list[int]
    text: str = ""  # this and the next are filled in where the answer repeats it
    starts: Sequence[int] = ()  # per token: where it begins in the text


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, LOWEST_LOGPROB)


def token_label(token_id: int, text: str) -> str:
    """The token's text, or ``token_id:N`` for a token that is only a part of a character."""
    return f"token_id:{token_id}" if not text or "\ufffd" in text else text


@dataclass(frozen=True, slots=True)
class Used:
    """What an answer has cost so far."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    compute: dict[str, Any] | None = None


def write_usage(used: Used, reasoning_tokens: int | None) -> dict[str, Any]:
    """The ``usage`` object of completions and chats; None: there is no telling reasoning from the rest."""
    details = {} if reasoning_tokens is None else {"completion_tokens_details": {"reasoning_tokens": reasoning_tokens}}
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.prompt_tokens + used.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": used.cached_tokens},
        **details,
        "compute": used.compute,
    }


def write_prompt_logprobs(positions: PromptLogprobs | None) -> list[dict[str, Any] | None] | None:
    """The ``prompt_logprobs`` field."""
    if positions is None:
        return None
    return [
        None
        if position is None
        else {
            str(token): {"logprob": finite(p.logprob), "rank": p.rank, "decoded_token": p.decoded_token}
            for token, p in position.items()
        }
        for position in positions
    ]


def write_compute(delta: CompletionDelta) -> dict[str, Any]:
    """The ``compute`` field of a choice in a stream: the layers and experts that ran for each of its tokens."""
    return {"layers": delta.layers, "experts": delta.experts}


@dataclass(slots=True)
class _Written:
    """What a choice holds so far."""

    starts: TokenStarts | None  # None where no log-probabilities are written
    characters: int = 0


class AnswerFormat(Protocol):
    """How one of OpenAI's older endpoints writes its choices."""

    id: str
    whole_object: str
    chunk_object: str

    @property
    def reasoning_tokens(self) -> int | None:
        """Of all that was written; None where nobody counts them."""
        ...

    def whole(self, prompt_number: int, output: CompletionOutput, prompt_logprobs: PromptLogprobs | None) -> Any:
        """A finished choice."""
        ...

    def chunk(self, prompt_number: int, delta: CompletionDelta, prompt_logprobs: PromptLogprobs | None) -> Any:
        """What a step added to a choice; None if the client would see no change."""
        ...


@dataclass(kw_only=True)
class CompletionFormat:
    """Choices of ``/v1/completions``.

    Arguments:
        id: of the answer.
        tokenizer: names the prompt's tokens.
        prompts: of the request, with their texts if ``echo``.
        n: completions per prompt.
        echo: begin every choice with its prompt.
        drop_output: the client asked for no tokens; the one that was generated is left out.
        logprobs: whether to write log-probabilities.
        prompt_logprobs: whether the ``prompt_logprobs`` field was asked for.
        compute: write what each token of a stream cost.
        skip_special_tokens: whether special tokens are left out of the text.
    """

    id: str
    tokenizer: Tokenizer
    prompts: Sequence[Prompt]
    n: int
    echo: bool
    drop_output: bool
    logprobs: bool
    prompt_logprobs: bool
    compute: bool = False
    whole_object: str = field(default="text_completion", init=False)
    chunk_object: str = field(default="text_completion", init=False)
    skip_special_tokens: bool = True
    reasoning_tokens: int | None = field(default=None, init=False)
    _begun: dict[int, _Written] = field(default_factory=dict, init=False)  # by choice

    def whole(
        self, prompt_number: int, output: CompletionOutput, prompt_logprobs: PromptLogprobs | None
    ) -> dict[str, Any]:
        choice = self._write(prompt_number, output, prompt_logprobs)
        if self.prompt_logprobs:
            choice["prompt_logprobs"] = write_prompt_logprobs(prompt_logprobs)
        return choice

    def chunk(
        self, prompt_number: int, delta: CompletionDelta, prompt_logprobs: PromptLogprobs | None
    ) -> dict[str, Any] | None:
        first = prompt_number * self.n + delta.index not in self._begun
        per_token = self.logprobs or self.compute
        if not (delta.text or delta.finish_reason or (per_token and delta.token_ids) or (first and self.echo)):
            return None
        choice = self._write(prompt_number, delta, prompt_logprobs)
        return {**choice, "compute": write_compute(delta)} if self.compute else choice

    def _write(self, prompt_number: int, output: Output, prompt_logprobs: PromptLogprobs | None) -> dict[str, Any]:
        index = prompt_number * self.n + output.index
        prompt = self.prompts[prompt_number]
        echo = self.echo and index not in self._begun
        if index not in self._begun:
            self._begun[index] = _Written(
                TokenStarts(self.tokenizer, self.skip_special_tokens) if self.logprobs else None
            )
        written = self._begun[index]
        text = "" if self.drop_output else output.text
        whole_text = prompt.text + text if echo else text
        written.characters += len(whole_text)
        logprobs = None
        if written.starts is not None:
            logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
            if echo:
                positions = prompt_logprobs or [None] * len(prompt.token_ids)
                self._add(logprobs, prompt.token_ids, positions, prompt.starts)
            if not self.drop_output:
                first = len(prompt.text) if self.echo else 0
                starts = [first + written.starts.add(token) for token in output.token_ids]
                if output.finish_reason is not None:  # a stop string may have cut the text
                    starts = [min(start, written.characters) for start in starts]
                self._add(logprobs, output.token_ids, output.logprobs or [], starts)
        choice: dict[str, Any] = {
            "index": index,
            "text": whole_text,
            "logprobs": logprobs,
            "finish_reason": "length" if self.drop_output and output.finish_reason else output.finish_reason,
        }
        if output.stop_reason is not None and not self.drop_output:
            choice["stop_reason"] = output.stop_reason
        return choice

    def _add(
        self, out: dict[str, list[Any]], ids: Sequence[int], positions: PromptLogprobs, starts: Sequence[int]
    ) -> None:
        for token, position, start in zip(ids, positions, starts, strict=True):
            out["tokens"].append(token_label(token, self.tokenizer.token_text(token)))
            out["text_offset"].append(start)
            if position is None:
                out["token_logprobs"].append(None)
                out["top_logprobs"].append(None)
                continue
            out["token_logprobs"].append(finite(position[token].logprob))
            top: dict[str, float] = {}
            for other, p in sorted(position.items(), key=lambda item: item[1].rank):
                top.setdefault(token_label(other, p.decoded_token), finite(p.logprob))
            out["top_logprobs"].append(top)


@dataclass(kw_only=True)
class ChatFormat:
    """Choices of ``/v1/chat/completions``.

    Arguments:
        id: of the answer.
        parts: reads the texts.
        top_logprobs: alternatives per token; None writes no log-probabilities.
        echo: text in front of every choice.
        compute: write what each token of a stream cost.
    """

    id: str
    parts: AnswerParts
    top_logprobs: int | None
    echo: str = ""
    compute: bool = False
    whole_object: str = field(default="chat.completion", init=False)
    chunk_object: str = field(default="chat.completion.chunk", init=False)
    _begun: set[int] = field(default_factory=set, init=False)

    @property
    def reasoning_tokens(self) -> int | None:
        return self.parts.reasoning_tokens

    def whole(
        self, prompt_number: int, output: CompletionOutput, prompt_logprobs: PromptLogprobs | None
    ) -> dict[str, Any]:
        said = self._written(self.parts.read(output))
        content, calls = self.echo + said.pop("content", ""), said.pop("tool_calls", [])
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None, **said}
        if calls:
            merged: list[dict[str, Any]] = []
            for call in calls:
                if "id" in call:
                    merged.append({name: call[name] for name in ("id", "type", "function")})
                else:
                    merged[-1]["function"]["arguments"] += call["function"]["arguments"]
            message |= {"content": content or None, "tool_calls": merged}
        return self._choice(output, "message", message)

    def chunk(
        self, prompt_number: int, delta: CompletionDelta, prompt_logprobs: PromptLogprobs | None
    ) -> dict[str, Any] | None:
        message: dict[str, Any] = {}
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            message = {"role": "assistant", "content": self.echo}
        said = self._written(self.parts.read(delta))
        if "content" in said:
            said["content"] = message.get("content", "") + said["content"]
        message |= said
        per_token = self.top_logprobs is not None or self.compute
        if not (message or delta.finish_reason or (per_token and delta.token_ids)):
            return None
        choice = self._choice(delta, "delta", message)
        return {**choice, "compute": write_compute(delta)} if self.compute else choice

    @staticmethod
    def _written(parts: Sequence[Part]) -> dict[str, Any]:
        """What parts add to a message."""
        said: dict[str, Any] = {}
        for part in parts:
            if part.kind == "content":
                said["content"] = said.get("content", "") + part.text
            elif part.kind == "reasoning":
                said["reasoning"] = said["reasoning_content"] = said.get("reasoning", "") + part.text
            elif part.call is not None:
                function = {"name": part.call.name, "arguments": ""}
                call = {"index": part.number, "id": part.call.id, "type": "function", "function": function}
                said.setdefault("tool_calls", []).append(call)
            else:
                call = {"index": part.number, "function": {"arguments": part.text}}
                said.setdefault("tool_calls", []).append(call)
        return said

    def _choice(self, output: Output, name: str, message: dict[str, Any]) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": output.index,
            name: message,
            "logprobs": self._logprobs(output),
            "finish_reason": self.parts.finish_reason(output),
        }
        if output.stop_reason is not None:
            choice["stop_reason"] = output.stop_reason
        return choice

    def _logprobs(self, output: Output) -> dict[str, Any] | None:
        if self.top_logprobs is None:
            return None
        content = write_chat_logprobs(output, self.top_logprobs, self.parts.tokenizer)
        return {"content": content, "refusal": None}


def write_chat_logprobs(output: Output, top: int, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The log-probabilities of tokens and of the ``top`` best at each place, as chats write them."""

    def alternative(token: int, p: Logprob) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {
            "token": token_label(token, p.decoded_token),
            "logprob": finite(p.logprob),
            "bytes": None if data is None else list(data),
        }

    content = []
    for token, position in zip(output.token_ids, output.logprobs or [], strict=True):
        best = sorted(position.items(), key=lambda item: item[1].rank)
        found = [alternative(other, p) for other, p in best if p.rank <= top]
        content.append({**alternative(token, position[token]), "top_logprobs": found})
    return content
