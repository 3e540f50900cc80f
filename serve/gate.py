"""Admission of requests and their bodies: how many requests are in flight, and how many bytes they may hold."""

from __future__ import annotations

import asyncio
from collections.abc import Set
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..dynamic.engine.stats import Pace
from .errors import ApiError, invalid, overloaded, unavailable
from .settings import Limits


class Gate:
    """Counts the requests in flight, from the moment when their bodies are here. Not thread-safe: for the event loop's
    thread only.

    Arguments:
        max_open: requests in flight beyond which new ones are refused.
    """

    def __init__(self, max_open: int) -> None:
        self.max_open = max_open
        self.num_open = 0
        self.draining = False
        self._pace = Pace()
        self._empty = asyncio.Event()
        self._empty.set()

    def refusal(self) -> ApiError | None:
        """The error for a new request; None if it is admitted."""
        if self.draining:
            return unavailable("The server is shutting down.", "shutting_down")
        if self.num_open >= self.max_open:
            return overloaded(f"{self.num_open} requests are in flight already.", self._pace.seconds_per_request)
        return None

    def enter(self) -> None:
        """Count a request that begins."""
        if self.num_open == 0:
            self._pace.resume()
        self.num_open += 1
        self._empty.clear()

    def leave(self, submitted: bool) -> None:
        """Count a request that has ended; ``submitted``: the engine had accepted it."""
        self.num_open -= 1
        if submitted:
            self._pace.finished()
        if self.num_open == 0:
            self._empty.set()

    async def wait_empty(self, timeout: float) -> bool:
        """Wait until no request is in flight; False after ``timeout`` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True


@dataclass(slots=True, eq=False)
class Arriving:
    """A body of which a part is here."""

    deadline: asyncio.Timeout | None = None
    size: int = 0


class BodyBudget:
    """The bytes of the bodies of all open requests. Where there are too many, unfinished ones end, the oldest first, so
    that clients who never finish cannot keep others out.

    Arguments:
        max_bytes: of all bodies together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used = 0
        self._arriving: dict[Arriving, None] = {}  # the oldest first

    def begin(self, body: Arriving, deadline: asyncio.Timeout) -> None:
        """A body begins to arrive; ``deadline`` ends its reader."""
        body.deadline = deadline
        self._arriving[body] = None

    def grow(self, body: Arriving, size: int) -> None:
        """Bytes have arrived.

        Raises:
            TimeoutError: this body is the one that has to end.
            ApiError: status 429 when finished bodies leave no room for this one, whoever else gives way.
        """
        body.size += size
        self.used += size
        if self.used > self.max_bytes:
            finished = self.used - sum(other.size for other in self._arriving)
            if body in self._arriving and finished + body.size > self.max_bytes:
                raise overloaded("The bodies of the requests in flight use all of their memory.", 1.0)
        while self.used > self.max_bytes and self._arriving:
            self._end(next(iter(self._arriving)))
        if body not in self._arriving:
            raise TimeoutError

    def finish(self, body: Arriving) -> None:
        """All of a body is here; it counts until :meth:`release`."""
        self._arriving.pop(body, None)  # a client that has left may have been ended first

    def release(self, body: Arriving) -> None:
        """A request has ended, admitted or not."""
        self._arriving.pop(body, None)
        self.used -= body.size
        body.size = 0

    def end_arriving(self) -> None:
        """End every unfinished body, as if its time were over."""
        for body in list(self._arriving):
            self._end(body)

    def _end(self, body: Arriving) -> None:
        assert body.deadline is not None
        body.deadline.reschedule(0.0)
        self.release(body)


class Admission:
    """ASGI middleware that admits POST requests: reads their JSON bodies within limits of size and time, then counts
    them as in flight. Other requests are cheap; nobody reads their bodies.

    Arguments:
        gate: counts the requests in flight.
        bodies: counts their bytes.
        limits: of one body.
        paths: that take POST requests; the application answers all others.
    """

    def __init__(self, app: ASGIApp, *, gate: Gate, bodies: BodyBudget, limits: Limits, paths: Set[str]) -> None:
        self._app = app
        self._gate = gate
        self._bodies = bodies
        self._limits = limits
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in self._paths:
            return await self._app(scope, receive, send)
        scope.setdefault("state", {})["path"] = scope["path"]  # of a route, also if the request never gets there
        arriving = Arriving()
        try:
            try:
                body = await self._admit(scope, receive, arriving)
            except ApiError as error:
                return await error.response()(scope, receive, send)
            if body is None:
                return None
            self._gate.enter()
            try:
                await self._app(scope, _replay(body, receive), send)
            finally:
                self._gate.leave(submitted=scope["state"].get("submitted", False))
        finally:
            self._bodies.release(arriving)

    async def _admit(self, scope: Scope, receive: Receive, arriving: Arriving) -> bytes | None:
        """The body of an admitted request, or None when the client disconnected."""
        self._check(scope)
        try:
            async with asyncio.timeout(self._limits.body_timeout) as deadline:
                self._bodies.begin(arriving, deadline)
                body = await self._read(arriving, receive)
        except TimeoutError:
            message = f"The body did not arrive in time: within {self._limits.body_timeout:g} s, or less under load."
            raise self._gate.refusal() or ApiError(408, message) from None
        self._bodies.finish(arriving)
        self._check(scope)
        return body

    def _check(self, scope: Scope) -> None:
        """Refuse what can be refused without the body.

        Browsers let any page post ``text/plain`` and forms to any server, but ask before they send JSON.
        """
        headers = Headers(scope=scope)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
            raise invalid("The body must be a JSON object, sent with the header 'Content-Type: application/json'.")
        if (coding := headers.get("content-encoding", "identity").strip().lower()) not in ("", "identity"):
            message = f"Bodies are read as they are, not with the Content-Encoding {coding[:50]!r}."
            raise ApiError(415, message, code="unsupported_encoding")
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared[:20]) > self._limits.max_body_bytes:
            raise self._too_large()
        refusal = self._gate.refusal()
        if refusal is not None:
            raise refusal

    async def _read(self, arriving: Arriving, receive: Receive) -> bytes | None:
        """The whole body, or None when the client disconnected."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            if len(body) + len(part) > self._limits.max_body_bytes:
                raise self._too_large()
            self._bodies.grow(arriving, len(part))
            body += part
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self._limits.max_body_bytes} bytes.", code="request_too_large")


def _replay(body: bytes, receive: Receive) -> Receive:
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
