"""Streamed answers (server-sent events), and aborting requests whose client has disconnected."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .json_answer import json_parts, send_pieces
from .submission import Submission

DONE = b"data: [DONE]\n\n"
# Legal inside JSON strings, but some clients treat them as line ends.
_LINE_ENDS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def event(data: dict[str, Any], large: bool = False) -> bytes:
    """One server-sent event; ``large`` if it may be megabytes, see :class:`JsonAnswer`."""
    text = "".join(json_parts(data)) if large else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    if not text.isascii():
        text = text.translate(_LINE_ENDS)
    return b"data: " + text.encode() + b"\n\n"


def named_event(data: dict[str, Any]) -> bytes:
    """A server-sent event whose name is its type."""
    return f"event: {data['type']}\n".encode() + event(data)


@contextlib.asynccontextmanager
async def aborted_on_disconnect(receive: Receive, submission: Submission) -> AsyncIterator[None]:
    """Abort the submission if the client disconnects meanwhile; close it in any case at the end."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        submission.client_left()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        submission.close()


class EventStream(Response):
    """A streamed answer.

    Arguments:
        events: encoded events, one or several per item.
        submission: source of the events; aborted when the client disconnects.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], submission: Submission) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._submission = submission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aborted_on_disconnect(receive, self._submission):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self._events:
                await send_pieces(send, chunk)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
