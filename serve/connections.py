"""HTTP connections: errors in OpenAI's format, deadlines for what clients send and read, a bound on their number."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import error_body
from .settings import Limits

logger = logging.getLogger("dynamoe.connections")

ACCEPTED_AT_ONCE = 128  # connections, before any of them is counted
WANTED_FILES = 8192  # open files that the process asks for
SEND_BUFFER = 256 * 1024  # bytes per connection that the kernel keeps for a client that does not read
CHECK_SECONDS = 0.5
PARSED_AT_ONCE = 16 * 1024  # bytes that one connection may parse before others have their turn


def connection_limit(wanted: int) -> int:
    """How many connections may be open: ``wanted``, or as many as the limit on open files leaves room for.

    Raises that limit first, as far as a process may.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
        soft = target
    if soft == resource.RLIM_INFINITY:
        return wanted
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:
        used = 64
    reserve = min(3 * ACCEPTED_AT_ONCE, soft // 4)
    return max(1, min(wanted, soft - used - reserve))


class ConnectionTable:
    """The open connections of a server. Not thread-safe: for the event loop's thread only.

    Arguments:
        max_open: beyond it those are closed that have kept the server waiting longest.
        limits: the deadlines.
    """

    def __init__(self, max_open: int, limits: Limits) -> None:
        self.max_open = max_open
        self.limits = limits
        self.open: set[Connection] = set()

    def add(self, connection: Connection) -> None:
        """A connection was opened, which may cost others theirs."""
        self.open.add(connection)
        if len(self.open) <= self.max_open:
            return
        others = (other for other in self.open if other is not connection and other.waits_since is not None)
        # Several at once, so that a flood is not answered with a search for each of its connections.
        for other in sorted(others, key=_waits_since)[: max(1, self.max_open // 16)] or [connection]:
            other.end("too many connections are open; those that wait for their clients are closed")

    async def watch(self) -> None:
        """Close connections whose deadlines have passed, until cancelled."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            now = asyncio.get_running_loop().time()
            for connection in list(self.open):
                try:
                    connection.check(now)
                except Exception as error:  # whatever it raises: others have deadlines too
                    kind = f"a connection's deadlines cannot be checked ({type(error).__name__})"
                    logger.exception("%s", kind, extra={"kind": kind})
                    self.open.discard(connection)
                    connection.transport.abort()

    def end_all(self) -> None:
        """Close every connection at once, whatever is still to be sent."""
        for connection in self.open:
            connection.transport.abort()


def _waits_since(connection: Connection) -> float:
    assert connection.waits_since is not None
    return connection.waits_since


class Config(uvicorn.Config):
    """uvicorn's configuration with what :class:`Connection` needs."""

    def __init__(self, app: Any, *, table: ConnectionTable, **settings: Any) -> None:
        super().__init__(
            app,
            http=Connection,
            h11_max_incomplete_event_size=table.limits.max_header_bytes,
            backlog=ACCEPTED_AT_ONCE,
            **settings,
        )
        self.table = table


class _Flow(FlowControl):
    """uvicorn's flow control, which reads nothing while earlier bytes wait to be parsed."""

    _holding = False

    def hold(self) -> None:
        self._holding = True
        self._transport.pause_reading()

    def release(self) -> None:
        self._holding = False
        if not self.read_paused:
            self._transport.resume_reading()

    def resume_reading(self) -> None:
        if self._holding:
            self.read_paused = False
        else:
            super().resume_reading()


class Connection(H11Protocol):
    """HTTP/1.1 with deadlines, errors in OpenAI's format and a bounded header, which httptools would not have."""

    config: Config
    _phase: object = None  # of what the client sends: h11's state of it, as far as the server waits for it
    _phase_since = 0.0
    _paused_since: float | None = None  # from when on the client has not read what the connection holds
    _closing_since: float | None = None

    @property
    def waits_since(self) -> float | None:
        """Since when the server has waited for the client; None if it does not."""
        since = [self._phase_since] if self._phase is not None else []
        return min(since + ([self._paused_since] if self._paused_since is not None else []), default=None)

    def check(self, now: float) -> None:
        """Close the connection if a deadline has passed."""
        limits = self.config.table.limits
        if self.transport.is_closing():
            self._closing_since = self._closing_since or now
        unread_since = [since for since in (self._paused_since, self._closing_since) if since is not None]
        if unread_since and now - min(unread_since) > limits.write_timeout:
            self.end(f"a client did not read its answer for {limits.write_timeout:g} s")
        elif self._phase is h11.IDLE and now - self._phase_since > limits.header_timeout:
            _report(f"a client did not send a header within {limits.header_timeout:g} s")
            if self.conn.trailing_data[0]:
                self.send_error(408, "The header did not arrive in time.", "header_timeout")
            else:
                self.transport.close()

    def end(self, reason: str) -> None:
        """Close the connection at once; its request ends as if the client had closed it."""
        _report(reason)
        self.config.table.open.discard(self)
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._flow = self.flow = _Flow(transport)
        self._follow()
        self.config.table.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.config.table.open.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived, in parts: 256 KiB of tiny chunks would take 300 ms."""
        super().data_received(data[:PARSED_AT_ONCE])
        self._follow()
        if len(data) > PARSED_AT_ONCE and not self.transport.is_closing():
            self._flow.hold()
            self.loop.call_soon(self._parse_rest, data[PARSED_AT_ONCE:])

    def _parse_rest(self, data: bytes) -> None:
        self._flow.release()
        if not self.transport.is_closing():
            self.data_received(data)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._follow()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._paused_since = self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._paused_since = None

    def send_400_response(self, msg: str) -> None:
        limit = self.config.table.limits.max_header_bytes
        if self.conn.their_state is h11.ERROR and len(self.conn.trailing_data[0]) > limit:
            self.send_error(431, f"The header is larger than {limit} bytes.", "header_too_large")
        else:
            self.send_error(400, msg, "bad_http_request")

    def send_error(self, status: int, message: str, code: str) -> None:
        """Answer with an error that no application sees, and close the connection."""
        body = json.dumps(error_body(status, message, code=code)).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _follow(self) -> None:
        """Note what the client is to send: a header (h11's state is IDLE) or a body."""
        state = self.conn.their_state
        phase = state if state in (h11.IDLE, h11.SEND_BODY) and not self.transport.is_closing() else None
        if phase is not self._phase:
            self._phase, self._phase_since = phase, self.loop.time()


def _report(what: str) -> None:
    logger.warning(what, extra={"kind": what})
