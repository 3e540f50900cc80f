"""The server process: bind, load, warm up, print an example call, serve, drain on SIGTERM, return the exit code."""

from __future__ import annotations

import asyncio
import faulthandler
import json
import logging
import os
import shlex
import signal
import socket
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from ..dynamic.contract.catalog import CertificateSource
from ..dynamic.convert.load_model import load_model
from ..dynamic.engine.chunk_limit import for_streams
from ..dynamic.engine.config import EngineConfig
from ..dynamic.engine.engine import Engine
from ..version import __version__
from .app import create_app, make_context
from .connections import SEND_BUFFER, Config, ConnectionTable, connection_limit
from .context import ServerContext
from .contracts import ContractManager, MonitorSettings, default_monitor_file
from .logs import configure_logging
from .settings import ServerSettings

logger = logging.getLogger("dynamoe.server")

QUESTION = "What is the capital of France?"
FLUSH_SECONDS = 5.0  # for answers to reach their clients after the engine has stopped
END_SECONDS = 20.0  # for everything after draining; then the process ends whatever it does
LISTEN_BACKLOG = 2048


def run(
    model: str,
    *,
    settings: ServerSettings | None = None,
    engine_config: EngineConfig | None = None,
    load_arguments: Mapping[str, Any] | None = None,
    certificates: str | None = None,
    monitor: MonitorSettings | None = None,
) -> int:
    """Serve a model until SIGTERM or SIGINT.

    Arguments:
        model: what :func:`load_model` takes.
        settings, engine_config: of the server and the engine.
        load_arguments: further arguments of :func:`load_model`.
        certificates: directory of the certificates; None takes those beside the model.
        monitor: of these contracts.

    Returns:
        The exit code: 0 after an orderly end, 1 when the engine had died or hung, or the server could not start.

    Raises:
        ValueError: the address or the monitor's file is in use, or the model cannot be served.
    """

    def make_engine() -> Engine:
        loaded = load_model(model, **(load_arguments or {}))
        return Engine(loaded, for_streams(engine_config or EngineConfig(), alone=loaded.decoder.processes is None))

    return serve_engine(make_engine, settings, certificates=certificates, monitor=monitor)


def serve_engine(
    make_engine: Callable[[], Engine],
    settings: ServerSettings | None = None,
    *,
    certificates: str | None = None,
    monitor: MonitorSettings | None = None,
) -> int:
    """Serve the engine that ``make_engine`` builds; see :func:`run`.

    Binds first, so that a busy port fails before loading.
    """
    settings = settings or ServerSettings()
    settings.all_api_keys()  # an invalid file of keys fails before loading, too
    configure_logging(settings.log_format)
    listener = bind(settings)
    try:
        engine = make_engine()
        contracts = ContractManager(
            source=CertificateSource(engine, None if certificates is None else Path(certificates).expanduser()),
            settings=monitor or MonitorSettings(),
            default_file=default_monitor_file(engine.model.path),
        )
        contracts.open()
        context = make_context(engine, settings, contracts)
        server = _Server(context, listener)
        try:
            server.run(sockets=[listener])
        except SystemExit:
            logger.error("the server could not start")  # uvicorn has logged why
            return 1
        return 0 if context.bridge.ended_well else 1
    finally:
        faulthandler.cancel_dump_traceback_later()
        listener.close()
        if settings.uds is not None and os.path.exists(settings.uds):
            os.unlink(settings.uds)


def bind(settings: ServerSettings) -> socket.socket:
    """Bind the address to listen on; connections are refused until the server is ready.

    Raises:
        ValueError: it is in use, or not permitted.
    """
    try:
        return _bind_unix(settings.uds) if settings.uds is not None else _bind_tcp(settings.host, settings.port)
    except OSError as error:
        where = settings.uds or f"{settings.host}:{settings.port}"
        raise ValueError(f"cannot listen on {where}: {error.strerror or error}") from error


