"""Keys, limits, full queues and hostile input against real server processes."""

from __future__ import annotations

import concurrent.futures
import gzip
import json
import random
import socket
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from dynamoe.serve.wire.messages import MessageErrorResponse

COMPLETION = {"prompt": [5, 6], "max_tokens": 2}


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object of an answer, which must have OpenAI's shape."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]


@pytest.fixture(scope="module")
def guarded(start_server: Any, make_checkpoint: Callable[..., Path], tmp_path_factory: Any) -> Iterator[httpx.Client]:
    """A server with keys, small limits and a short queue."""
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text("alice\nbob\n")
    server = start_server(
        make_checkpoint("mixtral"),
        f"server.api_keys_file={keys}",
        "server.admin_key=boss",
        "server.limits.max_body_bytes=20000",
        "server.limits.max_header_bytes=8000",
        "server.limits.max_open_requests=12",
        "server.limits.body_timeout=1",
        "server.cors_origins=[https://friend.example]",
        "server.limits.max_logprob_entries=100",
        "engine.max_num_seqs=2",
        "engine.max_waiting=4",
    )
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def http(server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_every_path_but_health_needs_a_key(guarded: httpx.Client) -> None:
    assert [guarded.get(path).status_code for path in ("/health", "/health/", "/ping")] == [200, 200, 200]
    assert guarded.get("/metrics/", headers=bearer("alice")).status_code == 403
    document = guarded.get("/openapi.json", headers=bearer("alice")).json()
    others = ["/", "/openapi.json", "/nowhere", "/docs", "/metrics/", "//health", "/health/../metrics"]
    paths = [*document["paths"], *others]
    for path in set(paths) - {"/health", "/ping"}:
        for headers in (
            {},
            bearer("eve"),
            {"Authorization": "Bearer"},
            {"Authorization": "Basic alice"},
            {"x-api-key": "alice"},
        ):
            messages = path.startswith("/v1/messages")  # whose clients send that header, and know other errors
            for method in () if messages and "x-api-key" in headers else ("GET", "POST"):
                answer = guarded.request(method, path.replace("{model}", "tiny"), headers=headers)
                assert answer.status_code == 401, (method, path, headers)
                if messages:
                    assert answer.json()["error"]["type"] == "authentication_error"
                else:
                    assert error_of(answer)["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
    assert guarded.get("/v1/models", headers=bearer("bob")).status_code == 200
    assert guarded.get("/", headers=bearer("bob")).status_code == 200


def test_operators_paths_need_the_operators_key(guarded: httpx.Client) -> None:
    assert guarded.get("/metrics", headers=bearer("alice")).status_code == 403
    assert guarded.get("/metrics", headers=bearer("boss")).status_code == 200
    assert guarded.post("/v1/completions", json=COMPLETION, headers=bearer("boss")).status_code == 200


def test_keys_never_share_cached_prompts(guarded: httpx.Client) -> None:
    def cached(key: str, **more: Any) -> int:
        body = {"prompt": list(range(3, 83)), "max_tokens": 1, **more}
        answer = guarded.post("/v1/completions", json=body, headers=bearer(key)).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached("alice"), cached("alice"), cached("bob"), cached("bob"), cached("bob", cache_salt="x")] == [
        0,
        64,
        0,
        64,
        0,
    ]


def test_the_openai_client_with_and_without_a_key(guarded: httpx.Client) -> None:
    base = f"{guarded.base_url}/v1"
    with openai.OpenAI(base_url=base, api_key="eve", max_retries=0) as eve, pytest.raises(openai.AuthenticationError):
        eve.models.list()
    with openai.OpenAI(base_url=base, api_key="alice", max_retries=0) as alice:
        assert alice.models.list().data[0].id == "tiny"


def test_cors_is_for_the_named_origins_only(guarded: httpx.Client) -> None:
    ask = {"Origin": "https://friend.example", "Access-Control-Request-Method": "POST"}
    answer = guarded.options("/v1/completions", headers=ask)
    assert answer.headers["access-control-allow-origin"] == "https://friend.example"
    assert "retry-after" in guarded.get("/health", headers=ask).headers["access-control-expose-headers"]
    wanted = "authorization,content-type,x-stainless-arch,x-stainless-retry-count,x-stainless-timeout"
    named = guarded.options("/v1/chat/completions", headers={**ask, "Access-Control-Request-Headers": wanted})
    assert named.status_code == 200
    assert set(wanted.split(",")) <= set(
        named.headers["access-control-allow-headers"].lower().replace(" ", "").split(",")
    )
    other = guarded.options("/v1/completions", headers={**ask, "Origin": "https://foe.example"})
    assert "access-control-allow-origin" not in other.headers


def test_sizes_are_bounded(guarded: httpx.Client) -> None:
    large = json.dumps({**COMPLETION, "user": "x" * 30_000})
    json_type = {"Content-Type": "application/json"}
    answer = guarded.post("/v1/completions", content=large, headers={**bearer("alice"), **json_type})
    assert (answer.status_code, error_of(answer)["code"]) == (413, "request_too_large")

    def chunks() -> Iterator[bytes]:
        yield large.encode()

    answer = guarded.post("/v1/completions", content=chunks(), headers={**bearer("alice"), **json_type})
    assert answer.status_code == 413
    answer = guarded.get("/health", headers={"x-large": "x" * 20_000})
    assert answer.status_code == 431
    assert "8000 bytes" in error_of(answer)["message"]
    with socket.create_connection((guarded.base_url.host, guarded.base_url.port), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nx-large: " + b"x" * 8_100)  # without an end
        assert connection.recv(4096).startswith(b"HTTP/1.1 431")
    assert guarded.get("/health", headers={"x-large": "x" * 6_000}).status_code == 200


def test_log_probabilities_of_one_answer_are_bounded(guarded: httpx.Client) -> None:
    def status(**body: Any) -> int:
        return guarded.post("/v1/completions", json={"prompt": [5] * 9, **body}, headers=bearer("bob")).status_code

    assert status(max_tokens=5, logprobs=4, echo=True) == 200  # 9 * 5 + 5 * 5
    assert status(max_tokens=1, logprobs=9, echo=True) == 200  # 9 * 10 + 10
    assert status(max_tokens=2, logprobs=9, echo=True) == 400
    assert status(max_tokens=26, logprobs=1, n=2) == 400
    assert status(max_tokens=26, n=2) == 200


def test_slow_bodies_are_cut_off(guarded: httpx.Client) -> None:
    with socket.create_connection((guarded.base_url.host, guarded.base_url.port), timeout=10) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer alice\r\nContent-Length: 100\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n{{".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_a_full_queue_answers_429_and_says_when_to_come_back(guarded: httpx.Client) -> None:
    body = {"prompt": [5, 6], "max_tokens": 400, "ignore_eos": True}

    def post(_: int) -> httpx.Response:
        return guarded.post("/v1/completions", json=body, headers=bearer("alice"))

    with concurrent.futures.ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(post, range(30)))
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert error_of(answer)["type"] == "rate_limit_error"
            assert int(answer.headers["retry-after"]) >= 1
        else:
            assert answer.json()["usage"]["completion_tokens"] == 400
    many = guarded.post("/v1/completions", json={**body, "prompt": [[5]] * 9}, headers=bearer("alice"))
    assert many.status_code == 429  # all of its prompts or none
    metrics = guarded.get("/metrics", headers=bearer("boss")).text
    gauges = [line for line in metrics.splitlines() if line.startswith(("dynamoe:open_", "vllm:kv_cache_usage_perc{"))]
    assert len(gauges) == 3
    assert all(line.endswith(" 0.0") for line in gauges)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b"NaN",
        b"\xff\xfe",
        b"{}",
        b'{"prompt": NaN}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "max_tokens": -1}',
        b'{"prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}",
        b'{"prompt": "a", "n": 99999999999999999999}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "stop": "\\ud800"}',
        b'{"prompt": "a", "logit_bias": {"\\ud800": 1}}',
        b'{"prompt": "a", "model": "\\ud800"}',
        b'{"prompt": ' + b"[" * 3000 + b"]" * 3000 + b"}",
        b'{"prompt": ""}',
        b'{"prompt": [[]]}',
        b'{"prompt": [[1], []]}',
        b'{"prompt": null}',
    ],
    ids=lambda body: repr(body[:40]),
)
def test_malformed_bodies_get_400(http: httpx.Client, body: bytes) -> None:
    answer = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["type"] == "invalid_request_error"
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {"messages": []},
        {"messages": [{}]},
        {"messages": [{"role": "root", "content": "a"}]},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"messages": []}},
        {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"unheard_of": 1}},
        {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        {
            "messages": [{"role": "user", "content": "a"}],
            "max_tokens": 0,
        },
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1"}}]}]},
        {"messages": [{"role": "user", "content": "a " * 2000}]},
    ],
    ids=lambda body: str(body)[:60].encode("ascii", "replace").decode(),
)
def test_malformed_conversations_get_400(http: httpx.Client, body: dict[str, Any]) -> None:
    content = json.dumps(body)
    answer = http.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"]


