"""Middleware around every request: its id, its log line, its metrics, limits on its header, the hosts it may name."""

from __future__ import annotations

import ipaddress
import logging
import re
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

logger = logging.getLogger("dynamoe.requests")
POLLED = frozenset({"/health", "/ping", "/load", "/metrics"})  # every few seconds
_SAFE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class RequestContext:
    """ASGI middleware that gives every request an id (the client's ``x-request-id`` if it has only safe characters),
    returns it as a header, logs one line when the request ends, and turns an unexpected exception into a 500. A
    connection is closed behind an answer that did not wait for the whole body, so that nobody sends the rest.

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
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        unread = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
        request_id = given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        fields: dict[str, Any] = {}
        state.update(request_id=request_id, log=fields)
        status = 0
        start = time.perf_counter()

        async def receive_noting() -> Message:
            nonlocal unread
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                unread = False
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer = MutableHeaders(scope=message)
                answer["x-request-id"] = request_id
                if unread:
                    answer["connection"] = "close"
            await send(message)

        try:
            await self._app(scope, receive_noting, send_with_id)
        except Exception as error:
            kind = f"{type(error).__name__} in {traceback.extract_tb(error.__traceback__)[-1]}"
            logger.exception("unexpected error in request %s", request_id, extra={"kind": kind})
            if status:
                raise  # the answer has begun: closing the connection is the only signal left
            fields["error"] = kind  # of whose traceback only one a minute is logged
            failure = ApiError(500, f"Internal error, logged by the server under {request_id}.")
            await failure.response()(scope, receive, send_with_id)
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
            route = state.get("path") or getattr(scope.get("route"), "path", "unmatched")
            self._on_done(line["method"], route, line["status"])
            routine = scope["path"] in POLLED and status == 200
            # Anybody can cause these; an answer with status 500 promises that its id is in the log.
            kind = f"{line['status']} {route}" if line["status"] >= 300 and line["status"] != 500 else None
            logger.log(logging.DEBUG if routine else logging.INFO, "request", extra={"fields": line, "kind": kind})


class HeaderLimit:
    """ASGI middleware that refuses large headers, of which the protocol's own bound sees only those that arrive in
    parts, and those that say in two ways where the body ends, of which a proxy in front may believe the other."""

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
            if {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
                message = "Content-Length and Transfer-Encoding exclude each other."
                error = ApiError(400, message, code="bad_http_request", headers={"Connection": "close"})
                return await error.response()(scope, receive, send)
        await self._app(scope, receive, send)


class SlashlessPath:
    """ASGI middleware that takes a path with slashes at its end for the one without, before anything looks at it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].endswith("/"):
            scope["path"] = scope["path"].rstrip("/") or "/"
        await self._app(scope, receive, send)


class HostCheck:
    """ASGI middleware that refuses requests for foreign hosts: a browser that was made to resolve somebody else's name
    to this server's address (DNS rebinding) sends that name.

    Arguments:
        allowed: host names in lower case; ``*.example.com`` stands for all below it, ``*`` for every one.
        loopback: names of the loopback interface are allowed as well.
    """

    def __init__(self, app: ASGIApp, *, allowed: Sequence[str], loopback: bool) -> None:
        self._app = app
        self._allowed = frozenset(name.lower() for name in allowed)
        self._loopback = loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = Headers(scope=scope).get("host")
            if given is not None and not self._allows(host_name(given)):
                message = f"The host {given[:100]!r} is not this server; server.allowed_hosts can name further ones."
                return await ApiError(403, message, code="host_not_allowed").response()(scope, receive, send)
        await self._app(scope, receive, send)

    def _allows(self, name: str) -> bool:
        parents = (f"*{name[dot:]}" for dot, letter in enumerate(name) if letter == ".")
        return (self._loopback and is_loopback(name)) or not self._allowed.isdisjoint((name, "*", *parents))


def host_name(host: str) -> str:
    """The name in a ``Host`` header: without its port, brackets and final dot, in lower case."""
    name = host.strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    return name.rstrip(".")


def is_loopback(name: str) -> bool:
    """Whether a host name means the loopback interface on every machine."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
