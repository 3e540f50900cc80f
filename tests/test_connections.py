"""HTTP connections without an application: what is parsed at once, and how many may be open."""

from __future__ import annotations

import asyncio
import logging
import resource
from typing import Any

import pytest
from dynamoe.serve import connections
from dynamoe.serve.connections import PARSED_AT_ONCE, Config, Connection, ConnectionTable, connection_limit
from dynamoe.serve.settings import Limits
from uvicorn.server import ServerState


async def read_body(_scope: Any, receive: Any, send: Any) -> None:
    """Answers with the number of bytes in the body."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message["body"]), message["more_body"]
    body = str(size).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize("requests", [1, 2], ids=["one", "pipelined"])
@pytest.mark.parametrize("chunk", [1, 5000, 100_000])
def test_a_connection_parses_a_bounded_number_of_bytes_at_once(
    monkeypatch: pytest.MonkeyPatch, chunk: int, requests: int
) -> None:
    parsed: list[int] = []
    size = 200_000 if chunk > 1 else 20_000  # a chunk takes six bytes at least

    async def main() -> bytes:
        config = Config(read_body, table=ConnectionTable(10, Limits()), log_config=None, lifespan="off", ws="none")
        config.load()
        loop = asyncio.get_running_loop()

        def connect() -> Connection:
            connection = Connection(config, ServerState(), {}, loop)
            receive = connection.conn.receive_data
            monkeypatch.setattr(connection.conn, "receive_data", lambda data: (parsed.append(len(data)), receive(data)))
            return connection

        server = await loop.create_server(connect, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
        chunks = b"%x\r\n%s\r\n" % (chunk, b"x" * chunk) * (size // chunk) + b"0\r\n\r\n"
        writer.write((b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks) * requests)
        answer = b""
        while answer.count(b"%d" % size) < requests:
            answer += await reader.read(4096)
        writer.close()
        server.close()
        return answer

    assert asyncio.run(main()).count(b"HTTP/1.1 200") == requests
    assert sum(parsed) > size * requests
    assert max(parsed) <= PARSED_AT_ONCE


def test_a_deadline_that_cannot_be_checked_costs_no_other_its_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "CHECK_SECONDS", 0.01)

    async def main() -> list[bytes]:
        table = ConnectionTable(10, Limits(header_timeout=0.05))
        config = Config(read_body, table=table, log_config=None, lifespan="off", ws="none")
        config.load()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Connection(config, ServerState(), {}, loop), "127.0.0.1", 0)
        clients = [await asyncio.open_connection(*server.sockets[0].getsockname()[:2]) for _ in range(2)]
        while len(table.open) < 2:
            await asyncio.sleep(0.01)
        next(iter(table.open))._phase_since = None  # type: ignore[assignment]  # a mistake in one connection
        watch = asyncio.create_task(table.watch())
        async with asyncio.timeout(30):
            ends = await asyncio.gather(*(reader.read() for reader, _ in clients))
        assert not watch.done()
        assert not table.open
        watch.cancel()
        for _, writer in clients:
            writer.close()
            await writer.wait_closed()
        server.close()
        return ends

    assert asyncio.run(main()) == [b"", b""]
    assert [record.levelno for record in caplog.records if record.exc_info] == [logging.ERROR]


@pytest.mark.parametrize(("soft", "most"), [(200, 150), (1024, 768)])
def test_connections_leave_room_under_the_limit_on_open_files(
    monkeypatch: pytest.MonkeyPatch, soft: int, most: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (soft, soft))
    assert 1 <= connection_limit(5000) <= most
    assert connection_limit(1) == 1
