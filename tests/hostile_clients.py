"""Hostile clients beside honest ones, against one server: for the soak test and ``benchmarks/hostile_load.py``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
from hostile_bodies import HostileBody, hostile_bodies

JSON = "Content-Type: application/json"
HONEST_CLIENTS = 4


def request(path: str, body: bytes | None = None, *lines: str, method: str = "POST") -> bytes:
    """A raw HTTP request; without a body, its header only."""
    length = [] if body is None else [JSON, f"Content-Length: {len(body)}"]
    head = "\r\n".join((f"{method} {path} HTTP/1.1", "Host: localhost", *lines, *length, "", ""))
    return head.encode() + (body or b"")


@dataclass
class Observed:
    """What happened during a run."""

    seconds: list[float] = field(default_factory=list)  # of each honest request
    failures: Counter[str] = field(default_factory=Counter)  # of honest requests
    hostile: Counter[str] = field(default_factory=Counter)  # what the hostile clients did
    memory: list[tuple[float, int]] = field(default_factory=list)  # (seconds since the start, resident bytes)

    def quantile(self, share: float) -> float:
        """Of the honest requests' seconds."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Clients:
    """Both kinds of clients of one server.

    Arguments:
        url: of the server.
        pid: of its process.
        max_tokens: of an honest request.
        seed: of everything random.
    """

    def __init__(self, url: str, pid: int, max_tokens: int = 8, seed: int = 0) -> None:
        self.url = httpx.URL(url)
        self.process = psutil.Process(pid)
        self.max_tokens = max_tokens
        self.bodies: list[HostileBody] = list(hostile_bodies(seed, 100))
        self.rng = random.Random(seed)

    def run(self, seconds: float, hostile: bool) -> Observed:
        """Let the honest clients work, beside the hostile ones or alone."""
        return asyncio.run(self._run(seconds, hostile))

    async def _run(self, seconds: float, hostile: bool) -> Observed:
        observed = Observed()
        kinds: list[Callable[[Observed], Awaitable[None]]] = [self._sample]
        kinds += [self._honest] * HONEST_CLIENTS
        if hostile:
            kinds += [self._bodies] * 2 + [self._unread] * 2
            kinds += [self._half_headers, self._unfinished_bodies, self._raised, self._disconnecting]
        tasks = [asyncio.create_task(self._again(kind, observed)) for kind in kinds]
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        return observed

    async def _again(self, kind: Callable[[Observed], Awaitable[None]], observed: Observed) -> None:
        while True:
            await kind(observed)

    async def _sample(self, observed: Observed) -> None:
        began = time.monotonic()
        while True:
            observed.memory.append((time.monotonic() - began, self.process.memory_info().rss))
            await asyncio.sleep(1)

    async def _honest(self, observed: Observed) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as client:
            while True:
                body = {"prompt": "The capital of France is", "max_tokens": self.max_tokens, "ignore_eos": True}
                began = time.perf_counter()
                try:
                    answer = await client.post("/v1/completions", json=body)
                except (
                    httpx.RemoteProtocolError
                ):  # an idle connection gave way: every client sends such a request again
                    observed.failures["connection"] += 1
                    continue
                if answer.status_code == 200:
                    observed.seconds.append(time.perf_counter() - began)
                else:
                    observed.failures[str(answer.status_code)] += 1
                await asyncio.sleep(0.05)

    async def _send(self, data: bytes, reads: int = 0) -> bytes:
        """Open a connection, send, and read up to ``reads`` bytes; 0 reads nothing until the task is cancelled."""
        connection = socket.socket()
        connection.setblocking(False)
        if not reads:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # so that the server notices soon
        await asyncio.get_running_loop().sock_connect(connection, (self.url.host, self.url.port))
        reader, writer = await asyncio.open_connection(sock=connection, limit=1 << 12)
        try:
            with contextlib.suppress(ConnectionError):
                writer.write(data)
                await writer.drain()
                return await reader.read(reads) if reads else await asyncio.sleep(3600, b"")
            return b""
        finally:
            writer.transport.abort()

    async def _bodies(self, observed: Observed) -> None:
        body = self.rng.choice(self.bodies)
        answer = await self._send(request(body.path, body.data), 4096)
        observed.hostile[f"body {answer[9:12].decode()}"] += 1
        await asyncio.sleep(0.1)

    async def _half_headers(self, observed: Observed) -> None:
        held = [asyncio.create_task(self._send(b"GET /health HTTP/1.1\r\nHost: loc", 100)) for _ in range(20)]
        observed.hostile["half header"] += len(held)
        await asyncio.sleep(0.5)
        for task in held[10:]:
            task.cancel()
        await asyncio.wait(held, timeout=5)
        for task in held:
            task.cancel()

    async def _unfinished_bodies(self, observed: Observed) -> None:
        data = request("/v1/completions", b"x" * 2_000_000)[:1_000_000]
        held = [asyncio.create_task(self._send(data, 100)) for _ in range(4)]
        observed.hostile["unfinished body"] += len(held)
        await asyncio.wait(held, timeout=3)
        for task in held:
            task.cancel()

    def _stream(self, **fields: Any) -> bytes:
        body = {"prompt": [5, 6, 7], "max_tokens": 64, "ignore_eos": True, "stream": True, **fields}
        return request("/v1/completions", json.dumps(body).encode())

    async def _unread(self, observed: Observed) -> None:
        observed.hostile["unread stream"] += 1
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(60):
                await self._send(self._stream(logprobs=20, max_tokens=480))

    async def _raised(self, observed: Observed) -> None:
        answer = await self._send(self._stream(priority=-1000, max_tokens=4), 4096)
        observed.hostile[f"raised priority {answer[9:12].decode()}"] += 1
        await asyncio.sleep(0.05)

    async def _disconnecting(self, observed: Observed) -> None:
        await self._send(self._stream(), 300)
        observed.hostile["disconnect"] += 1
        await asyncio.sleep(0.05)


def lines_per_kind(log: str) -> Counter[tuple[str, str]]:
    """How many lines a server wrote in its busiest minute, by kind: what warns, and requests that were refused.

    A minute is the clock's, so that two lines 60 s apart never fall into one.
    """
    found: Counter[tuple[str, str]] = Counter()
    for line in log.splitlines():
        if match := re.match(r"(\S+T\d+:\d+):\S+ (\w+) (\S+) (.*)", line):
            minute, level, name, message = match.groups()
            refused = re.search(r'path="([^"?]*)" status=([345]\d\d)', message)
            if refused:
                found[minute, f"{refused[2]} {refused[1]}"] += 1
            elif level != "INFO":
                found[minute, f"{name} {message.partition(' left_out')[0]}"] += 1
    return found
