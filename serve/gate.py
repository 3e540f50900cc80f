"""Admission control: counts requests in flight, refuses new ones when there are too many or the server is stopping."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError, overloaded, unavailable


class Gate:
    """Counts the requests in flight. Not thread-safe: for the event loop's thread only.

    Arguments:
        max_open: requests in flight beyond which new ones are refused.
    """

    def __init__(self, max_open: int) -> None:
        self.max_open = max_open
        self.num_open = 0
        self.draining = False
        self._empty = asyncio.Event()
        self._empty.set()

    def refusal(self) -> ApiError | None:
        """The error for a new request; None if it is admitted."""
        if self.draining:
            return unavailable("The server is shutting down.", "shutting_down")
        if self.num_open >= self.max_open:
            return overloaded(f"{self.num_open} requests are in flight already.", 1.0)
        return None

    def enter(self) -> None:
        """Count a request that begins."""
        self.num_open += 1
        self._empty.clear()

    def leave(self) -> None:
        """Count a request that has ended."""
        self.num_open -= 1
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


class Admission:
    """ASGI middleware that applies admission control to POST requests; others are cheap and always admitted."""

    def __init__(self, app: ASGIApp, *, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        refusal = self._gate.refusal()
        if refusal is not None:
            return await refusal.response()(scope, receive, send)
        self._gate.enter()
        try:
            await self._app(scope, receive, send)
        finally:
            self._gate.leave()
