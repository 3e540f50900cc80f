"""Writes large JSON answers without holding up the event loop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

SLICE = 256  # entries of a list that are written in one call
PIECE = 256 * 1024  # bytes that are handed to the connection at once

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class JsonAnswer(Response):
    """A JSON answer. Make it in a thread where it may be large.

    The encoder does not let other threads run before it is done, so the answer is written in many short calls. The
    client gets it in pieces, each of which waits until the connection has room.

    Arguments:
        content: dicts with string keys, lists and plain values.
    """

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return b"".join(part.encode() for part in json_parts(content))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send_pieces(send, bytes(self.body))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def send_pieces(send: Send, data: bytes) -> None:
    """Send a part of an answer; each piece waits until the connection has room."""
    for start in range(0, len(data), PIECE):
        await send({"type": "http.response.body", "body": data[start : start + PIECE], "more_body": True})


def json_parts(value: Any) -> Iterator[str]:
    """The JSON text of a value, in parts that are quick to write."""
    if isinstance(value, dict):
        opening = "{"
        for name, item in value.items():
            yield f"{opening}{_encode(name)}:"
            yield from json_parts(item)
            opening = ","
        yield "}" if value else "{}"
    elif isinstance(value, list) and len(value) > SLICE:
        for start in range(0, len(value), SLICE):
            yield ("," if start else "[") + _encode(value[start : start + SLICE])[1:-1]
        yield "]"
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for number, item in enumerate(value):
            yield "," if number else "["
            yield from json_parts(item)
        yield "]"
    else:
        yield _encode(value)