def _bind_tcp(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _bind_unix(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode) and not _answers(path):
            os.unlink(path)  # left by a server that was killed
        listener.bind(path)
        os.chmod(path, 0o600)
    except OSError:
        listener.close()
        raise
    return listener


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) == 0


class _Server(uvicorn.Server):
    """uvicorn, draining on signals instead of its own handling."""

    def __init__(self, context: ServerContext, listener: socket.socket) -> None:
        limits = context.settings.limits
        self._table = ConnectionTable(connection_limit(limits.max_connections), limits)
        super().__init__(
            Config(
                create_app(context),
                table=self._table,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=int(FLUSH_SECONDS),
            )
        )
        self._context = context
        self._listener = listener
        self._loop: asyncio.AbstractEventLoop | None = None
        self._hurry = asyncio.Event()
        self._drain_task: asyncio.Task[None] | None = None
        self._watch_task: asyncio.Task[None] | None = None
        self._signalled = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(_log_loop_error)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        await super().startup(sockets)
        # uvicorn's number also says how many connections are accepted before any is counted: the queue may be longer.
        self._listener.listen(LISTEN_BACKLOG)
        self._watch_task = asyncio.create_task(self._table.watch())
        print(greeting(self._context, self._listener), flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._watch_task is not None:
            self._watch_task.cancel()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal starts draining, the second one ends it. Each also sets a time after which the process
        ends whatever its threads do, once it has written to the log where they are."""
        patience = END_SECONDS / 2 if self._signalled else self._context.settings.drain_timeout + END_SECONDS
        self._signalled = True
        faulthandler.dump_traceback_later(patience, exit=True)
        if self._loop is None:
            self.should_exit = True  # not started yet: there is nothing to drain
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._on_signal, sig)

    def _on_signal(self, sig: int) -> None:
        if self._drain_task is None:
            logger.info("%s: draining", signal.Signals(sig).name)
            self._context.gate.draining = True
            self._context.bodies.end_arriving()
            self._drain_task = asyncio.create_task(self._drain())
        else:
            self._hurry.set()

    async def _drain(self) -> None:
        context = self._context
        empty = asyncio.create_task(context.gate.wait_empty(context.settings.drain_timeout))
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait((empty, hurry), return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        empty.cancel()
        if context.gate.num_open:
            logger.warning("ending %d requests that have not finished", context.gate.num_open)
            context.bridge.close()
            if not await context.gate.wait_empty(FLUSH_SECONDS):
                self._table.end_all()  # of clients that do not read
        self.should_exit = True


def _log_loop_error(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what went wrong outside of any request, such as a connection that could not be accepted."""
    error = context.get("exception")
    kind = f"{context.get('message')} ({type(error).__name__})"
    expected = error is None or isinstance(error, OSError)
    logger.error("%s: %s", kind, error, exc_info=None if expected else error, extra={"kind": kind})


def greeting(context: ServerContext, listener: socket.socket) -> str:
    """The text printed when the server is ready: its address and an example request."""
    settings = context.settings
    if settings.uds is not None:
        where, base, options = f"the UNIX socket {settings.uds}", "http://localhost", f"--unix-socket {settings.uds} "
    else:
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        where = base = f"http://{host}:{port}"
        options = ""
    body: dict[str, Any] = {"temperature": 0, "max_tokens": 64}
    if context.model.tokenizer.has_chat_template:
        path, body = "/v1/chat/completions", {"messages": [{"role": "user", "content": QUESTION}], **body}
    else:
        path, body = "/v1/completions", {"prompt": "The capital of France is", **body}
    lines = [f"curl {options}{base}{path} -H 'Content-Type: application/json'"]
    if settings.all_api_keys():
        lines.append('-H "Authorization: Bearer $DYNAMOE_API_KEY"')
    lines.append(f"-d {shlex.quote(json.dumps(body))}")
    command = " \\\n    ".join(lines)
    return f"\ndynamoe {__version__} serves {context.model_name} on {where}\n\n  {command}\n"
