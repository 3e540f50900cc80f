"""Structured outputs over HTTP: every spelling, streams, n, OpenAI's client, hostile ones beside honest streams."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import re
import time
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from dynamoe.serve.errors import ApiError
from dynamoe.serve.structured import FIELDS, wanted_form
from dynamoe.serve.wire.openai import CompletionRequest
from pydantic import BaseModel
from structured_schemas import KINDS, SMALL, UNENFORCED, closed, many

COMPLETION: dict[str, Any] = {"prompt": "The capital", "max_tokens": 300, "temperature": 1.0, "seed": 3}
CHAT = {**COMPLETION, "messages": [{"role": "user", "content": "Which one?"}]}
del CHAT["prompt"]
DIGITS = closed({"digits": {"type": "string", "pattern": "^[0-9]{3}$"}})


@pytest.fixture(scope="module")
def http(server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def endings(http: httpx.Client) -> dict[str, float]:
    """Makes it likelier that a random model ends what it has begun."""
    tokens = [http.post("/tokenize", json={"prompt": text}).json()["tokens"][0] for text in '"}],:']
    return {str(token): 4.0 for token in (*tokens, 2)}


async def answered(client: httpx.AsyncClient, schema: Any, number: int, bias: dict[str, float]) -> list[Any]:
    """Texts and finish reasons of an answer, in one of the four ways to get it."""
    chat, stream = number % 2 == 0, number % 4 < 2
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}
    body = {**(CHAT if chat else COMPLETION), "n": 1 + number % 3, "stream": stream, "logit_bias": bias}
    body |= {"response_format": form} if number % 3 else {"structured_outputs": {"json": schema, "strict": True}}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    if not stream:
        answer = await client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        found = [(c["message"]["content"] if chat else c["text"], c["finish_reason"]) for c in answer.json()["choices"]]
        return found
    texts, reasons = [""] * body["n"], [""] * body["n"]
    async with client.stream("POST", path, json=body) as response:
        lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    for choice in (choice for line in lines[:-1] for choice in json.loads(line)["choices"]):
        texts[choice["index"]] += (choice["delta"].get("content") or "") if chat else choice["text"]
        reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
    return list(zip(texts, reasons, strict=True))


def check_all(server: Any, schemas: list[Any], bias: dict[str, float]) -> None:
    async def scenario() -> list[list[Any]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
            return await asyncio.gather(*(answered(client, s, i, bias) for i, s in enumerate(schemas)))

    results = asyncio.run(scenario())
    reasons = [reason for result in results for _, reason in result]
    assert set(reasons) <= {"stop", "length"}
    assert reasons.count("stop") >= 0.95 * len(reasons)
    for schema, result in zip(schemas, results, strict=True):
        for text, reason in result:
            if reason == "stop":
                jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)


def test_answers_are_accepted_by_their_schemas(server: Any, endings: dict[str, float]) -> None:
    check_all(server, list(KINDS.values()), endings)


@pytest.mark.slow
def test_two_hundred_schemas(server: Any, endings: dict[str, float]) -> None:
    check_all(server, many(200), endings)


SPELLINGS: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_object", "schema": DIGITS}}, r'\{ ?"digits" ?: ?"\d{3}" ?\}'),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": SMALL}}}, r"\d"),
    ({"structured_outputs": {"regex": "[0-9]{3}"}}, r"\d{3}"),
    ({"structured_outputs": {"choice": ["one", "two"]}}, "one|two"),
    ({"structured_outputs": {"grammar": 'start: "a" | "b"'}}, "a|b"),
    ({"guided_json": json.dumps(SMALL)}, r"\d"),
    ({"guided_json": closed({"a": {"const": 1}}), "guided_whitespace_pattern": "\n"}, r'\{\s?"a"\s?:\s?1\s?\}'),
    ({"guided_regex": "[0-9]{3}"}, r"\d{3}"),
    ({"guided_choice": ["one", "two"]}, "one|two"),
    ({"guided_grammar": 'root ::= "a" | "b"'}, "a|b"),
    ({"json_schema": SMALL}, r"\d"),
    ({"grammar": 'root ::= "a" | "b"'}, "a|b"),
    ({"regex": "[0-9]{3}"}, r"\d{3}"),
    ({"ebnf": 'root ::= "a" | "b"'}, "a|b"),
]


@pytest.mark.parametrize(("fields", "pattern"), SPELLINGS, ids=lambda value: str(value)[:50])
def test_every_spelling_works(http: httpx.Client, fields: dict[str, Any], pattern: str) -> None:
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        (choice,) = http.post(path, json={**body, **fields}).json()["choices"]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        assert choice["finish_reason"] == "stop"
        assert re.fullmatch(pattern, text), text


def test_every_two_fields_exclude_each_other() -> None:
    one: dict[str, Any] = dict.fromkeys(FIELDS, "a") | {"guided_choice": ["a"]}
    one |= {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}
    for first, second in itertools.combinations(FIELDS, 2):
        body = CompletionRequest.model_validate({"prompt": "a", first: one[first], second: one[second]})
        with pytest.raises(ApiError, match=f"{first} and {second} exclude each other") as caught:
            wanted_form(body)
        assert (caught.value.status_code, caught.value.param) == (400, second)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"response_format": {}}, "the type must be text, json_object or json_schema, not 'None'"),
        ({"response_format": {"type": "structural_tag", "format": {}}}, "not 'structural_tag'"),
        ({"response_format": {"type": "text", "schema": {}}}, "text does not take 'schema'"),
        ({"response_format": {"type": "json_object", "strict": True}}, "json_object does not take 'strict'"),
        ({"response_format": {"type": "json_schema"}}, "json_schema must be an object that holds the schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "json_schema.schema is missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": []}}}, "the schema must be an object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "x": 1}}}, "does not take 'x'"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}}, "strict must be"),
        ({"structured_outputs": {}}, "needs exactly one of json, json_object, regex, choice, grammar"),
        ({"structured_outputs": {"regex": "a", "unknown": 1}}, "structured_outputs: unknown is not supported here"),
        ({"guided_choice": []}, "choice must not be empty"),
        ({"guided_whitespace_pattern": "a"}, "needs guided_json"),
        ({"regex": "a", "guided_whitespace_pattern": "a"}, "needs guided_json|belong to json"),
        ({"guided_regex": "("}, "unclosed group"),
        ({"structural_tag": {}}, "structural_tag is not supported by this server; response_format"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_wrong_is_named(http: httpx.Client, fields: dict[str, Any], message: str) -> None:
    answer = http.post("/v1/completions", json={**COMPLETION, **fields})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] in fields
    assert re.search(message, error["message"])


def test_keywords_that_are_not_enforced_are_in_a_header(http: httpx.Client) -> None:
    body = {**COMPLETION, "max_tokens": 4}
    for schema, names in UNENFORCED:
        for stream in (False, True):
            answer = http.post("/v1/completions", json={**body, "guided_json": schema, "stream": stream})
            assert answer.status_code == 200
            assert set(answer.headers["x-structured-output-ignored"].split(", ")) == names
        strict = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
        assert http.post("/v1/completions", json={**body, "response_format": strict}).status_code == 400
    assert (
        "x-structured-output-ignored" not in http.post("/v1/completions", json={**body, "guided_json": SMALL}).headers
    )


class Step(BaseModel):
    kind: Literal["add", "take"]
    amount: int


class Plan(BaseModel):
    steps: list[Step]
    done: bool


def test_openais_client_parses(server: Any, endings: dict[str, float]) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        ask: dict[str, Any] = {"model": "tiny", "messages": CHAT["messages"], "logit_bias": endings, "seed": 1}
        (choice,) = client.chat.completions.parse(**ask, response_format=Plan, max_tokens=400).choices
        assert isinstance(choice.message.parsed, Plan)
        with client.chat.completions.stream(**ask, response_format=Plan, max_tokens=400) as stream:
            stream.until_done()
            parsed = stream.get_final_completion().choices[0].message.parsed
        assert isinstance(parsed, Plan)
        answer = client.chat.completions.create(**ask, response_format={"type": "json_object"}, max_tokens=400)
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)
        with pytest.raises(openai.LengthFinishReasonError):
            client.chat.completions.parse(**ask, response_format=Plan, max_tokens=3)


def test_contradictions_are_the_clients_fault(http: httpx.Client) -> None:
    body = {**COMPLETION, "guided_regex": "[0-9]{3}", "max_tokens": 30, "min_tokens": 20}
    answer = http.post("/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "structured_output_failed")
    streamed = http.post("/v1/completions", json={**body, "stream": True}).text.split("\n\n")
    error = json.loads(streamed[-3].removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "structured_output_failed")
    assert streamed[-2] == "data: [DONE]"


NESTED: Any = functools.reduce(lambda inner, _: closed({"a": inner}), range(200), SMALL)
HOSTILE: list[dict[str, Any]] = [
    {"guided_json": NESTED},
    {"guided_json": json.dumps(NESTED)},
    {"guided_json": {"enum": [f"value {number}" for number in range(2000)]}},
    {"guided_json": {"pattern": "((a{1,1000}){1,1000}){1,1000}"}},
    {"guided_json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
    {"guided_json": {"allOf": [{"pattern": f"^.*{letter}.*$"} for letter in "abcdefghijkl"], "type": "string"}},
    {"guided_json": {"allOf": [{"anyOf": [closed({f"{i}{j}": {}}) for j in range(6)]} for i in range(8)]}},
    {"guided_regex": "((a{1,1000}){1,1000}){1,1000}"},
    {"guided_grammar": "start: " + " ".join(['("a"|"b")?'] * 3000)},
    {"guided_grammar": "root ::= " + "(" * 9000},
    {"guided_choice": [str(number) for number in range(3000)]},
]


def test_hostile_forms_get_400_while_streams_go_on(server: Any, http: httpx.Client) -> None:
    http.post("/v1/completions", json={**COMPLETION, "guided_regex": "a"})  # the tokenizer is built

    async def scenario() -> tuple[float, float, list[float]]:
        arrivals: list[float] = []

        async def honest(client: httpx.AsyncClient) -> None:
            body = {**COMPLETION, "stream": True, "ignore_eos": True, "max_tokens": 400}
            async with client.stream("POST", "/v1/completions", json=body) as response:
                async for line in response.aiter_lines():
                    if line:
                        arrivals.append(time.monotonic())

        async def hostile(client: httpx.AsyncClient, fields: dict[str, Any]) -> None:
            answer = await client.post("/v1/completions", json={**COMPLETION, **fields})
            assert answer.status_code == 400, answer.text[:300]

        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            stream = asyncio.create_task(honest(client))
            while not arrivals:
                await asyncio.sleep(0.01)
            first = time.monotonic()
            await asyncio.gather(*(hostile(client, fields) for fields in HOSTILE))
            last = time.monotonic()
            await stream
        return first, last, arrivals

    first, last, arrivals = asyncio.run(scenario())
    assert len(arrivals) > 200
    assert sum(first < arrival < last for arrival in arrivals) > 1
