"""Reasoning over HTTP, the Responses API and the Messages API: their official clients against a real server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import jsonschema
import openai
import pytest
from conftest import CHAT_TEMPLATE
from dynamoe.serve.response_store import ResponseStore
from dynamoe.serve.wire.messages import MessageAnswer, MessageErrorResponse
from dynamoe.serve.wire.openai_answers import ChatCompletionChunk, ChatCompletionResponse
from dynamoe.serve.wire.responses import Response
from structured_schemas import SMALL, closed

KEYS = ("alice", "bob")
THINKING = CHAT_TEMPLATE.replace("{% endif %}", "{{ '<think>\n' if enable_thinking is not false }}{% endif %}").replace(
    "message['content']",
    "(('<think>\n' + message['reasoning_content'] + '\n</think>\n\n') if message['reasoning_content'] else '')"
    " + (message['content'] or '') + ((message['tool_calls'] | string) if message['tool_calls'] else '')",
)
CITY = closed({"city": {"enum": ["Paris", "Rome"]}, "days": SMALL})
USER = {"role": "user", "content": "What is the weather?"}


@pytest.fixture(scope="module")
def server(start_server: Any, make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a model whose chat template opens a block of reasoning."""
    directory = tmp_path_factory.mktemp("thinking") / "model"
    shutil.copytree(make_checkpoint("mixtral", max_position_embeddings=4096), directory)
    (directory / "chat_template.jinja").write_text(THINKING)
    return start_server(directory, f"server.api_keys=[{','.join(KEYS)}]", "server.limits.max_stored_responses=3")


@pytest.fixture(scope="module")
def http(server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120, headers={"Authorization": "Bearer alice"}) as client:
        yield client


