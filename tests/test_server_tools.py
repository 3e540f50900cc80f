"""Tools: required and named functions are always called validly, whole and streamed; calls and results in messages."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from dynamoe.dynamic.text.tokenizer import Tokenizer
from dynamoe.serve.errors import ApiError
from dynamoe.serve.request_checks import plain_messages
from dynamoe.serve.text import TextPool
from dynamoe.serve.tool_calls import CallReader
from dynamoe.serve.tool_messages import with_text_arguments
from dynamoe.serve.tools import calls_schema, plain_tools, tool_use
from dynamoe.serve.wire.openai import ChatCompletionRequest
from dynamoe.serve.wire.openai_answers import ChatCompletionChunk, ChatCompletionResponse
from hypothesis import given, settings
from hypothesis import strategies as st
from structured_schemas import SMALL, closed

USER = {"role": "user", "content": "What is the weather?"}
WEATHER = closed({"city": {"enum": ["Paris", "Rome"]}, "days": SMALL})
TREE = {
    "$defs": {"node": closed({"value": SMALL, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}})},
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/node"}},
    "required": ["root"],
    "additionalProperties": False,
}
PARAMETERS: dict[str, Any] = {
    "weather": WEATHER,
    "plant": TREE,
    "now": {"type": "object", "additionalProperties": False},
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "description": f"the {name}", "parameters": parameters}}
    for name, parameters in PARAMETERS.items()
]
TOOLS[2]["function"].pop("parameters")
ASK: dict[str, Any] = {"messages": [USER], "tools": TOOLS, "max_tokens": 400, "temperature": 1.0}


@pytest.fixture(scope="module")
def server(start_server: Any, make_checkpoint: Callable[..., Path]) -> Any:
    """Of a model with room for tools that are said in words."""
    return start_server(make_checkpoint("mixtral", max_position_embeddings=4096))


@pytest.fixture(scope="module")
def http(server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def endings(http: httpx.Client) -> dict[str, float]:
    tokens = [http.post("/tokenize", json={"prompt": text}).json()["tokens"][0] for text in '"}],:']
    return {str(token): 4.0 for token in (*tokens, 2)}


def check_calls(calls: list[Any], allowed: set[str], most: int) -> None:
    assert 1 <= len(calls) <= most
    assert len({call["id"] for call in calls}) == len(calls)
    for call in calls:
        assert call["type"] == "function"
        assert call["id"].startswith("call_")
        assert call["function"]["name"] in allowed
        jsonschema.validate(json.loads(call["function"]["arguments"]), PARAMETERS[call["function"]["name"]])


CHOICES: list[tuple[dict[str, Any], set[str], int]] = [
    ({"tool_choice": "required"}, set(PARAMETERS), 16),
    ({"tool_choice": "required", "parallel_tool_calls": False}, set(PARAMETERS), 1),
    ({"tool_choice": {"type": "function", "function": {"name": "plant"}}}, {"plant"}, 1),
]


@pytest.mark.parametrize(
    ("choice", "allowed", "most"),
    CHOICES,
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value)[:60],
)
def test_required_and_named_functions_are_called(
    http: httpx.Client, endings: dict[str, float], choice: dict[str, Any], allowed: set[str], most: int
) -> None:
    body = {**ASK, **choice, "logit_bias": endings, "n": 3, "seed": 5}
    whole = http.post("/v1/chat/completions", json=body)
    assert whole.status_code == 200, whole.text
    ChatCompletionResponse.model_validate(whole.json())
    for answer in whole.json()["choices"]:
        assert (answer["finish_reason"], answer["message"]["content"]) == ("tool_calls", None)
        check_calls(answer["message"]["tool_calls"], allowed, most)
    streamed: list[dict[int, Any]] = [{}, {}, {}]
    reasons = [None] * 3
    with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    for line in lines[:-1]:
        ChatCompletionChunk.model_validate_json(line)
        for choice_ in json.loads(line)["choices"]:
            reasons[choice_["index"]] = choice_["finish_reason"] or reasons[choice_["index"]]
            for part in choice_["delta"].get("tool_calls", ()):
                calls = streamed[choice_["index"]]
                if part["index"] in calls:
                    assert set(part) == {"index", "function"}
                    calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
                else:
                    assert (part["type"], part["function"]["arguments"]) == ("function", "")
                    calls[part["index"]] = part
    assert reasons == ["tool_calls"] * 3
    for calls, answer in zip(streamed, whole.json()["choices"], strict=True):
        assert sorted(calls) == list(range(len(calls)))
        said = [calls[number]["function"] for number in sorted(calls)]
        assert said == [call["function"] for call in answer["message"]["tool_calls"]]


def test_a_tool_loop_with_openais_client(server: Any, endings: dict[str, float]) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        ask: Any = {"model": "tiny", "tools": TOOLS, "logit_bias": endings, "seed": 1, "max_tokens": 300}
        first = client.chat.completions.create(messages=[USER], tool_choice="required", **ask).choices[0]  # type: ignore
        assert first.finish_reason == "tool_calls"
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in first.message.tool_calls or ()
        ]
        assert results
        messages: Any = [USER, first.message, *results]
        ask |= {"max_tokens": 5, "tool_choice": "none"}
        assert client.chat.completions.create(messages=messages, **ask).choices[0].message.content is not None


def test_a_model_that_may_call_may_also_talk(http: httpx.Client) -> None:
    body = {**ASK, "max_tokens": 20, "seed": 2, "logit_bias": {"2": -100, "0": -100}}
    whole = http.post("/v1/chat/completions", json=body)
    assert whole.status_code == 200, whole.text
    (choice,) = whole.json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"]
    assert "tool_calls" not in choice["message"]
    lines = http.post("/v1/chat/completions", json={**body, "stream": True}).text.split("\n\n")[:-2]
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines]
    assert "".join(delta.get("content", "") for delta in deltas) == choice["message"]["content"]


def test_what_is_cut_off_ends_with_length(http: httpx.Client) -> None:
    body = {**ASK, "tool_choice": "required"}
    early = http.post("/v1/chat/completions", json={**body, "max_tokens": 3}).json()["choices"][0]
    assert early["finish_reason"] == "length"
    assert early["message"]["content"].startswith("[")
    named = {"tool_choice": {"type": "function", "function": {"name": "weather"}}}
    late = http.post("/v1/chat/completions", json={**body, **named, "max_tokens": 34}).json()["choices"][0]
    assert late["finish_reason"] == "length"
    assert '{"city":"'.startswith(late["message"]["tool_calls"][0]["function"]["arguments"].replace(" ", "")[:9])


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tool_choice": "auto", "response_format": {"type": "json_object"}}, "response_format", "exclude each other"),
        ({"echo": True}, "echo", "echo and tools exclude each other"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "tool_choice needs tools"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "must be none, auto, required or"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice", "must be none, auto, required or"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "no function 'x'"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "two functions 'weather'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "unlike 'a b'"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]},
            "tools",
            "object",
        ),
        ({"tool_choice": "required", "guided_regex": "a"}, "guided_regex", "exclude each other"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        tool_use(ChatCompletionRequest.model_validate({**ASK, **fields}))
    assert (caught.value.status_code, caught.value.param) == (400, param)
    assert message in caught.value.detail


def test_http_refuses_them_too(http: httpx.Client) -> None:
    function = {"name": "f", "parameters": {"type": "object", "not": {}}}
    tools = [{"type": "function", "function": function}]
    loose = http.post("/v1/chat/completions", json={**ASK, "tools": tools, "tool_choice": "required", "max_tokens": 2})
    assert (loose.status_code, loose.headers["x-structured-output-ignored"]) == (200, "not")
    tools = [{"type": "function", "function": {**function, "strict": True}}]
    strict = http.post("/v1/chat/completions", json={**ASK, "tools": tools, "tool_choice": "required"})
    assert (strict.status_code, strict.json()["error"]["param"]) == (400, "tools")
    many = http.post("/v1/chat/completions", json={**ASK, "tools": TOOLS * 50, "tool_choice": "required"})
    assert (many.status_code, many.json()["error"]["param"]) == (400, "tools")
    assert http.post("/v1/chat/completions", json={**ASK, "tool_choice": "none", "max_tokens": 2}).status_code == 200


ARGUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
CALLS = st.lists(
    st.tuples(st.sampled_from(["f", "g.h"]), st.dictionaries(st.text(max_size=5), ARGUMENTS, max_size=4)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(CALLS, st.data())
def test_calls_are_read_wherever_their_text_is_split(calls: list[tuple[str, Any]], data: st.DataObject) -> None:
    separators = data.draw(st.sampled_from([(",", ":"), (", ", ": ")]))
    text = json.dumps([{"name": n, "arguments": a} for n, a in calls], separators=separators, ensure_ascii=False)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)) | {0, len(text)})
    reader, parts = CallReader(), []
    for begin, end in itertools.pairwise(cuts):
        parts += reader.add(text[begin:end])
    assert [(call.name, json.loads(call.arguments)) for call in reader.calls] == calls
    for number, call in enumerate(reader.calls):
        assert [new for place, new, _ in parts if place == number].count(True) == 1
        assert "".join(more for place, _, more in parts if place == number) == call.arguments


def test_references_hold_where_parameters_are_moved() -> None:
    nested = {"type": "object", "$defs": {"a": SMALL}, "properties": {"x": {"$ref": "#/$defs/a"}, "$ref": SMALL}}
    nested["properties"]["y"] = {"$ref": "#"}
    nested["properties"] |= {name: {"$ref": "#/$defs/a"} for name in ("default", "enum", "const", "examples")}
    schema = calls_schema([{"name": "f", "parameters": nested}, {"name": "g", "parameters": nested}], 3)
    jsonschema.Draft202012Validator.check_schema(schema)
    call = {"name": "g", "arguments": {"x": 1, "y": {"x": 2}, "$ref": 3}}
    jsonschema.validate([call, {**call, "name": "f"}], schema)
    for wrong in ({"x": "a"}, {"y": {"x": "a"}}, {"$ref": "a"}, {"default": "a"}, {"y": {"enum": "a"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate([{"name": "f", "arguments": wrong}], schema)


@pytest.fixture
def pool(make_checkpoint: Any, tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    """``pool(template)(*messages)`` is the prompt of a conversation with tools."""
    pools = []

    def make(template: str) -> Any:
        for file in make_checkpoint("llama").glob("tokenizer*.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "chat_template.jinja").write_text(template)
        pools.append(TextPool(Tokenizer.from_directory(tmp_path), threads=1, max_characters=9000))

        def prompt(*messages: dict[str, Any]) -> str:
            body = ChatCompletionRequest.model_validate({**ASK, "messages": list(messages)})
            tools = plain_tools(body.tools or ())
            rendering = pools[-1].encode_chat(plain_messages(body.messages), tools=tools, **body.rendering)
            return asyncio.run(rendering)[0]

        return prompt

    yield make
    for pool in pools:
        pool.close()


CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    ],
}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "rain"}
READS = (
    "{% for t in tools %}{{ t.function.name }},{% endfor %}{% for m in messages %}{{ m.role }}:{{ m.content }};"
    "{% for c in m.tool_calls or [] %}{{ c.id }} {{ c.function.name }} CITY{% endfor %}{{ m.tool_call_id }}{% endfor %}"
)


def test_templates_read_tools_calls_and_results(pool: Callable[[str], Any]) -> None:
    expected = "weather,plant,now,user:What is the weather?;assistant:;call_1 weather Rometool:rain;call_1"
    for city in (
        "c.function.arguments.city",
        "(c.function.arguments | tojson)[10:14]",
        "('x' + c.function.arguments)[11:15]",
    ):
        assert pool(READS.replace("CITY", f"{{{{ {city} }}}}"))(USER, CALLED, RESULT) == expected


def test_arguments_as_text_are_those_that_were_sent() -> None:
    sent = ['{"city": "Köln"}', "not JSON", '["a"]', '"a"']
    function = CALLED["tool_calls"][0]
    calls = [{**function, "function": {"name": "weather", "arguments": text}} for text in sent]
    body = ChatCompletionRequest.model_validate({**ASK, "messages": [USER, {**CALLED, "tool_calls": calls}]})
    (_, message) = with_text_arguments(plain_messages(body.messages))
    assert [call["function"]["arguments"] for call in message["tool_calls"]] == sent


def test_tools_that_must_not_be_called_are_not_tokenised(http: httpx.Client) -> None:
    def count(**fields: Any) -> int:
        return http.post("/tokenize", json={"messages": [USER], **fields}).json()["count"]

    assert count(tools=TOOLS, tool_choice="none") == count() < count(tools=TOOLS)


def test_templates_that_do_not_read_tools_get_them_in_words(pool: Callable[[str], Any]) -> None:
    plain = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    text = pool(plain)(USER)
    assert text.startswith('system:You may call these functions:\n{"name": "weather", "description"')
    assert text.endswith("user:What is the weather?;")
    text = pool(plain)({"role": "system", "content": "Be kind."}, USER)
    assert text.startswith("system:Be kind.\n\nYou may call")
