"""Clients that want to harm: real connections to real server processes."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hostile_bodies import hostile_bodies
from hostile_clients import Clients, lines_per_kind

FAULTY_SERVER = Path(__file__).parent / "faulty_server.py"
COMPLETION = {"prompt": [5, 6], "max_tokens": 2}


@pytest.fixture(scope="module")
def small(start_server: Any, make_checkpoint: Callable[..., Path]) -> Any:
    """A server with small limits, so that few clients suffice to reach them."""
    return start_server(
        make_checkpoint("mixtral"),
        "server.limits.max_open_requests=4",
        "server.limits.max_connections=24",
        "server.limits.header_timeout=2",
        "server.limits.body_timeout=30",
        "server.limits.write_timeout=1",
        "server.limits.max_bodies_bytes=3000000",
        "server.limits.max_body_bytes=1000000",
    )


@pytest.fixture
def http(small: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=small.url, timeout=60) as client:
        yield client


class Crowd:
    """Raw connections to one server, closed at the end."""

    def __init__(self, url: str) -> None:
        self.address = httpx.URL(url).host, httpx.URL(url).port or 0
        self.connections: list[socket.socket] = []

    def send(self, *heads: bytes, receive_buffer: int | None = None) -> socket.socket:
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(60)
        connection.connect(self.address)
        for head in heads:
            connection.sendall(head)
        self.connections.append(connection)
        return connection


@pytest.fixture
def crowd(small: Any) -> Iterator[Crowd]:
    crowd = Crowd(small.url)
    yield crowd
    for connection in crowd.connections:
        connection.close()


def head(path: str, *lines: str, method: str = "POST") -> bytes:
    return "\r\n".join((f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", "")).encode()


def unfinished(path: str, size: int = 100) -> bytes:
    return head(path, "Content-Type: application/json", f"Content-Length: {size}")


@pytest.mark.parametrize("path", ["/health", "/metrics", "/nowhere", "/v1/models", "/v1/completions"])
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_unfinished_bodies_keep_nobody_out(http: httpx.Client, crowd: Crowd, method: str, path: str) -> None:
    """More of them than requests may be in flight; those to a path that takes no body are not even read."""
    request = unfinished(path).replace(b"POST", method.encode(), 1)
    for _ in range(6):
        crowd.send(request)
    assert http.post("/v1/completions", json=COMPLETION).status_code == 200
    if (method, path) != ("POST", "/v1/completions"):
        for connection in crowd.connections:
            answer = connection.recv(65536)
            assert b"connection: close" in answer.lower()
            while answer:
                answer = connection.recv(65536)


def test_the_oldest_unfinished_bodies_give_way_to_others(http: httpx.Client, crowd: Crowd) -> None:
    waiting = [crowd.send(unfinished("/v1/completions", 900_000), b" " * 800_000) for _ in range(5)]
    assert waiting[0].recv(100).startswith(b"HTTP/1.1 408")
    body = json.dumps({**COMPLETION, "user": "x" * 900_000})
    for _ in range(3):
        answer = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 200, answer.text


def test_half_headers_and_silence_end_and_floods_of_them_cost_one_line(
    small: Any, http: httpx.Client, crowd: Crowd
) -> None:
    half, silent = crowd.send(b"GET /health HTTP/1.1\r\nHost: loc"), crowd.send()
    assert half.recv(4096).startswith(b"HTTP/1.1 408")
    assert silent.recv(4096) == b""
    for _ in range(100):  # four times as many as may be open
        crowd.send(b"GET /health HTT")
    assert http.post("/v1/completions", json=COMPLETION).status_code == 200
    ended = 0
    for connection in crowd.connections[2:]:
        try:
            ended += connection.recv(4096)[:12] != b"HTTP/1.1 200"
        except ConnectionResetError:
            ended += 1
    assert ended == 100
    assert small.log.count("too many connections are open") == 1
    assert small.log.count("did not send a header") == 1
    assert "Traceback" not in small.log


def test_floods_of_broken_requests_cost_one_line_of_each_kind(small: Any, http: httpx.Client, crowd: Crowd) -> None:
    for _ in range(10):
        assert crowd.send(b"nonsense\r\n\r\n").recv(4096).startswith(b"HTTP/1.1 400")
        assert http.post("/v1/completions", json={"prompt": [{}]}).status_code == 400
        assert http.post("/nowhere", json={}).status_code == 404
    small.logged(r'path="/nowhere" status=404')
    assert small.log.count("Invalid HTTP request received") == 1
    form = {"Content-Type": "text/plain"}  # refused before its route
    assert http.post("/v1/completions", content="", headers=form).status_code == 400
    assert small.log.count('path="/v1/completions" status=400') == 1
    assert small.log.count("status=404") == 1


def open_requests(http: httpx.Client) -> float:
    (line,) = (x for x in http.get("/metrics").text.splitlines() if x.startswith("dynamoe:open_http_requests{"))
    return float(line.rpartition(" ")[2])


def test_streams_that_nobody_reads_free_their_places(small: Any, http: httpx.Client, crowd: Crowd) -> None:
    fields = {"prompt": [5], "max_tokens": 500, "n": 16, "logprobs": 20, "ignore_eos": True, "stream": True}
    for stream in (True, False):
        body = json.dumps({**fields, "stream": stream}).encode()
        request = head("/v1/completions", "Content-Type: application/json", f"Content-Length: {len(body)}") + body
        for _ in range(4):
            crowd.send(request, receive_buffer=4096)
    deadline = time.monotonic() + 120
    while open_requests(http) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert open_requests(http) == 0
    assert http.post("/v1/completions", json=COMPLETION).status_code == 200
    assert len(crowd.connections) == 8
    small.logged("a client did not read its answer for 1 s")


def test_raised_priorities_are_clamped_and_a_header_says_so(http: httpx.Client) -> None:
    for stream in (False, True):
        raised = http.post("/v1/completions", json={**COMPLETION, "priority": -5, "stream": stream})
        assert (raised.status_code, raised.headers["x-priority"]) == (200, "0")
    for priority in (None, 0, 3):
        answer = http.post("/v1/completions", json={**COMPLETION, "priority": priority})
        assert answer.status_code == 200
        assert "x-priority" not in answer.headers


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template_kwargs": {"self": 1}},
        {"chat_template_kwargs": {"messages": 1}},
        {"chat_template_kwargs": {"add_generation_prompt": 1}},
        {"chat_template_kwargs": {"enable_thinking": nested(900)}},
        {"tools": nested(900)},
        {"metadata": nested(900)},
        {"something": nested(900)},
        {"response_format": nested(900)},
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": nested(900)}]},
    ],
    ids=lambda fields: str(fields)[:40],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_names_of_parameters_and_deep_values_get_400(http: httpx.Client, path: str, fields: dict[str, Any]) -> None:
    answer = http.post(path, json={"messages": [{"role": "user", "content": "hi"}], **fields})
    assert answer.status_code == 400, answer.text


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:1234", 200),
        ("LOCALHOST.", 200),
        ("a.localhost", 200),
        ("[::1]:80", 200),
        ("127.1.2.3", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:8000", 403),
        ("10.0.0.1", 403),
        ("[::2]", 403),
        ("", 403),
    ],
)
def test_requests_for_foreign_hosts_are_refused_on_the_loopback_interface(
    http: httpx.Client, host: str, status: int
) -> None:
    for method, path in (("GET", "/health"), ("POST", "/v1/completions"), ("GET", "/")):
        answer = http.request(method, path, headers={"Host": host}, json=COMPLETION if method == "POST" else None)
        assert answer.status_code == status, answer.text
    assert status == 200 or answer.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize("path", ["/v1/contracts/reload", "/v1/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_posts_that_any_web_page_can_make_are_refused(http: httpx.Client, path: str, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    answer = http.post(path, content=json.dumps(COMPLETION), headers=headers)
    assert answer.status_code == 400
    assert "application/json" in answer.json()["error"]["message"]
    assert http.post("/v1/contracts/reload", json={}).status_code == 200
    assert http.post("/v1/contracts/reload", json={"directory": "/tmp"}).status_code == 400


@pytest.mark.parametrize("signals", [1, 2])
def test_a_process_whose_event_loop_is_stuck_ends_all_the_same(
    start_server: Any, make_checkpoint: Callable[..., Path], signals: int
) -> None:
    """With one signal after the time for draining, with two at once; the log shows what held it."""
    patience = {1: "1", 2: "3600"}[signals]
    server = start_server(make_checkpoint("mixtral"), "stuck", "0", patience, script=FAULTY_SERVER)
    with socket.create_connection((httpx.URL(server.url).host, httpx.URL(server.url).port or 0)) as connection:
        body = json.dumps({"prompt": [5], "max_tokens": 9}).encode()
        kind = "Content-Type: application/json"
        connection.sendall(head("/v1/completions", kind, f"Content-Length: {len(body)}") + body)
        server.logged("the event loop is stuck now")
        for _ in range(signals):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
        assert server.process.wait(60) == 1
    assert "Timeout" in server.log
    assert "time.sleep" in server.log or "in block" in server.log


def test_sigterm_ends_a_server_that_clients_hold_on_to(start_server: Any, make_checkpoint: Callable[..., Path]) -> None:
    server = start_server(make_checkpoint("mixtral"), "server.drain_timeout=1")
    crowd = Crowd(server.url)
    fields = {"prompt": [5], "max_tokens": 500, "n": 16, "logprobs": 20, "ignore_eos": True, "stream": True}
    body = json.dumps(fields).encode()
    request = head("/v1/completions", "Content-Type: application/json", f"Content-Length: {len(body)}") + body
    for _ in range(4):
        crowd.send(request, receive_buffer=4096)
        crowd.send(unfinished("/v1/completions", 10_000), b" " * 5000)
        crowd.send(b"GET /health HTT")
    assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(120) == 0, server.log
    assert "Timeout" not in server.log  # in order, not by force
    for connection in crowd.connections:
        connection.close()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_thousand_hostile_bodies(start_server: Any, make_checkpoint: Callable[..., Path]) -> None:
    server = start_server(make_checkpoint("mixtral"))
    process = psutil.Process(server.process.pid)
    statuses: dict[int, int] = {}
    with httpx.Client(base_url=server.url, timeout=120) as client:
        assert client.post("/v1/completions", json=COMPLETION).status_code == 200
        before, most = process.memory_info().rss, 0
        for body in hostile_bodies(seed=1, count=2000):
            answer = client.post(body.path, content=body.data, headers={"Content-Type": "application/json"})
            assert answer.status_code in (200, 400, 413), (body.kind, body.data[:200], answer.text[:500])
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            most = max(most, process.memory_info().rss)
        assert client.get("/health").status_code == 200
    assert statuses[200] > 100
    assert statuses[400] > 1000
    assert most - before < 512 << 20, f"{(most - before) >> 20} MiB more"
    assert "Traceback" not in server.log


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_soak_with_hostile_clients(start_server: Any, make_checkpoint: Callable[..., Path]) -> None:
    """Two minutes of what ``benchmarks/hostile_load.py`` does for ten, where the times are measured as well."""
    server = start_server(make_checkpoint("mixtral"), "server.limits.write_timeout=5", "server.limits.header_timeout=3")
    clients = Clients(server.url, server.process.pid)
    observed = clients.run(120, hostile=True)
    assert set(observed.failures) <= {"connection"}, observed.failures
    assert len(observed.seconds) > 100
    assert len(observed.hostile) >= 7, observed.hostile
    begin = max(size for second, size in observed.memory if second < 60)
    assert max(size for _, size in observed.memory) - begin < 64 << 20
    with httpx.Client(base_url=server.url) as client:
        deadline = time.monotonic() + 60
        while open_requests(client) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert open_requests(client) == 0
        metrics = dict(line.rpartition(" ")[::2] for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    pages = {name.partition("{")[0]: value for name, value in metrics.items() if name.startswith("dynamoe:kv_pages")}
    assert pages["dynamoe:kv_pages_free"] == pages["dynamoe:kv_pages_total"]
    assert max(lines_per_kind(server.log).values()) == 1, lines_per_kind(server.log)
    assert "Traceback" not in server.log
    assert server.stop() == 0
