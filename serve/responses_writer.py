"""Answers of ``/v1/responses``: items, and the events that build them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..dynamic.engine.outputs import RequestDelta, RequestOutput
from .answer_parts import AnswerParts, Output, Part
from .errors import ApiError
from .formats import Used, write_chat_logprobs
from .streaming import named_event

_TEXTS = {"content": ("message", "output_text"), "reasoning": ("reasoning", "reasoning_text")}


@dataclass(kw_only=True)
class ResponsesWriter:
    """Writes one answer.

    Arguments:
        described: what the answer says about its request, ``id`` included.
        parts: reads the text.
        top_logprobs: alternatives per token; None writes no log-probabilities.
        keep: called with the finished answer.
        large: what it says about its request is.
    """

    described: dict[str, Any]
    parts: AnswerParts
    top_logprobs: int | None
    keep: Callable[[dict[str, Any]], None]
    large: bool = False
    _created: int = field(default_factory=lambda: int(time.time()), init=False)
    _items: list[dict[str, Any]] = field(default_factory=list, init=False)
    _open: bool = field(default=False, init=False)  # the last item
    _logprobs: list[dict[str, Any]] = field(default_factory=list, init=False)  # of the text to come
    _events: list[bytes] = field(default_factory=list, init=False)
    _sequence: int = field(default=0, init=False)
    _reason: str | None = field(default=None, init=False)  # why the output has ended

    @property
    def id(self) -> str:
        return self.described["id"]

    def whole(self, results: Sequence[RequestOutput], used: Used) -> dict[str, Any]:
        self._read(results[0].outputs[0])
        return self._finished(used)

    def add(self, batch: Sequence[tuple[int, RequestDelta]], before: Used) -> bytes:
        self._begin()
        for _, delta in batch:
            for completion in delta.completions:
                self._read(completion)
        return self._take()

    def end(self, used: Used) -> bytes:
        answer = self._finished(used)
        self._event(f"response.{answer['status']}", response=answer)
        return self._take()

    def fail(self, error: ApiError) -> bytes:
        self._begin()
        code = "rate_limit_exceeded" if error.status_code == 429 else "server_error"
        failure = {"code": code, "message": error.detail}
        self._event("response.failed", response={**self._response("failed"), "error": failure})
        return self._take()

    def _begin(self) -> None:
        if not self._sequence:
            for kind in ("created", "in_progress"):
                self._event(f"response.{kind}", response=self._response("in_progress"))

    def _read(self, output: Output) -> None:
        parts = self.parts.read(output)
        if self.top_logprobs is not None:
            found = write_chat_logprobs(output, self.top_logprobs, self.parts.tokenizer)
            self._logprobs += [one for one, said in zip(found, self.parts.in_answer, strict=True) if said]
        for part in parts:
            if part.call is not None:
                self._close()
                call = {"call_id": part.call.id, "name": part.call.name, "arguments": ""}
                self._add("function_call", "fc", call)
            elif part.kind == "arguments":
                self._items[-1]["arguments"] += part.text
                self._event("response.function_call_arguments.delta", **self._place(), delta=part.text)
            else:
                self._text(part)
        self._reason = self.parts.finish_reason(output) or self._reason

    def _text(self, part: Part) -> None:
        kind, name = _TEXTS[part.kind]
        if not self._open or self._items[-1]["type"] != kind:
            self._close()
            if kind == "message":
                self._add(kind, "msg", {"role": "assistant", "content": []})
                content: dict[str, Any] = {"type": name, "text": "", "annotations": [], "logprobs": []}
            else:
                self._add(kind, "rs", {"summary": [], "content": []})
                content = {"type": name, "text": ""}
            self._event("response.content_part.added", **self._place(0), part=content)
            self._items[-1]["content"] = [dict(content)]
        content: dict[str, Any] = self._items[-1]["content"][0]
        content["text"] += part.text
        found: dict[str, Any] = {}
        if kind == "message":
            found["logprobs"], self._logprobs = self._logprobs, []
            content["logprobs"] = content["logprobs"] + found["logprobs"]
        self._event(f"response.{name}.delta", **self._place(0), delta=part.text, **found)

    def _add(self, kind: str, prefix: str, fields: dict[str, Any]) -> None:
        item = {"type": kind, "id": f"{prefix}_{uuid.uuid4().hex}", "status": "in_progress", **fields}
        self._items.append(item)
        self._open = True
        self._event("response.output_item.added", output_index=len(self._items) - 1, item=dict(item))

    def _close(self, status: str = "completed") -> None:
        """End the last item."""
        if not self._open:
            return
        item, self._open = self._items[-1], False
        item["status"] = status
        if item["type"] == "function_call":
            self._event("response.function_call_arguments.done", **self._place(), arguments=item["arguments"])
        else:
            (content,) = item["content"]
            found = {"logprobs": content["logprobs"]} if "logprobs" in content else {}
            self._event(f"response.{content['type']}.done", **self._place(0), text=content["text"], **found)
            self._event("response.content_part.done", **self._place(0), part=content)
        self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _place(self, content: int | None = None) -> dict[str, Any]:
        place: dict[str, Any] = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
        return place if content is None else {**place, "content_index": content}

    def _finished(self, used: Used) -> dict[str, Any]:
        status = "incomplete" if self._reason == "length" else "completed"
        self._close(status)
        answer = {**self._response(status), "usage": self._usage(used)}
        if status == "incomplete":
            answer["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            answer["completed_at"] = int(time.time())
        self.keep(answer)
        return answer

    def _response(self, status: str) -> dict[str, Any]:
        return {
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "output": [dict(item) for item in self._items],
            "usage": None,
            **self.described,
        }

    def _usage(self, used: Used) -> dict[str, Any]:
        return {
            "input_tokens": used.prompt_tokens,
            "input_tokens_details": {"cached_tokens": used.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": used.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self.parts.reasoning_tokens},
            "total_tokens": used.prompt_tokens + used.completion_tokens,
            "compute": used.compute,
        }

    def _event(self, kind: str, **fields: Any) -> None:
        self._events.append(named_event({"type": kind, "sequence_number": self._sequence, **fields}))
        self._sequence += 1

    def _take(self) -> bytes:
        events, self._events = b"".join(self._events), []
        return events
