"""How tokens, probabilities and usage are written into answers. Plain dicts: this runs once per token and stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..dynamic.engine.outputs import CompletionDelta, CompletionOutput, Logprob, PositionLogprobs
from ..dynamic.text.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0  # JSON has no infinity
PromptLogprobs = Sequence[PositionLogprobs | None]
Piece = CompletionDelta | CompletionOutput


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a request."""

    token_ids: list[int]
    text: str = ""  # filled in where the answer repeats it


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, LOWEST_LOGPROB)


def token_label(token_id: int, text: str) -> str:
    """The token's text; for tokens that are no text by themselves (part of a character) an unambiguous name."""
    return f"token_id:{token_id}" if not text or "\ufffd" in text else text


def usage(
    prompts: Sequence[Prompt], completion_tokens: int, cached_tokens: int, compute: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The ``usage`` object."""
    prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "compute": compute,
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


def write_compute(piece: CompletionDelta) -> dict[str, Any]:
    """The ``compute`` field of a choice in a stream: what the row ran that chose each of its tokens."""
    return {"layers": piece.layers, "experts": piece.experts}


class AnswerFormat(Protocol):
    """How one endpoint writes its answers."""

    id: str
    whole_object: str
    chunk_object: str

    def whole(self, prompt_number: int, output: CompletionOutput, prompt_logprobs: PromptLogprobs | None) -> Any:
        """A finished choice."""
        ...

    def chunk(self, prompt_number: int, piece: CompletionDelta, prompt_logprobs: PromptLogprobs | None) -> Any:
        """What a step added to a choice; None if there is nothing to say."""
        ...


class CompletionFormat:
    """Choices of ``/v1/completions``.

    Arguments:
        tokenizer: names the prompt's tokens.
        prompts: of the request, with their texts if ``echo``.
        n: completions per prompt.
        echo: begin every choice with its prompt.
        drop_output: the client asked for no tokens; the one that was run is left out.
        logprobs: whether to write log-probabilities.
        prompt_logprobs: whether the ``prompt_logprobs`` field was asked for.
        compute: write what each token of a stream cost.
    """

    whole_object = chunk_object = "text_completion"

    def __init__(
        self,
        answer_id: str,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        *,
        n: int,
        echo: bool,
        drop_output: bool,
        logprobs: bool,
        prompt_logprobs: bool,
        compute: bool = False,
    ) -> None:
        self.id = answer_id
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._n = n
        self._echo = echo
        self._drop_output = drop_output
        self._logprobs = logprobs
        self._prompt_logprobs = prompt_logprobs
        self._compute = compute
        self._offsets: dict[int, int] = {}  # choice → characters written, for text_offset

    def whole(
        self, prompt_number: int, output: CompletionOutput, prompt_logprobs: PromptLogprobs | None
    ) -> dict[str, Any]:
        choice = self._write(prompt_number, output, prompt_logprobs)
        if self._prompt_logprobs:
            choice["prompt_logprobs"] = write_prompt_logprobs(prompt_logprobs)
        return choice

    def chunk(
        self, prompt_number: int, piece: CompletionDelta, prompt_logprobs: PromptLogprobs | None
    ) -> dict[str, Any] | None:
        first = prompt_number * self._n + piece.index not in self._offsets
        per_token = self._logprobs or self._compute
        if not (piece.text or piece.finish_reason or (per_token and piece.token_ids) or (first and self._echo)):
            return None
        choice = self._write(prompt_number, piece, prompt_logprobs)
        return {**choice, "compute": write_compute(piece)} if self._compute else choice

    def _write(self, prompt_number: int, piece: Piece, prompt_logprobs: PromptLogprobs | None) -> dict[str, Any]:
        index = prompt_number * self._n + piece.index
        prompt = self._prompts[prompt_number]
        echo = self._echo and index not in self._offsets
        offset = self._offsets.setdefault(index, 0)
        text = "" if self._drop_output else piece.text
        logprobs = None
        if self._logprobs:
            logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
            if echo:
                positions = prompt_logprobs or [None] * len(prompt.token_ids)
                offset = self._add(logprobs, prompt.token_ids, positions, offset)
            if not self._drop_output:
                offset = self._add(logprobs, piece.token_ids, piece.logprobs or [], offset)
            self._offsets[index] = offset
        choice: dict[str, Any] = {
            "index": index,
            "text": prompt.text + text if echo else text,
            "logprobs": logprobs,
            "finish_reason": "length" if self._drop_output and piece.finish_reason else piece.finish_reason,
        }
        if piece.stop_reason is not None and not self._drop_output:
            choice["stop_reason"] = piece.stop_reason
        return choice

    def _add(self, out: dict[str, list[Any]], ids: Sequence[int], positions: PromptLogprobs, offset: int) -> int:
        for token, position in zip(ids, positions, strict=True):
            text = self._tokenizer.token_text(token)
            out["tokens"].append(token_label(token, text))
            out["text_offset"].append(offset)
            offset += len(text)
            if position is None:
                out["token_logprobs"].append(None)
                out["top_logprobs"].append(None)
                continue
            out["token_logprobs"].append(finite(position[token].logprob))
            top: dict[str, float] = {}
            for other, p in sorted(position.items(), key=lambda item: item[1].rank):
                top.setdefault(token_label(other, p.decoded_token), finite(p.logprob))
            out["top_logprobs"].append(top)
        return offset


class ChatFormat:
    """Choices of ``/v1/chat/completions``.

    Arguments:
        top_logprobs: alternatives per token; None writes no log-probabilities.
        compute: write what each token of a stream cost.
    """

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, answer_id: str, *, top_logprobs: int | None, compute: bool = False) -> None:
        self.id = answer_id
        self._compute = compute
        self._top_logprobs = top_logprobs
        self._begun: set[int] = set()

    def whole(
        self, prompt_number: int, output: CompletionOutput, prompt_logprobs: PromptLogprobs | None
    ) -> dict[str, Any]:
        message = {"role": "assistant", "content": output.text, "refusal": None}
        return self._choice(output, "message", message)

    def chunk(
        self, prompt_number: int, piece: CompletionDelta, prompt_logprobs: PromptLogprobs | None
    ) -> dict[str, Any] | None:
        delta: dict[str, Any] = {}
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            delta = {"role": "assistant", "content": ""}
        if piece.text:
            delta["content"] = piece.text
        per_token = self._top_logprobs is not None or self._compute
        if not (delta or piece.finish_reason or (per_token and piece.token_ids)):
            return None
        choice = self._choice(piece, "delta", delta)
        return {**choice, "compute": write_compute(piece)} if self._compute else choice

    def _choice(self, piece: Piece, field: str, said: dict[str, Any]) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": piece.index,
            field: said,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }
        if piece.stop_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        return choice

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if self._top_logprobs is None:
            return None
        content = []
        for token, position in zip(piece.token_ids, piece.logprobs or [], strict=True):
            best = sorted(position.items(), key=lambda item: item[1].rank)
            top = [_alternative(other, p) for other, p in best if p.rank <= self._top_logprobs]
            content.append({**_alternative(token, position[token]), "top_logprobs": top})
        return {"content": content, "refusal": None}


def _alternative(token: int, p: Logprob) -> dict[str, Any]:
    label = token_label(token, p.decoded_token)
    # Part of a character has no UTF-8 form of its own.
    data = None if label is not p.decoded_token else list(label.encode())
    return {"token": label, "logprob": finite(p.logprob), "bytes": data}
