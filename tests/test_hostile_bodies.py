"""What a body can cause before anybody has looked at it: counted, not timed."""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dynamoe.dynamic.text.tokenizer import Tokenizer
from dynamoe.serve import json_answer, json_body
from dynamoe.serve.errors import ApiError
from dynamoe.serve.json_answer import JsonAnswer
from dynamoe.serve.json_body import ON_LOOP_BYTES, BodyReader, check_shape, parse_json
from dynamoe.serve.settings import Limits
from dynamoe.serve.text import TextPool
from dynamoe.serve.wire.messages import CountTokensRequest, MessagesRequest
from dynamoe.serve.wire.openai import (
    Body,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from dynamoe.serve.wire.responses import ResponsesRequest
from hostile_bodies import hostile_bodies
from pydantic import BaseModel, ValidationError

MODELS: dict[str, type[Body]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
}


class Counting:
    """A reader that counts: bytes parsed on the event loop and elsewhere, values made, errors of one validation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moved = 0
        self.on_loop: list[int] = []
        self.values: list[int] = []
        self.errors: list[int] = []
        self.reader = BodyReader(limits=Limits(), run=self._run)
        describe, loads = json_body.describe_problems, json.loads

        def count_errors(problems: Any) -> ApiError:
            self.errors.append(len(problems))
            return describe(problems)

        def count_values(text: str, **arguments: Any) -> Any:
            outside = re.sub(r'"[^"\\]*(?:\\.[^"\\]*)*"', "", text, flags=re.DOTALL)
            self.values.append(1 + sum(map(outside.count, ",[{")))
            if not self.moved:
                self.on_loop.append(len(text.encode("utf-8", "surrogatepass")))
            return loads(text, **arguments)

        monkeypatch.setattr(json_body, "describe_problems", count_errors)
        monkeypatch.setattr(json_body.json, "loads", count_values)

    async def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self.moved += 1
        try:
            return function(*arguments)
        finally:
            self.moved -= 1


def test_hostile_bodies_cause_a_bounded_amount_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(monkeypatch)
    refused: list[tuple[str, ApiError]] = []
    for body in hostile_bodies(seed=0, count=400):
        try:
            asyncio.run(counting.reader.read(MODELS[body.path], body.data))
        except ApiError as error:
            refused.append((body.kind, error))
    assert {error.status_code for _, error in refused} == {400}
    for _, error in refused:
        json.dumps(error.body(), ensure_ascii=False).encode()
    assert {kind for kind, _ in refused} == {"deep", "wide", "object", "text", "number", "broken", "template variables"}
    assert max(counting.values) <= Limits().max_json_values + 1
    assert any("1000000 values" in error.detail for _, error in refused)
    assert max(counting.on_loop) <= ON_LOOP_BYTES
    assert max(counting.errors) <= 16  # of at most two fields, each of a few alternatives


@pytest.mark.parametrize("name", ["prompt", "messages", "stop", "stop_token_ids", "logit_bias", "tokens", "x"])
@pytest.mark.parametrize("element", ["{}", '"a"', "[{}]", "null"])
def test_long_lists_are_refused_before_or_at_their_first_wrong_element(
    monkeypatch: pytest.MonkeyPatch, name: str, element: str
) -> None:
    counting = Counting(monkeypatch)
    long = ("{" + ",".join(f'"{i}":{element}' for i in range(30_000)) + "}") if name == "logit_bias" else None
    value = long or "[" + ",".join([element] * 30_000) + "]"
    fields = {"prompt": '"hi"', "messages": "[]", "tokens": "[]", name: value}
    data = ("{" + ",".join(f'"{key}":{item}' for key, item in fields.items()) + "}").encode()
    for model in MODELS.values():
        with pytest.raises(ApiError) as caught:
            asyncio.run(counting.reader.read(model, data))
        assert caught.value.status_code == 400
    assert max(counting.errors, default=0) <= 8


def lists_of(schema: Any) -> list[dict[str, Any]]:
    """Every list in a model's validators."""
    if isinstance(schema, dict):
        own = [schema] if schema.get("type") == "list" and "items_schema" in schema else []
        return own + [found for part in schema.values() for found in lists_of(part)]
    return [found for part in schema for found in lists_of(part)] if isinstance(schema, (list, tuple)) else []


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.__name__)
def test_every_list_of_a_body_ends_at_its_first_error(model: type[BaseModel]) -> None:
    lists = lists_of(model.__pydantic_core_schema__)
    assert lists
    assert all(found.get("fail_fast") for found in lists)


@pytest.mark.parametrize(
    ("body", "limit"),
    [
        (b"[" * 65 + b"]" * 65, "nested deeper than 64"),
        (b"[" + b'{"a":' * 64 + b"1" + b"}" * 64 + b"]", "nested deeper than 64"),
        (b"[" + b"[]," * 70_000 + b"1]", "65536 lists and objects"),
        (b"[" + b'"",' * 70_000 + b"1]", "65536 strings"),
        (b"[" + b"1," * 1_000_000 + b"1]", "1000000 values"),
        (b"[]" + b"]" * (1 << 22), "not valid JSON: it closes more"),
    ],
    ids=["lists", "objects", "many lists", "many strings", "many numbers", "closed only"],
)
def test_shapes_are_bounded_before_anything_is_made(monkeypatch: pytest.MonkeyPatch, body: bytes, limit: str) -> None:
    monkeypatch.setattr(json_body.json, "loads", None)
    with pytest.raises(ApiError, match=limit):
        parse_json(body, Limits())