@pytest.fixture(scope="module")
def endings(http: httpx.Client) -> dict[str, float]:
    """Biases with which random models end what they write, but do not end an answer by themselves."""
    tokens = [http.post("/tokenize", json={"prompt": text}).json()["tokens"][0] for text in '"}],:']
    return {**{str(token): 4.0 for token in tokens}, "2": -100, "0": -100}


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": CITY}}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": CITY}}], "tool_choice": "required"},
        pytest.param(
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": CITY}}]}, marks=pytest.mark.slow
        ),
    ],
    ids=["text", "form", "required", "auto"],
)
def test_reasoning_is_split_off_and_ends_with_its_budget(
    http: httpx.Client, endings: dict[str, float], fields: dict[str, Any]
) -> None:
    body = {"messages": [USER], "max_tokens": 120, "n": 2, "seed": 1, "temperature": 1, "thinking_token_budget": 9}
    body |= {"logit_bias": endings, **fields}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    whole = ChatCompletionResponse.model_validate(answer.json())
    assert whole.usage.completion_tokens_details is not None
    closing = len(http.post("/tokenize", json={"prompt": "\n</think>"}).json()["tokens"])
    assert 2 * (9 + closing) <= whole.usage.completion_tokens_details.reasoning_tokens <= 2 * (12 + closing)
    streamed: list[dict[str, Any]] = [{}, {}]
    for chunk in chunks(http.post("/v1/chat/completions", json={**body, "stream": True})):
        ChatCompletionChunk.model_validate(chunk)
        for choice in chunk["choices"]:
            said = streamed[choice["index"]]
            for name, value in choice["delta"].items():
                if name == "tool_calls":
                    value = "".join(call["function"]["arguments"] for call in value)
                said[name] = said.get(name, "") + value
    for choice, said in zip(whole.choices, streamed, strict=True):
        message = choice.message
        assert message.reasoning
        assert message.reasoning == message.reasoning_content == said["reasoning"] == said["reasoning_content"]
        assert "think>" not in message.reasoning + (message.content or "")
        assert (message.content or "") == said["content"]
        if "response_format" in fields:
            jsonschema.validate(json.loads(message.content or ""), CITY)
        if "tool_choice" in fields:
            assert message.content is None
            arguments = [call.function.arguments for call in message.tool_calls or ()]
            assert said["tool_calls"] == "".join(arguments)
            jsonschema.validate(json.loads(arguments[0]), CITY)
    hidden = http.post("/v1/chat/completions", json={**body, "include_reasoning": False}).json()["choices"]
    assert [choice["message"].get("reasoning") for choice in hidden] == [None, None]
    assert [choice["message"]["content"] for choice in hidden] == [choice.message.content for choice in whole.choices]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"thinking": True}}, "chat_template_kwargs"),
        ({"thinking_token_budget": -2}, "thinking_token_budget"),
    ],
    ids=str,
)
def test_what_the_template_cannot_honour_is_named(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    answer = http.post("/v1/chat/completions", json={"messages": [USER], **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_reasoning_that_is_off_is_content(http: httpx.Client) -> None:
    body = {"messages": [USER], "max_tokens": 9, "temperature": 0, "chat_template_kwargs": {"enable_thinking": False}}
    answer = http.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"]
    assert "reasoning" not in answer["choices"][0]["message"]
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


@pytest.fixture
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="alice", max_retries=0) as client:
        yield client


def test_a_conversation_with_openais_responses(
    client: openai.OpenAI, http: httpx.Client, endings: dict[str, float]
) -> None:
    tools: Any = [{"type": "function", "name": "weather", "parameters": CITY, "strict": True}]
    extra = {"logit_bias": endings, "seed": 1, "thinking_token_budget": 6, "quality": "exact"}
    ask: Any = {"model": "tiny", "tools": tools, "max_output_tokens": 200, "extra_body": extra}
    with client.responses.stream(
        input="What is the weather?", instructions="Be brief.", tool_choice="required", parallel_tool_calls=False, **ask
    ) as stream:
        events = list(stream)
        first = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [events[0].type, events[1].type, events[-1].type] == [
        "response.created", "response.in_progress", "response.completed",
    ]  # fmt: skip
    assert first.output[0].type == "reasoning"
    call = first.output[1]
    assert call.type == "function_call"
    jsonschema.validate(json.loads(call.arguments), CITY)
    raw = http.get(f"/v1/responses/{first.id}").json()
    Response.model_validate(raw)
    assert raw["usage"]["compute"]["quality"] == "exact"
    assert raw["usage"]["output_tokens_details"]["reasoning_tokens"] > 6
    assert [item["id"] for item in raw["output"]] == [item.model_dump()["id"] for item in first.output]
    assert client.responses.retrieve(first.id).status == "completed"
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    second = client.responses.create(
        previous_response_id=first.id, input=[result], tool_choice="none", **{**ask, "max_output_tokens": 30}
    )
    assert second.status == "incomplete"
    assert second.incomplete_details is not None
    assert second.incomplete_details.reason == "max_output_tokens"
    assert second.output_text
    # The same conversation without the server's memory has the same prompt.
    items: Any = [USER, *(item.model_dump(exclude_none=True) for item in first.output), result]
    stateless = client.responses.create(
        input=items, tool_choice="none", store=False, **{**ask, "max_output_tokens": 30}
    )
    assert stateless.output_text == second.output_text
    assert second.usage is not None
    assert stateless.usage is not None
    assert stateless.usage.input_tokens == second.usage.input_tokens
    client.responses.delete(first.id)
    for gone in (first.id, stateless.id, "resp_0"):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(gone)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(previous_response_id=first.id, input="?", **ask)
    with openai.OpenAI(base_url=client.base_url, api_key="bob", max_retries=0) as other:
        with pytest.raises(openai.NotFoundError):
            other.responses.retrieve(second.id)
        with pytest.raises(openai.NotFoundError):
            other.responses.delete(second.id)
    assert len(second.id) > len("resp_") + 128 // 4
    short = client.responses.create(model="tiny", input="Where?", max_output_tokens=3)
    assert [(item.type, short.status) for item in short.output] == [("reasoning", "incomplete")]
    client.responses.create(model="tiny", input="And?", previous_response_id=short.id, max_output_tokens=3)
    parsed: Any = {"format": {"type": "json_schema", "name": "city", "strict": True, "schema": CITY}}
    formed = client.responses.create(model="tiny", input="Where?", text=parsed, extra_body=extra, top_logprobs=1)
    jsonschema.validate(json.loads(formed.output_text), CITY)
    assert formed.output[-1].content[0].logprobs  # type: ignore[union-attr]


def test_a_conversation_with_anthropics_client(server: Any, http: httpx.Client, endings: dict[str, float]) -> None:
    tools: Any = [{"name": "weather", "input_schema": CITY}]
    any_tool: Any = {"type": "any", "disable_parallel_tool_use": True}
    ask: Any = {"model": "tiny", "max_tokens": 200, "system": "Be brief.", "tools": tools}
    ask |= {"thinking": {"type": "enabled", "budget_tokens": 6}, "extra_body": {"logit_bias": endings, "seed": 1}}
    with anthropic.Anthropic(base_url=server.url, api_key="alice", max_retries=0) as client:
        with client.messages.stream(messages=[USER], tool_choice=any_tool, **ask) as stream:  # type: ignore
            first = stream.get_final_message()
        whole = client.messages.create(messages=[USER], tool_choice=any_tool, **ask)  # type: ignore
        assert first.stop_reason == whole.stop_reason == "tool_use"
        assert [block.type for block in first.content][:2] == ["thinking", "tool_use"]
        for a, b in zip(first.content, whole.content, strict=True):
            assert {**a.model_dump(), "id": 0} == {**b.model_dump(), "id": 0}
        call = first.content[1]
        assert call.type == "tool_use"
        jsonschema.validate(call.input, CITY)
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
        calls = {block.id for block in first.content if block.type == "tool_use"}
        results = [{**result, "tool_use_id": name} for name in sorted(calls)]
        turns: Any = [USER, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
        ask |= {"max_tokens": 40, "tool_choice": {"type": "none"}}
        second = client.messages.create(messages=turns, **ask)
        assert (second.stop_reason, second.usage.output_tokens) == ("max_tokens", 40)
        assert second.content[-1].type == "text"
        counted = client.messages.count_tokens(
            model="tiny", messages=turns, system="Be brief.", tools=tools, tool_choice={"type": "none"}
        )
        assert counted.input_tokens == second.usage.input_tokens + (second.usage.cache_read_input_tokens or 0)
        letter = second.content[-1].text[3]
        stopped = client.messages.create(messages=turns, stop_sequences=[letter], **ask)
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", letter)
        image: Any = {"type": "image", "source": {"type": "url", "url": "http://x"}}
        with pytest.raises(anthropic.BadRequestError, match="image"):
            client.messages.create(messages=[{"role": "user", "content": [image]}], **ask)
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(messages=[USER], **{**ask, "model": "other"})  # type: ignore
    with (
        anthropic.Anthropic(base_url=server.url, api_key="eve", max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError) as caught,
    ):
        stranger.messages.create(messages=[USER], **ask)  # type: ignore
    MessageErrorResponse.model_validate(caught.value.body)
    raw = http.post("/v1/messages", json={"messages": [USER], "max_tokens": 3, "quality": "exact"})
    assert MessageAnswer.model_validate(raw.json()).usage.compute is not None


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("responses", {"background": True}, "background"),
    ("responses", {"tools": [{"type": "web_search"}]}, "web_search"),
    ("responses", {"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
    ("responses", {"input": []}, "input"),
    ("responses", {"include": ["file_search_call.results"]}, "file_search_call"),
    ("responses", {"reasoning": {"effort": "high"}}, "reasoning"),
    ("responses", {"reasoning": {"summary": "detailed"}}, "summary"),
    ("responses", {"text": {"verbosity": "low"}}, "verbosity"),
    ("responses", {"text": {"format": {"type": "x"}}}, "text"),
    ("responses", {"n": 2}, "n must be 1"),
    ("responses", {"metadata": {"a": 1}}, "metadata"),
    ("responses", {"stream": True, "stream_options": {"include_compute": True}}, "stream_options"),
    ("responses", {"max_output_tokens": 100_000}, "context_length_exceeded"),
    ("messages", {"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash_20250124"),
    ("messages", {"tool_choice": {"type": "tool"}, "tools": [{"name": "f"}]}, "name"),
    ("messages", {"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ("messages", {"output_config": {"effort": "high"}}, "output_config"),
    ("messages", {"output_config": {"format": {"type": "text"}}}, "output_config"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a"}]}]}, "tool_use"),
    ("messages", {"max_tokens": 100_000}, "context_length_exceeded"),
    ("messages", {"stop_sequences": [""]}, "stop"),
    ("messages/count_tokens", {"messages": []}, "messages"),
]


@pytest.mark.parametrize(("path", "fields", "named"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_is_not_supported_is_named(http: httpx.Client, path: str, fields: dict[str, Any], named: str) -> None:
    valid = {"input": "hi"} if path == "responses" else {"messages": [USER], "max_tokens": 5}
    answer = http.post(f"/v1/{path}", json={**valid, **fields})
    assert answer.status_code == 400, answer.text
    if path == "responses":
        assert set(answer.json()) == {"error"}
    else:
        assert MessageErrorResponse.model_validate(answer.json()).error.type == "invalid_request_error"
    assert named in answer.text


@pytest.mark.parametrize("value", ["1e999", '"\\ud800"'])
def test_what_an_answer_cannot_repeat_is_refused(http: httpx.Client, value: str) -> None:
    headers = {"Content-Type": "application/json"}
    tools = [{"type": "function", "name": "f", "parameters": {"type": "object", "default": "VALUE"}}]
    calls = [{"type": "tool_use", "id": "a", "name": "f", "input": {"x": "VALUE"}}]
    messages = [USER, {"role": "assistant", "content": calls}]
    for path, body, status in (
        ("responses", {"input": "a", "tools": tools, "max_output_tokens": 1}, 400),
        ("messages", {"messages": messages, "max_tokens": 1}, 200 if value == "1e999" else 400),
    ):
        content = json.dumps(body).replace('"VALUE"', value)
        assert http.post(f"/v1/{path}", content=content, headers=headers).status_code == status


def test_errors_from_everywhere_are_anthropics(server: Any, http: httpx.Client) -> None:
    kinds = {
        405: http.get("/v1/messages"),
        400: http.post("/v1/messages", content="x"),
        401: httpx.post(f"{server.url}/v1/messages/", json={}),
        404: http.get("/v1/messages/batches"),
    }
    for status, answer in kinds.items():
        assert answer.status_code == status
        assert MessageErrorResponse.model_validate(answer.json()).request_id == answer.headers["x-request-id"]


@pytest.mark.parametrize("path", ["responses", "messages"])
def test_a_client_that_leaves_ends_its_request(server: Any, http: httpx.Client, path: str) -> None:
    bodies = {
        "responses": {"input": "hi", "max_output_tokens": 3000},
        "messages": {"messages": [USER], "max_tokens": 3000},
    }
    marker = f"leaves-{path}"
    body = {**bodies[path], "stream": True, "ignore_eos": True}
    with http.stream("POST", f"/v1/{path}", json=body, headers={"x-request-id": marker}) as stream:
        next(stream.iter_bytes())
    assert "client_gone" in server.logged(marker)


def test_the_store_is_bounded_and_owners_do_not_displace_each_other() -> None:
    store = ResponseStore(max_count=3, max_bytes=1000)
    for number in range(5):
        store.put("a", {"id": f"a{number}"}, [])
    store.put("b", {"id": "b0"}, [])
    assert [store.get("a", f"a{number}") is not None for number in range(5)] == [False, False, False, True, True]
    assert store.get("b", "b0") is not None
    assert store.get("a", "b0") is None
    store.put("a", {"id": "large", "text": "x" * 2000}, [])
    assert store.get("a", "large") is None
    store.put("a", {"id": "half", "text": "x" * 990}, [])
    assert store.get("b", "b0") is None or store.size <= 1000
    assert store.delete("a", "a4") in (True, False)
    while store.count:
        for owner in ("a", "b"):
            for name in ("half", "a3", "a4", "b0"):
                store.delete(owner, name)
    assert (store.count, store.size) == (0, 0)
