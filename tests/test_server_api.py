"""OpenAI's own client and plain HTTP against a real server process with a tiny model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from dynamoe.dynamic.text.tokenizer import Tokenizer
from dynamoe.serve.wire.openai_answers import (
    ChatCompletionChunk,
    ChatCompletionResponse,
    CompletionResponse,
    ModelList,
    TokenizerInfo,
)
from prometheus_client.parser import text_string_to_metric_families

PROMPT = "The capital of France is"
MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(make_checkpoint: Callable[..., Path]) -> Tokenizer:
    return Tokenizer.from_directory(make_checkpoint("mixtral"))


def events(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """All events of a stream, which must end with [DONE]."""
    with http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_models(client: openai.OpenAI, http: httpx.Client) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    ModelList.model_validate(http.get("/v1/models").json())
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("some/other")
    assert caught.value.code == "model_not_found"


def test_completion_equals_transformers(
    client: openai.OpenAI,
    make_checkpoint: Callable[..., Path],
    reference_model: Callable[[Path], Any],
    tokenizer: Tokenizer,
) -> None:
    import torch

    ids = tokenizer.encode(PROMPT)
    expected = reference_model(make_checkpoint("mixtral")).generate(
        torch.tensor([ids]), max_new_tokens=24, min_new_tokens=24, do_sample=False
    )[0, len(ids) :]
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, temperature=0, max_tokens=24, extra_body={"min_tokens": 24}
    )
    assert answer.choices[0].text == tokenizer.decode(expected.tolist())
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 24)
    assert answer.usage.total_tokens == len(ids) + 24


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.0, "seed": 7}], ids=str)
def test_streamed_text_equals_whole_text(client: openai.OpenAI, settings: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 40, "n": 2, "extra_body": {"ignore_eos": True}, **settings}
    whole = client.completions.create(prompt=[PROMPT, "One, two,"], **asked)
    texts = {choice.index: "" for choice in whole.choices}
    reasons: dict[int, str | None] = {}
    chunks = client.completions.create(
        prompt=[PROMPT, "One, two,"], stream=True, stream_options={"include_usage": True}, **asked
    )
    usage = None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert sorted(texts) == [0, 1, 2, 3]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens == 160

    chat = client.chat.completions.create(messages=MESSAGES, **asked)
    texts = {choice.index: "" for choice in chat.choices}
    for chunk in client.chat.completions.create(messages=MESSAGES, stream=True, **asked):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {choice.index: choice.message.content for choice in chat.choices}


def test_chat_is_the_completion_of_the_rendered_template(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    rendered = tokenizer.encode(tokenizer.chat_prompt(MESSAGES), add_special_tokens=False)
    asked: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 12}
    chat = client.chat.completions.create(messages=MESSAGES, **asked)
    plain = client.completions.create(prompt=rendered, **asked)
    assert chat.choices[0].message.content == plain.choices[0].text
    assert chat.choices[0].message.role == "assistant"
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == len(rendered)
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
    again = client.chat.completions.create(messages=parts, **asked)
    assert again.choices[0].message.content == chat.choices[0].message.content


def test_answers_have_the_documented_shape(http: httpx.Client) -> None:
    completion = {"prompt": [PROMPT, "a"], "max_tokens": 3, "logprobs": 2, "n": 2}
    answer = http.post("/v1/completions", json={**completion, "prompt_logprobs": 1})
    assert len(CompletionResponse.model_validate(answer.json()).choices) == 4
    for event in events(http, "/v1/completions", {**completion, "echo": True}):
        CompletionResponse.model_validate(event)
    chat = {"messages": MESSAGES, "max_tokens": 3, "logprobs": True, "top_logprobs": 2, "n": 2}
    answer = http.post("/v1/chat/completions", json={**chat, "prompt_logprobs": 1})
    whole = ChatCompletionResponse.model_validate(answer.json())
    assert whole.id.startswith("chatcmpl-")
    assert whole.prompt_logprobs is not None
    assert whole.prompt_logprobs[0] is None
    chunks = [
        ChatCompletionChunk.model_validate(event)
        for event in events(http, "/v1/chat/completions", {**chat, "stream_options": {"include_usage": True}})
    ]
    first = {chunk.choices[0].index: chunk for chunk in reversed(chunks) if chunk.choices}
    assert [first[index].choices[0].delta.role for index in (0, 1)] == ["assistant", "assistant"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat_logprobs(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 8}
    whole = client.chat.completions.create(logprobs=True, top_logprobs=3, **asked).choices[0]
    assert whole.logprobs is not None
    assert whole.logprobs.content is not None
    assert len(whole.logprobs.content) == 8
    for position in whole.logprobs.content:
        assert len(position.top_logprobs) == 3
        best = position.top_logprobs[0]
        assert (best.token, best.logprob) == (position.token, position.logprob)  # greedy
        assert position.logprob <= 0
        assert [p.logprob for p in position.top_logprobs] == sorted(p.logprob for p in position.top_logprobs)[::-1]
        assert position.bytes is not None
        if not position.token.startswith("token_id:"):
            assert bytes(position.bytes).decode() == position.token
    streamed = [
        position.logprob
        for chunk in client.chat.completions.create(logprobs=True, top_logprobs=3, stream=True, **asked)
        for position in (chunk.choices[0].logprobs.content or [] if chunk.choices[0].logprobs else [])
    ]
    assert streamed == pytest.approx([position.logprob for position in whole.logprobs.content], abs=1e-5)
    bare = client.chat.completions.create(logprobs=True, **asked).choices[0]
    assert bare.logprobs is not None
    assert bare.logprobs.content is not None
    assert bare.logprobs.content[0].top_logprobs == []
    assert client.chat.completions.create(**asked).choices[0].logprobs is None


def test_bytes_and_offsets_of_tokens_that_are_parts_of_characters(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    asked: dict[str, Any] = {"model": "tiny", "temperature": 2.0, "max_tokens": 60, "extra_body": {"ignore_eos": True}}
    special = {tokenizer.token_text(token) for token in tokenizer.special_ids}
    parts = 0
    for seed in range(3):
        chat = client.chat.completions.create(messages=MESSAGES, logprobs=True, seed=seed, **asked).choices[0]
        assert chat.logprobs is not None
        data = [bytes(p.bytes or []) for p in chat.logprobs.content or [] if p.token not in special]
        assert b"".join(data).decode(errors="replace") == chat.message.content
        choice = client.completions.create(prompt="the ☃ naïve", logprobs=0, echo=True, seed=seed, **asked).choices[0]
        assert choice.logprobs is not None
        assert choice.logprobs.text_offset == sorted(choice.logprobs.text_offset or [])
        for token, offset in zip(choice.logprobs.tokens or [], choice.logprobs.text_offset or [], strict=True):
            if token.startswith("token_id:"):
                parts += 1
            elif token not in special:
                assert choice.text[offset : offset + len(token)] == token
    assert parts > 10


def test_offsets_lie_in_a_text_that_a_stop_string_has_cut(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 60, "ignore_eos": True, "logprobs": 0}
    text = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    cut = http.post("/v1/completions", json={**body, "stop": text[20:26]}).json()["choices"][0]
    assert max(cut["logprobs"]["text_offset"]) <= len(cut["text"]) < 26


def test_a_conversation_that_continues_its_last_message(http: httpx.Client, tokenizer: Tokenizer) -> None:
    body = {"messages": [*MESSAGES, {"role": "assistant", "content": "The capital"}], "continue_final_message": True}
    counted = http.post("/tokenize", json=body).json()["tokens"]
    assert tokenizer.decode(counted, False).endswith("<|im_start|>assistant\nThe capital")
    asked = {**body, "temperature": 0, "max_tokens": 6, "ignore_eos": True}
    path = "/v1/chat/completions"
    plain = http.post(path, json=asked).json()
    assert plain["usage"]["prompt_tokens"] == len(counted)
    echoed = {**asked, "echo": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    chunks = [ChatCompletionChunk.model_validate(chunk) for chunk in events(http, path, echoed)]
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == "The capital" + plain["choices"][0]["message"]["content"]
    usages = [(chunk.usage.prompt_tokens, chunk.usage.completion_tokens) for chunk in chunks if chunk.usage]
    assert len(usages) == len(chunks)
    assert usages == sorted(usages)
    assert usages[-1] == (len(counted), 6)
    whole = http.post(path, json={**asked, "echo": True}).json()
    assert whole["choices"][0]["message"]["content"] == said


def test_a_context_error_is_recognised(client: openai.OpenAI) -> None:
    long: Any = [{"role": "user", "content": "hello " * 400}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="This model's maximum context length is 512 tokens") as caught:
            client.chat.completions.create(model="tiny", messages=long, stream=stream)
        assert caught.value.code == "context_length_exceeded"
        assert "context_length_exceeded" in caught.value.message


@pytest.mark.parametrize(
    "field",
    [
        {"tools": [{}]},
        {"chat_template": "{{ 1 }}"},
        {"documents": [{}]},
        {"truncate_prompt_tokens": 3},
        {"reasoning_effort": "low"},
    ],
    ids=str,
)
def test_tokenize_refuses_what_would_change_the_prompt(http: httpx.Client, field: dict[str, Any]) -> None:
    answer = http.post("/tokenize", json={"messages": MESSAGES, **field})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, *field)
    assert http.post("/tokenize", json={"messages": MESSAGES, "temperature": 1, "max_tokens": 3}).status_code == 200


def test_echo_scores_the_prompt_as_transformers_does(
    client: openai.OpenAI,
    make_checkpoint: Callable[..., Path],
    reference_model: Callable[[Path], Any],
    tokenizer: Tokenizer,
) -> None:
    import torch

    prompts = [tokenizer.encode(PROMPT), tokenizer.encode("There is a house in the middle")]
    answer = client.completions.create(
        model="tiny", prompt=prompts, temperature=0, max_tokens=1, logprobs=1, echo=True, seed=1234
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for ids, choice in zip(prompts, answer.choices, strict=True):
        logits = reference_model(make_checkpoint("mixtral"))(torch.tensor([ids])).logits[0]
        logprobs = logits.log_softmax(-1)
        assert choice.logprobs is not None
        values, top = choice.logprobs.token_logprobs, choice.logprobs.top_logprobs
        assert values is not None
        assert top is not None
        assert len(values) == len(top) == len(ids) + 1
        assert (values[0], top[0]) == (None, None)
        expected = [logprobs[i, token].item() for i, token in enumerate(ids[1:])]
        assert values[1:-1] == pytest.approx(expected, abs=1e-3)
        best = [max(position.values()) for position in top[1:] if position is not None]
        assert best == pytest.approx(logprobs.max(-1).values.tolist(), abs=1e-3)
        assert choice.text.startswith(tokenizer.decode(ids))
        assert choice.logprobs.text_offset is not None
        first, second = tokenizer.token_text(ids[0]), tokenizer.token_text(ids[1])
        assert choice.logprobs.text_offset[:3] == [0, len(first), len(first) + len(second)]
    scored_only = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=0, logprobs=0, echo=True)
    choice = scored_only.choices[0]
    assert choice.text == PROMPT
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert "".join(choice.logprobs.tokens) == PROMPT
    assert scored_only.usage is not None
    assert scored_only.usage.completion_tokens == 0


def test_streamed_echo_equals_whole_echo(http: httpx.Client) -> None:
    body = {"prompt": [[5, 6, 7, 200], [8, 9]], "echo": True, "logprobs": 2, "temperature": 0, "max_tokens": 5}
    whole = http.post("/v1/completions", json=body).json()["choices"]
    for choice in whole:
        pieces = [
            piece
            for event in events(http, "/v1/completions", body)
            for piece in event["choices"]
            if piece["index"] == choice["index"]
        ]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        for name in ("tokens", "text_offset"):
            assert [x for piece in pieces for x in piece["logprobs"][name]] == choice["logprobs"][name]


def test_stops(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 60}
    more: dict[str, Any] = {"ignore_eos": True}
    text = client.completions.create(**asked, extra_body=more).choices[0].text
    stop = text[20:24]
    cut = client.completions.create(**asked, stop=[stop, "never"], extra_body=more).choices[0]
    assert cut.text == text[: text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.model_dump()["stop_reason"] == stop
    kept = client.completions.create(**asked, stop=stop, extra_body={**more, "include_stop_str_in_output": True})
    assert kept.choices[0].text == text[: text.index(stop) + len(stop)]
    streamed = client.completions.create(**asked, stop=stop, stream=True, extra_body=more)
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == cut.text
    logprobs = client.completions.create(**asked, logprobs=0, extra_body=more).choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.tokens or []) == 60


def test_sampling_extras(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 16, "temperature": 1.5}

    def texts(**settings: Any) -> list[str]:
        extra = {"ignore_eos": True, **settings.pop("extra_body", {})}
        return [c.text for c in client.completions.create(**{**asked, **settings}, extra_body=extra).choices]

    assert texts(seed=1) == texts(seed=1) != texts(seed=2)
    assert len(set(texts(seed=1, n=4))) > 1
    greedy = texts(temperature=0)
    assert texts(seed=1, extra_body={"top_k": 1}) == greedy
    assert texts(seed=1, extra_body={"min_p": 1.0}) == greedy
    forced = tokenizer.encode("z", add_special_tokens=False)[0]
    assert texts(logit_bias={str(forced): 100}) == ["z" * 16]
    assert texts(temperature=0, extra_body={"repetition_penalty": 5.0}) != greedy
    bias = {str(forced): 100}
    stopped = client.completions.create(**asked, logit_bias=bias, extra_body={"stop_token_ids": [forced]})
    assert stopped.choices[0].finish_reason == "stop"
    ended = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=9, logit_bias={"2": 100})
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")
    longest = client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body={"ignore_eos": True})
    assert longest.usage is not None
    assert longest.usage.total_tokens == 512  # no limit asked for: up to the model's maximum length
    assert longest.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("settings", "error", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"max_tokens": 600}, openai.BadRequestError, "max_tokens"),
        ({"temperature": 101}, openai.BadRequestError, "temperature"),
        ({"logprobs": 21}, openai.BadRequestError, "logprobs"),
        ({"stream": True, "prompt": "a" * 5000}, openai.BadRequestError, "prompt"),
        ({"extra_body": {"min_tokens": 17}}, openai.BadRequestError, "min_tokens"),
        ({"extra_body": {"guided_json": []}}, openai.BadRequestError, "guided_json"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors_are_the_clients_own_exceptions(
    client: openai.OpenAI, settings: dict[str, Any], error: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(error) as caught:
        client.completions.create(**{"model": "tiny", "prompt": PROMPT, **settings})
    assert caught.value.param == param
    assert caught.value.type in ("invalid_request_error", "not_found_error")
    assert isinstance(caught.value.body, dict)
    assert set(caught.value.body) == {"message", "type", "param", "code"}


def test_tokenize_and_back(http: httpx.Client, tokenizer: Tokenizer) -> None:
    answer = http.post("/tokenize", json={"prompt": PROMPT, "return_token_strs": True}).json()
    assert answer["tokens"] == tokenizer.encode(PROMPT)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": PROMPT}
    chat = http.post("/tokenize", json={"messages": MESSAGES}).json()
    assert chat["tokens"] == tokenizer.encode(tokenizer.chat_prompt(MESSAGES), add_special_tokens=False)
    assert http.post("/detokenize", json={"tokens": [2], "skip_special_tokens": True}).json() == {"prompt": ""}
    assert http.post("/detokenize", json={"tokens": [320]}).status_code == 400
    assert http.post("/tokenize", json={}).status_code == 400
    info = TokenizerInfo.model_validate(http.get("/tokenizer_info").json())
    assert (info.eos_token, info.model_max_length) == ("<|im_end|>", 512)


def test_prefix_cache_shows_in_usage_and_salts_keep_it_apart(http: httpx.Client) -> None:
    body = {"prompt": list(range(3, 83)), "max_tokens": 1}

    def cached(**more: Any) -> int:
        answer = http.post("/v1/completions", json={**body, **more}).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached(cache_salt="a"), cached(cache_salt="a"), cached(cache_salt="b")] == [0, 64, 0]


def test_request_ids(http: httpx.Client, server: Any) -> None:
    answer = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    line = server.logged('request_id="mine-1"')
    assert "status=200" in line
    assert "completion_tokens=1" in line
    given = http.get("/version", headers={"x-request-id": 'bad id"'}).headers["x-request-id"]
    assert given != 'bad id"'
    assert http.get("/nowhere").headers["x-request-id"]


def test_metrics_are_prometheus_and_count(http: httpx.Client) -> None:
    def sample(name: str, **labels: str) -> float:
        text = http.get("/metrics").text
        found = [
            s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
            if s.name == name and labels.items() <= s.labels.items()
        ]
        assert found, name
        return sum(found)

    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:e2e_request_latency_seconds_count")
    before = [sample(name) for name in names]
    finished = sample("vllm:request_success_total", finished_reason="length")
    http.post("/v1/completions", json={"prompt": [5, 6, 7], "max_tokens": 4, "n": 2, "ignore_eos": True})
    assert [sample(name) - value for name, value in zip(names, before, strict=True)] == [3, 8, 1]
    assert sample("vllm:request_success_total", finished_reason="length") == finished + 2
    for histogram in ("time_to_first_token", "inter_token_latency", "request_queue_time", "request_prefill_time"):
        assert sample(f"vllm:{histogram}_seconds_count") > 0
        assert math.isfinite(sample(f"vllm:{histogram}_seconds_sum"))
    assert sample("vllm:num_requests_running") == sample("vllm:num_requests_waiting") == 0
    assert sample("vllm:kv_cache_usage_perc") == 0
    assert sample("dynamoe:kv_group_bytes", window="all") > sample("dynamoe:kv_group_bytes_held", window="all") == 0
    assert sample("dynamoe:engine_healthy") == 1
    assert 'route="unmatched"' in http.get("/metrics").text  # paths that clients invent are no labels


def test_the_page_needs_nothing_from_elsewhere(http: httpx.Client) -> None:
    page = http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert '<html lang="en">' in page.text


def test_openapi_declares_the_errors_that_happen(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    operation = document["paths"]["/v1/completions"]["post"]["responses"]
    assert set(operation) == {"200", "400", "401", "404", "408", "413", "429", "500", "503"}
    assert operation["400"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorResponse")
    assert not any("422" in o["responses"] for path in document["paths"].values() for o in path.values())
    assert http.get("/health").json() == {"status": "ok"}
    assert "access-control-allow-origin" not in http.get("/health", headers={"origin": "https://a.example"}).headers