def test_wrong_methods_paths_and_content_types(http: httpx.Client) -> None:
    wrong_method = http.get("/v1/completions")
    assert (wrong_method.status_code, wrong_method.headers["allow"]) == (405, "POST")
    error_of(wrong_method)
    assert http.post("/health", json={}).headers["allow"] == "GET, HEAD"
    assert http.head("/v1/completions").headers["allow"] == "POST"
    assert (http.head("/metrics").status_code, http.head("/metrics").headers["allow"]) == (405, "GET")
    nowhere = http.post("/v1/nowhere", json={})
    assert nowhere.status_code == 404
    error_of(nowhere)
    form = http.post("/v1/completions", data={"prompt": "a"})
    assert form.status_code == 400
    assert "application/json" in error_of(form)["message"]


def test_probes_of_other_servers_are_answered(http: httpx.Client) -> None:
    for path in ("/health", "/ping", "/v1/models", "/v1/models/tiny"):
        head, get = http.head(path), http.get(path)
        assert (head.status_code, head.content, get.status_code) == (200, b"", 200)
        assert head.headers["content-length"] == get.headers["content-length"]
    assert http.get("/load").json() == {"server_load": 0}


def test_a_slash_at_the_end_of_a_path_changes_nothing(http: httpx.Client) -> None:
    assert http.get("/v1/models/").json() == http.get("/v1/models").json()
    answer = http.post("/v1/completions/", json=COMPLETION)
    assert answer.status_code == 200
    form = http.post("/v1/completions/", data={"prompt": "a"})  # its body is checked as well
    assert "application/json" in error_of(form)["message"]
    assert http.get("/").status_code == 200