def test_lists_in_messages_are_bounded() -> None:
    def read(parts: int) -> BaseModel:
        message = {"role": "user", "content": [{"type": "text", "text": ""}] * parts}
        reader = BodyReader(limits=Limits(), run=asyncio.to_thread)
        return asyncio.run(reader.read(ChatCompletionRequest, json.dumps({"messages": [message]}).encode()))

    read(json_body.MAX_ENTRIES)
    with pytest.raises(ApiError, match="content of a message must have at most 4096 entries, not 4097") as caught:
        read(json_body.MAX_ENTRIES + 1)
    assert caught.value.param == "messages"


def random_value(rng: random.Random, depth: int) -> Any:
    if depth == 0 or rng.random() < 0.3:
        return rng.choice([1, -2.5, None, True, "", 'a"b\\', "\\", '\\"', "[{", "}],:", "é🙂\u2028", "\\\\\\"])
    size = rng.randrange(4)
    if rng.random() < 0.5:
        return [random_value(rng, depth - 1) for _ in range(size)]
    return {f'{n}"\\[': random_value(rng, depth - 1) for n in range(size)}


def depth_of(value: Any) -> int:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if parts is None else 1 + max(map(depth_of, parts), default=0)


@pytest.mark.parametrize("seed", range(200))
def test_the_measured_depth_is_the_true_one_whatever_the_strings_hold(seed: int) -> None:
    rng = random.Random(seed)
    value = [random_value(rng, 6)]
    data = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode()
    depth = depth_of(value)
    assert parse_json(data, Limits(max_json_depth=depth)) == value
    if depth > 1:
        with pytest.raises(ApiError, match=f"deeper than {depth - 1}"):
            check_shape(data, Limits(max_json_depth=depth - 1))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
def test_other_encodings_do_not_pass_the_bounds(encoding: str) -> None:
    with pytest.raises(ApiError, match="not valid JSON"):
        parse_json(json.dumps({"a": "é"}, ensure_ascii=False).encode(encoding), Limits())
    assert parse_json(b'\xef\xbb\xbf{"a": 1}', Limits()) == {"a": 1}


def test_large_answers_are_written_in_short_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 0
    encode = json_answer._encode

    def count(value: Any) -> str:
        nonlocal longest
        longest = max(longest, len(value) if isinstance(value, (list, dict)) else 0)
        return encode(value)

    monkeypatch.setattr(json_answer, "_encode", count)
    content = {
        "tokens": list(range(100_000)),
        "names": ["a"] * 257,
        "choices": [{"index": i, "top": [{"x": 1.5}] * 1000, "none": None, "empty": {}, "list": []} for i in range(3)],
        "text": 'é"\u2028',
    }
    assert JsonAnswer(content).body == json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    assert longest <= json_answer.SLICE


def ticks_during(work: Callable[[], Any]) -> int:
    """How often another thread ran meanwhile."""
    ticks, ended = 0, False

    def tick() -> None:
        nonlocal ticks
        while not ended:
            time.sleep(0.0005)
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        while not ticks:
            time.sleep(0.001)
        before = ticks
        work()
        return ticks - before
    finally:
        ended = True
        thread.join()


def test_other_threads_run_while_long_texts_are_tokenised(make_checkpoint: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.from_directory(make_checkpoint("llama"))
    text = "the quick brown fox " * 20_000
    ids = tokenizer.encode(text)
    assert ids == tokenizer.backend.encode(text).ids
    assert ticks_during(lambda: tokenizer.encode(text)) >= 5
    assert ticks_during(lambda: tokenizer.decode(ids * 4)) >= 5
    assert tokenizer.decode(ids) == text


def test_a_slow_template_and_large_bodies_keep_no_text_waiting(
    copy_checkpoint: Callable[..., Path],
) -> None:
    directory = copy_checkpoint("llama")
    loop = "{% for i in range(90000) %}"
    (directory / "chat_template.jinja").write_text(loop * 3 + "{% endfor %}" * 3)

    async def main() -> None:
        pool = TextPool(Tokenizer.from_directory(directory), threads=1, max_characters=10_000)
        released = threading.Event()
        slow = asyncio.create_task(
            pool.encode_chat(
                [{"role": "user", "content": "hi"}], add_generation_prompt=True, add_special_tokens=False, variables={}
            )
        )
        large = asyncio.create_task(pool.run_large(released.wait, 60))
        for _ in range(3):
            assert await pool.encode("hello", False)
        assert not large.done()
        assert not slow.done()
        released.set()
        with pytest.raises(ApiError, match="processor time"):
            await slow
        with pytest.raises(ApiError, match="10001 characters"):
            await pool.encode("a" * 10_001, False)
        pool.close()

    asyncio.run(main())


def test_wrong_alternatives_are_still_described() -> None:
    with pytest.raises(ApiError, match=r"prompt: .*; or: ") as caught:
        asyncio.run(BodyReader(limits=Limits(), run=None).read(CompletionRequest, b'{"prompt": [1, {}]}'))  # type: ignore[arg-type]
    assert caught.value.param == "prompt"
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate({"prompt": [1, {}]})
