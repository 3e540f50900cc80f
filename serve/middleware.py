"""Middleware around every request: its id, its log line, its metrics, limits on its size."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

logger = logging.getLogger("dynamoe.requests")
_SAFE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class RequestContext:
    """ASGI middleware that gives every request an id (the client's ``x-request-id`` if it has only safe characters),
    returns it as a header, logs one line when the request ends, and turns an unexpected exception into a 500.

    Routes add fields to the line through ``request.state.log``.

    Arguments:
        on_done: called with method, route and status of every finished request.
    """

    def __init__(self, app: ASGIApp, *, on_done: Callable[[str, str, int], None]) -> None:
        self._app = app
        self._on_done = on_done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        fields: dict[str, Any] = {}
        state.update(request_id=request_id, log=fields)
        status = 0
        start = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("unexpected error in request %s", request_id)
            if status:
                raise  # the answer has begun: closing the connection is the only signal left
            error = ApiError(500, f"Internal error, logged by the server under {request_id}.")
            await error.response()(scope, receive, send_with_id)
        finally:
            caller = state.get("caller")
            line = {
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"],
                "status": status or 499,  # 499: the client disconnected before the answer began
                "seconds": round(time.perf_counter() - start, 4),
                "key": getattr(caller, "key_id", None),
                **fields,
            }
            self._on_done(line["method"], getattr(scope.get("route"), "path", "unmatched"), line["status"])
            routine = scope["path"] in ("/health", "/metrics") and status == 200  # polled every few seconds
            logger.log(logging.DEBUG if routine else logging.INFO, "request", extra={"fields": line})


class HeaderLimit:
    """ASGI middleware that refuses large headers. The protocol's own bound sees only those that arrive in parts."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            size = len(scope.get("raw_path", b"")) + len(scope.get("query_string", b""))
            size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
            if size > self._max_bytes:
                message = f"The header is larger than {self._max_bytes} bytes."
                error = ApiError(431, message, code="header_too_large", headers={"Connection": "close"})
                return await error.response()(scope, receive, send)
        await self._app(scope, receive, send)


class BodyLimit:
    """ASGI middleware that reads the body within a size and a time limit before the application sees the request."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            async with asyncio.timeout(self._timeout):
                body = await self._read(scope, receive)
        except TimeoutError:
            message = f"The body did not arrive within {self._timeout:g} s."
            error = ApiError(408, message, headers={"Connection": "close"})
            return await error.response()(scope, receive, send)
        except ApiError as error:
            return await error.response()(scope, receive, send)
        if body is None:
            return None
        pending = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, or None when the client disconnected."""
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            raise self._too_large()
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> ApiError:
        message = f"The body is larger than {self._max_bytes} bytes."
        return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})
