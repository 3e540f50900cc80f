"""Bodies that a hostile client may send: deep, wide, huge, of wrong types, with extreme numbers, broken."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
PATHS += ("/v1/responses", "/v1/messages", "/v1/messages/count_tokens")
LISTS = ("prompt", "messages", "stop", "stop_token_ids", "logit_bias", "tokens", "tools", "documents", "metadata", "x")
LISTS += ("response_format", "structured_outputs", "guided_json", "guided_choice", "guided_regex", "grammar")
LISTS += ("input", "system", "include", "tool_choice", "thinking", "text", "stop_sequences")
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class HostileBody:
    """One request of a hostile client."""

    kind: str
    path: str
    data: bytes


def _valid(path: str) -> dict[str, object]:
    return {
        "/v1/completions": {"prompt": "hi", "max_tokens": 1},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
        "/tokenize": {"prompt": "hi"},
        "/detokenize": {"tokens": [5]},
        "/v1/responses": {"input": "hi", "max_output_tokens": 1},
        "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
        "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hi"}]},
    }[path]


def _with(path: str, name: str, value: bytes) -> bytes:
    """A valid body of which one field is replaced, or added in front."""
    fields = {key: json.dumps(item).encode() for key, item in _valid(path).items() if key != name}
    parts = [b"%s:%s" % (json.dumps(key).encode(), item) for key, item in {name: value, **fields}.items()]
    return b"{" + b",".join(parts) + b"}"


def _deep(rng: random.Random) -> bytes:
    depth = rng.choice((30, 63, 64, 65, 100, 900, 3000, 100_000))
    opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'[{"self":', b"}]")))
    return opening * depth + b"1" + (closing * depth if rng.random() < 0.7 else b"")


def _wide(rng: random.Random) -> bytes:
    element = rng.choice(
        (b"{}", b"[]", b"1", b"-1", b'""', b'"a"', b"null", b"1.5", b"[1]", b'{"role":"user"}', b"[{}]")
    )
    count = rng.choice((10, 1000, 70_000, 300_000, 1_100_000))
    last = rng.choice((element, b"{}", b'"x"'))
    return b"[" + b",".join([element] * count + [last]) + b"]"


def _object(rng: random.Random) -> bytes:
    count = rng.choice((10, 400, 70_000, 150_000))
    value = rng.choice((b"1", b"{}", b'"a"', b"1e9"))
    return b"{" + b",".join(b'"%d":%s' % (number, value) for number in range(count)) + b"}"


def _text(rng: random.Random) -> bytes:
    size = rng.choice((100, 70_000, MEBIBYTE, 3 * MEBIBYTE))
    unit = rng.choice(
        (b"a", b" ", b"\\n", b"\\\\", b'\\"', b"\\u0000", "é🙂".encode(), b"\\ud83d\\ude42", b"{[,", b"x y ")
    )
    return b'"' + unit * (size // len(unit)) + b'"'


def _number(rng: random.Random) -> bytes:
    return rng.choice((
        b"1e308", b"1e999", b"-1e999", b"NaN", b"Infinity", b"-0", b"-0.0", b"1e-400", b"2147483648", b"-2147483649",
        b"9223372036854775808", b"1" + b"0" * 400, b"1" + b"0" * 5000, b"0." + b"1" * 5000, b"true", b'"7"', b"[7]",
        b"9" * MEBIBYTE,
    ))  # fmt: skip


def _broken(rng: random.Random) -> bytes:
    data = bytearray(json.dumps(_valid(rng.choice(PATHS))).encode())
    for _ in range(rng.randrange(1, 4)):
        data[rng.randrange(len(data))] = rng.choice(b'\x00\xff[]{}",:\\1a')
    return bytes(rng.choice((data, data[: rng.randrange(len(data))], data.decode("latin-1").encode("utf-16"))))


def _template_variables(rng: random.Random) -> bytes:
    name = rng.choice(
        (
            "self",
            "messages",
            "context",
            "range",
            "cycler",
            "loop",
            "__class__",
            "enable_thinking",
            "date_string",
            "\ud800",
        )
    )
    value = rng.choice((b"1", _deep(rng), b"{}", b'"{{ 10 ** 100000000 }}"', b"[[[]]]", _number(rng)))
    return b"{" + json.dumps(name).encode() + b":" + value + b"}"


FIELDS: dict[str, Callable[[random.Random], bytes]] = {
    "deep": _deep,
    "wide": _wide,
    "object": _object,
    "text": _text,
    "number": _number,
}
NUMBERS = ("max_tokens", "n", "temperature", "top_p", "seed", "priority", "logprobs", "min_tokens", "top_k", "x")


def hostile_bodies(seed: int, count: int) -> Iterator[HostileBody]:
    """``count`` bodies, the same ones for the same seed; none is larger than 4 MiB."""
    rng = random.Random(seed)
    for _ in range(count):
        path, kind = rng.choice(PATHS), rng.choice((*FIELDS, "broken", "template variables"))
        if kind == "broken":
            data = _broken(rng)
        elif kind == "template variables":
            data = _with("/v1/chat/completions", "chat_template_kwargs", _template_variables(rng))
            path = "/v1/chat/completions"
        else:
            name = rng.choice(NUMBERS if kind == "number" else LISTS)
            data = _with(path, name, FIELDS[kind](rng))
        yield HostileBody(kind, path, data[: 4 * MEBIBYTE])