def test_broken_http_gets_400_and_harms_nobody(http: httpx.Client) -> None:
    for sent in (b"nonsense\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\xa5"):
        with socket.create_connection((http.base_url.host, http.base_url.port), timeout=10) as connection:
            connection.sendall(sent + b"\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 400")
    assert http.get("/health").status_code == 200


def test_bodies_in_a_coding_or_of_two_lengths_are_refused(http: httpx.Client) -> None:
    body = json.dumps(COMPLETION).encode()
    kind = {"Content-Type": "application/json"}
    for coding, sent, status in (("gzip", gzip.compress(body), 415), ("br", body, 415), ("identity", body, 200)):
        answer = http.post("/v1/completions", content=sent, headers={**kind, "Content-Encoding": coding})
        assert answer.status_code == status
        assert status == 200 or error_of(answer)["code"] == "unsupported_encoding"
    both = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 4\r\n"
    )
    both += b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    with socket.create_connection((http.base_url.host, http.base_url.port), timeout=10) as connection:
        connection.sendall(both)
        assert connection.recv(4096).startswith(b"HTTP/1.1 400")


def mutated(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A request's path and body, of which some fields hold something unexpected."""
    text = "".join(rng.choices(string.printable + "é€𝄞\x00", k=rng.randrange(12)))
    values: list[Any] = [None, True, -1, 0, 1, 2**31, 2**63, -(2**63), 0.5, -0.0, 1e300, "", text, [], {}, [None], [[]]]
    values += [[text], [1, 2], {"1": 1}, {text: text}, [[1, 2], [3]], list(range(50))]
    names = ["prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed", "stop", "logprobs", "echo"]
    names += ["stream", "logit_bias", "stop_token_ids", "min_tokens", "repetition_penalty", "presence_penalty", "model"]
    names += ["ignore_eos", "prompt_logprobs", "cache_salt", "priority", "stream_options", "add_special_tokens", text]
    path = rng.choice(["completions", "completions", "responses", "messages", "messages/count_tokens"])
    body: dict[str, Any] = {"prompt": rng.choice([text, [1, 2, 3], [[4, 5], [6]]]), "max_tokens": 3}
    if path == "responses":
        body = {"input": rng.choice([text, [{"role": "user", "content": text}]]), "max_output_tokens": 3}
        names += ["input", "instructions", "tools", "text", "reasoning", "include", "store", "previous_response_id"]
    elif path != "completions":
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 3}
        names += ["messages", "system", "tools", "tool_choice", "thinking", "stop_sequences", "output_config"]
    return f"/v1/{path}", {**body, **{name: rng.choice(values) for name in rng.sample(names, rng.randrange(1, 4))}}


def test_random_requests_never_break_the_server(http: httpx.Client) -> None:
    rng = random.Random(0)
    seen = set()
    for _ in range(400):
        path, body = mutated(rng)
        answer = http.post(path, json=body)
        seen.add(answer.status_code)
        assert answer.status_code in (200, 400, 404), (path, body, answer.text)
        if answer.status_code != 200 and "messages" in path:
            MessageErrorResponse.model_validate(answer.json())
        elif answer.status_code != 200:
            error_of(answer)
    assert seen >= {200, 400}
    assert http.get("/health").status_code == 200
