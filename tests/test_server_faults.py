"""Nobody waits in silence: engines that die or hang, and servers that are told to stop."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from forks import run_processes

FAULTY_SERVER = Path(__file__).parent / "faulty_server.py"


async def stream(
    client: httpx.AsyncClient, admitted: asyncio.Semaphore | None = None, **fields: Any
) -> list[dict[str, Any] | str]:
    """The events of one streamed completion, [DONE] as a string; a refusal reads like a stream that fails at once.
    Releases ``admitted`` when the stream begins."""
    body = {"prompt": [5, 6, 7], "max_tokens": 300, "ignore_eos": True, "stream": True, **fields}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            return [json.loads(await response.aread()), "[DONE]"]
        if admitted is not None:
            admitted.release()
        data = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def outcome(events: list[Any]) -> str:
    """How a stream ended; fails when it just stopped."""
    assert events[-1] == "[DONE]"
    last = events[-2]
    return last["error"]["code"] if "error" in last else last["choices"][0]["finish_reason"]


def together(server: Any, scenario: Callable[[httpx.AsyncClient], Any]) -> Any:
    async def main() -> Any:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=240, limits=limits) as client:
            return await scenario(client)

    return asyncio.run(main())


@pytest.mark.parametrize(("kind", "code"), [("crash", "engine_dead"), ("hang", "engine_hung")], ids=["crash", "hang"])
def test_a_broken_engine_ends_all_requests_with_errors(
    kind: str, code: str, start_server: Any, make_checkpoint: Callable[..., Path]
) -> None:
    server = start_server(make_checkpoint("mixtral"), kind, "12", "2", script=FAULTY_SERVER)

    async def scenario(client: httpx.AsyncClient) -> None:
        assert (await client.get("/health")).status_code == 200
        body = {"prompt": [5], "max_tokens": 300, "ignore_eos": True}
        admitted = asyncio.Semaphore(0)
        whole = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(4)]
        streams = [asyncio.create_task(stream(client, admitted)) for _ in range(20)]
        answers = await asyncio.gather(*whole)
        assert {answer.json()["error"]["code"] for answer in answers} == {code}
        assert 500 in {answer.status_code for answer in answers}  # and 503 for those that came too late
        assert {outcome(events) for events in await asyncio.gather(*streams)} == {code}
        assert not admitted.locked()  # some streams had begun, and got their error in-band
        health = await client.get("/health")
        assert (health.status_code, health.json()["error"]["code"]) == (503, code)
        refused = await client.post("/v1/completions", json={"prompt": [5]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, code)
        metrics = (await client.get("/metrics")).text
        assert 'dynamoe:engine_healthy{engine="0"' in metrics
        assert "dynamoe:open_http_requests" in metrics
        assert any(line.endswith(" 0.0") for line in metrics.splitlines() if line.startswith("dynamoe:engine_healthy"))

    together(server, scenario)
    if kind == "crash":
        assert "RuntimeError: injected" in server.log
    else:
        assert "time.sleep(3600)" in server.log  # the watchdog says where the thread is
    assert server.stop() == 1


@pytest.mark.parametrize("drain_timeout", [600, 0.1], ids=["they finish", "they are cut off"])
def test_sigterm_during_twenty_streams(
    drain_timeout: float, start_server: Any, make_checkpoint: Callable[..., Path]
) -> None:
    server = start_server(make_checkpoint("mixtral"), f"server.drain_timeout={drain_timeout}")

    async def scenario(client: httpx.AsyncClient) -> list[str]:
        admitted = asyncio.Semaphore(0)
        streams = [asyncio.create_task(stream(client, admitted, max_tokens=250, n=2)) for _ in range(20)]
        for _ in streams:
            await admitted.acquire()
        server.process.send_signal(signal.SIGTERM)
        while (health := await client.get("/health")).status_code == 200:
            await asyncio.sleep(0.01)
        assert health.json()["error"]["code"] == "shutting_down"
        refused = await client.post("/v1/completions", json={"prompt": [5]})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        return [outcome(events) for events in await asyncio.gather(*streams)]

    outcomes = together(server, scenario)
    assert server.process.wait(120) == 0, server.log
    if drain_timeout == 600:
        assert outcomes == ["length"] * 20
    else:
        assert set(outcomes) <= {"length", "shutting_down"}
        assert "shutting_down" in outcomes


def test_an_idle_server_stops_at_once(start_server: Any, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    socket = tmp_path / "s"
    settings = ["server.log_format=json", "server.drain_timeout=3600"]  # which running requests would get
    server = start_server(make_checkpoint("llama"), f"server.uds={json.dumps(str(socket))}", *settings)
    assert server.url == "http://localhost"
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), base_url=server.url) as client:
        assert client.post("/v1/completions", json={"prompt": [5], "max_tokens": 1}).status_code == 200
    assert socket.stat().st_mode & 0o777 == 0o600
    line = json.loads(server.logged("/v1/completions"))
    assert (line["path"], line["status"], line["completion_tokens"]) == ("/v1/completions", 200, 1)
    assert server.stop() == 0
    assert not socket.exists()


def test_what_is_wrong_is_said_in_one_line_before_anything_is_loaded(
    server: Any, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    def failure(*arguments: str) -> str:
        code, output = run_processes(["-m", "dynamoe", "serve", *arguments], 1, tmp_path)
        assert code == 2
        assert len(output.strip().splitlines()) == 1, output
        return output

    port = server.url.rpartition(":")[2]
    assert port in failure(f"model={tmp_path}/none", f"server.port={port}")
    assert "none" in failure(f"model={tmp_path}/none", "server.port=0")
