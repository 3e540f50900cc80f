"""Answers of ``/v1/messages``: blocks, and the events that build them; errors in Anthropic's format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..dynamic.engine.outputs import RequestDelta, RequestOutput
from .answer_parts import AnswerParts, Output, Part
from .errors import ApiError
from .formats import Used
from .streaming import named_event

PATH = "/v1/messages"
_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}
_KINDS = {
    "content": ("text", "text"),
    "reasoning": ("thinking", "thinking"),
    "arguments": ("input_json", "partial_json"),
}
_ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


@dataclass(kw_only=True)
class MessagesWriter:
    """Writes one answer.

    Arguments:
        id: of the answer.
        model: its name.
        parts: reads the text.
    """

    id: str
    model: str
    parts: AnswerParts
    large: bool = field(default=False, init=False)
    _blocks: list[dict[str, Any]] = field(default_factory=list, init=False)
    _arguments: str = field(default="", init=False)  # of the last block
    _open: bool = field(default=False, init=False)
    _begun: bool = field(default=False, init=False)
    _events: list[bytes] = field(default_factory=list, init=False)
    _stop: dict[str, Any] = field(default_factory=lambda: {"stop_reason": None, "stop_sequence": None}, init=False)

    def whole(self, results: Sequence[RequestOutput], used: Used) -> dict[str, Any]:
        self._read(results[0].outputs[0])
        self._close()
        return {**self._message(), "content": self._blocks, **self._stop, "usage": self._usage(used)}

    def add(self, batch: Sequence[tuple[int, RequestDelta]], before: Used) -> bytes:
        if not self._begun:
            self._begun = True
            usage = self._usage(before)
            del usage["compute"], usage["output_tokens_details"]  # not known yet
            self._event("message_start", message={**self._message(), "content": [], **self._stop, "usage": usage})
            self._event("ping")
        for _, delta in batch:
            for completion in delta.completions:
                self._read(completion)
        return self._take()

    def end(self, used: Used) -> bytes:
        self._close()
        self._event("message_delta", delta=self._stop, usage=self._usage(used))
        self._event("message_stop")
        return self._take()

    def fail(self, error: ApiError) -> bytes:
        return named_event(message_error(error.status_code, error.detail))

    def _read(self, output: Output) -> None:
        for part in self.parts.read(output):
            if part.call is not None:
                self._close()
                call = {"id": part.call.id.replace("call_", "toolu_", 1), "name": part.call.name, "input": {}}
                self._add({"type": "tool_use", **call})
            else:
                self._text(part)
        if (reason := self.parts.finish_reason(output)) is not None:
            stopped = reason == "stop" and isinstance(output.stop_reason, str)
            self._stop = {
                "stop_reason": "stop_sequence" if stopped else _REASONS[reason],
                "stop_sequence": output.stop_reason if stopped else None,
            }

    def _text(self, part: Part) -> None:
        kind, name = _KINDS[part.kind]
        if part.kind == "arguments":
            self._arguments += part.text
        elif not self._open or self._blocks[-1]["type"] != kind:
            self._close()
            self._add({"type": kind, name: "", **({"signature": ""} if kind == "thinking" else {})})
        if part.kind != "arguments":
            self._blocks[-1][name] += part.text
        delta = {"type": f"{kind}_delta", name: part.text}
        self._event("content_block_delta", index=len(self._blocks) - 1, delta=delta)

    def _add(self, block: dict[str, Any]) -> None:
        self._blocks.append(block)
        self._open, self._arguments = True, ""
        self._event("content_block_start", index=len(self._blocks) - 1, content_block=dict(block))

    def _close(self) -> None:
        """End the last block. A call that was cut off is a text in an answer that is not streamed."""
        if not self._open:
            return
        self._open, block = False, self._blocks[-1]
        if block["type"] == "tool_use":
            try:
                block["input"] = json.loads(self._arguments or "{}")
            except ValueError:
                self._blocks[-1] = {"type": "text", "text": f"{block['name']}{self._arguments}"}
        self._event("content_block_stop", index=len(self._blocks) - 1)

    def _message(self) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self.model}

    def _usage(self, used: Used) -> dict[str, Any]:
        return {
            "input_tokens": used.prompt_tokens - used.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": used.cached_tokens,
            "output_tokens": used.completion_tokens,
            "output_tokens_details": {"thinking_tokens": self.parts.reasoning_tokens},
            "compute": used.compute,
        }

    def _event(self, kind: str, **fields: Any) -> None:
        self._events.append(named_event({"type": kind, **fields}))

    def _take(self) -> bytes:
        events, self._events = b"".join(self._events), []
        return events


def message_error(status: int, message: str, request_id: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    kind = _ERRORS.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


class MessageErrors:
    """ASGI middleware that writes the errors of these paths, wherever they come from, in Anthropic's format."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].rstrip("/") if scope["type"] == "http" else ""
        if path != PATH and not path.startswith(f"{PATH}/"):
            return await self._app(scope, receive, send)
        started: Message | None = None
        body = b""

        async def convert(message: Message) -> None:
            nonlocal started, body
            if message["type"] == "http.response.start" and message["status"] >= 400:
                started = message
            elif started is None:
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    data = _converted(started, body)
                    MutableHeaders(scope=started)["content-length"] = str(len(data))
                    await send(started)
                    await send({"type": "http.response.body", "body": data})

        await self._app(scope, receive, convert)


def _converted(started: Message, body: bytes) -> bytes:
    try:
        detail = json.loads(body)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return body  # of HEAD
    request_id = Headers(scope=started).get("x-request-id")
    return json.dumps(message_error(started["status"], detail, request_id), ensure_ascii=False).encode()
