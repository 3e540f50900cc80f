"""What the server makes of a request before the engine sees it: limits, sampling settings, keys, errors."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from dynamoe.dynamic.text.tokenizer import Tokenizer
from dynamoe.serve.auth import KeyRing
from dynamoe.serve.errors import ApiError
from dynamoe.serve.json_body import BodyReader
from dynamoe.serve.request_checks import RequestChecks
from dynamoe.serve.sampling import sampling_params, with_length
from dynamoe.serve.settings import Limits, ServerSettings
from dynamoe.serve.text import TextPool
from dynamoe.serve.wire.openai import ChatCompletionRequest, CompletionRequest
from pydantic import BaseModel, ValidationError

CHECKS = RequestChecks(limits=Limits(max_tokens=100), vocab_size=320, served_model="tiny")


def read(model: type[BaseModel], /, **fields: Any) -> Any:
    """A body as the server reads it."""

    async def never(*_: Any) -> None:
        raise AssertionError("a small body is parsed where it is")

    reader = BodyReader(limits=CHECKS.limits, run=never)
    return asyncio.run(reader.read(model, json.dumps(fields).encode()))


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "hi", **fields})


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "hi"}], **fields})


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["1", "2"], ["1", "2"]),
        ([1.0, 2], [[1, 2]]),
        ([[1.0], ["2"]], [[1], [2]]),
    ],
)
def test_every_form_of_prompt_is_a_list_of_prompts(prompt: Any, expected: Any) -> None:
    assert CHECKS.completion(completion(prompt=prompt)) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 0},
        {"n": True},
        {"n": "two"},
        {"n": 2.5},
        {"n": 1e300},
        {"n": "9" * 5000},
        {"seed": 2**63},
        {"temperature": True},
        {"temperature": "nan"},
        {"logit_bias": {"5": True}},
        {"stop_token_ids": [False]},
        {"quality": {"alpha": True}},
        {"prompt": [[5, True]]},
        {"prompt": [-1.0]},
        {"max_tokens": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0},
        {"top_k": -2},
        {"logprobs": -1},
        {"prompt_logprobs": -1},
        {"stop_token_ids": [-1]},
        {"logit_bias": {"5": 101}},
        {"logit_bias": {"5": float("nan")}},
        {"presence_penalty": 2.1},
        {"min_tokens": -1},
        {"priority": 2**31},
        {"prompt": [-1]},
        {"prompt": [[1], ["a"]]},
        {"prompt": [True]},
        {"prompt": "\ud800"},
        {"stop": ["\udfff"]},
        {"stream": 1},
        {"cache_salt": ""},
        {"stream_options": []},
    ],
    ids=str,
)
def test_fields_of_the_wrong_type_or_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        completion(**fields)


@pytest.mark.parametrize(
    ("sent", "read_as"),
    [
        ({"n": "2", "seed": 2.0, "max_tokens": "0"}, {"n": 2, "seed": 2, "max_tokens": 0}),
        ({"temperature": "0.5", "presence_penalty": "-1"}, {"temperature": 0.5, "presence_penalty": -1.0}),
        (
            {"stop_token_ids": ["5", 6.0], "logit_bias": {"5": "1.5"}},
            {"stop_token_ids": [5, 6], "logit_bias": {"5": 1.5}},
        ),
    ],
    ids=str,
)
def test_numbers_may_be_strings_and_integers_may_be_floats(sent: dict[str, Any], read_as: dict[str, Any]) -> None:
    body = read(CompletionRequest, prompt="hi", **sent)
    assert {name: getattr(body, name) for name in sent} == read_as


def test_long_prompts_of_ids_may_begin_with_a_float() -> None:
    assert CHECKS.completion(read(CompletionRequest, prompt=[1.0, *range(300)]))[0][:2] == [1, 0]


@pytest.mark.parametrize(
    ("fields", "param", "status"),
    [
        ({"model": "other"}, "model", 404),
        ({"n": 17}, "n", 400),
        ({"n": 16, "prompt": ["a"] * 17}, "n", 400),
        ({"prompt": ["a"] * 129}, "prompt", 400),
        ({"prompt": []}, "prompt", 400),
        ({"prompt": [320]}, "prompt", 400),
        ({"prompt": [[1], [320]]}, "prompt", 400),
        ({"stop": ["x"] * 17}, "stop", 400),
        ({"stop": "x" * 257}, "stop", 400),
        ({"stop": ["x", ""]}, "stop", 400),
        ({"stop_token_ids": [320]}, "stop_token_ids", 400),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids", 400),
        ({"logprobs": 21}, "logprobs", 400),
        ({"prompt_logprobs": 21}, "prompt_logprobs", 400),
        ({"logit_bias": {"320": 1}}, "logit_bias", 400),
        ({"logit_bias": {"-1": 1}}, "logit_bias", 400),
        ({"logit_bias": {"\u0661": 1}}, "logit_bias", 400),
        ({"logit_bias": {"x": 1}}, "logit_bias", 400),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias", 400),
        ({"max_tokens": 101}, "max_tokens", 400),
        ({"max_tokens": 0}, "max_tokens", 400),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", 400),
        ({"stream_options": {"include_usage": True}}, "stream_options", 400),
        ({"best_of": 3}, "best_of", 400),
        ({"best_of": 1, "n": 2}, "best_of", 400),
        ({"logit_bias": {"05": 1}}, "logit_bias", 400),
        ({"suffix": "x"}, "suffix", 400),
        ({"stop_regex": "a*"}, "stop_regex", 400),
        ({"structural_tag": {}}, "structural_tag", 400),
    ],
    ids=lambda value: str(value)[:60],
)
def test_requests_beyond_a_limit_are_refused_and_the_field_is_named(
    fields: dict[str, Any], param: str, status: int
) -> None:
    with pytest.raises(ApiError) as caught:
        CHECKS.completion(read(CompletionRequest, **{"prompt": "hi", **fields}))
    assert (caught.value.status_code, caught.value.param) == (status, param)


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "tiny"},
        {"user": "someone", "something_new": {"a": 1}},
        {"best_of": 1},
        {"best_of": 2, "n": 2},
        {"suffix": None},
        {"response_format": {"type": "text"}},
        {"quality": "exact"},
        {"max_tokens": 0, "echo": True},
        {"n": 16, "max_tokens": 100, "logprobs": 20, "stop": ["x"] * 16},
        {"stop": None, "logit_bias": None, "seed": None, "temperature": None},
    ],
    ids=str,
)
def test_what_is_within_the_limits_passes(fields: dict[str, Any]) -> None:
    assert CHECKS.completion(completion(**fields)) == ["hi"]


def test_template_variables_that_are_no_text_are_refused(make_checkpoint: Any, tmp_path: Path) -> None:
    for file in make_checkpoint("llama").glob("tokenizer*.json"):
        shutil.copy(file, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ date_string }}")
    pool = TextPool(Tokenizer.from_directory(tmp_path), threads=1, max_characters=1000)

    def render(variables: dict[str, Any]) -> str:
        call = pool.encode_chat(
            [{"role": "user", "content": "hi"}],
            add_generation_prompt=True,
            add_special_tokens=False,
            variables=variables,
        )
        return asyncio.run(call)[0]

    assert render({"date_string": "today"}) == "today"
    for variables in ({"date_string": "\ud800"}, {"unheard_of": 1}, {"messages": []}):
        with pytest.raises(ApiError) as caught:
            render(variables)
        assert caught.value.status_code == 400
    pool.close()


def test_the_clients_wish_comes_before_the_models_default_and_that_before_openais() -> None:
    defaults = {"temperature": 0.3, "top_k": 7, "eos_token_id": [2]}
    silent = sampling_params(completion(), defaults)
    assert (silent.temperature, silent.top_k, silent.top_p) == (0.3, 7, 1.0)
    assert sampling_params(completion(temperature=0, top_k=0), defaults).temperature == 0
    assert sampling_params(completion(), {}).temperature == 1.0


def test_log_probabilities_of_both_endpoints() -> None:
    assert sampling_params(completion(logprobs=3, echo=True), {}).prompt_logprobs == 3
    assert sampling_params(completion(logprobs=3), {}).prompt_logprobs is None
    assert sampling_params(chat(logprobs=True), {}).logprobs == 0
    assert sampling_params(chat(logprobs=True, top_logprobs=4), {}).logprobs == 4
    assert sampling_params(chat(), {}).logprobs is None


@pytest.mark.parametrize(
    ("requested", "default", "cap", "expected"),
    [
        (5, 16, None, 5),
        (None, 16, None, 16),
        (None, None, None, 60),
        (None, None, 30, 30),
        (None, 90, 30, 30),
        (0, 16, None, 1),
    ],
)
def test_output_length(requested: int | None, default: int | None, cap: int | None, expected: int) -> None:
    params = sampling_params(completion(), {})
    settled = with_length(params, requested=requested, default=default, cap=cap, prompt_tokens=40, max_model_len=100)
    assert settled.max_tokens == expected


@pytest.mark.parametrize(("requested", "prompt_tokens"), [(61, 40), (None, 100), (0, 100), (1, 100)])
def test_prompt_and_output_must_fit_the_model(requested: int | None, prompt_tokens: int) -> None:
    with pytest.raises(ApiError) as caught:
        with_length(
            sampling_params(completion(), {}),
            requested=requested,
            default=16,
            cap=None,
            prompt_tokens=prompt_tokens,
            max_model_len=100,
        )
    assert caught.value.code == "context_length_exceeded"
    wanted = max(1, requested or 0)
    begin = f"This model's maximum context length is 100 tokens. However, you requested {prompt_tokens + wanted} tokens"
    assert caught.value.detail.startswith(begin)
    assert "context_length_exceeded" in caught.value.detail


def test_a_seed_of_minus_one_is_a_random_one() -> None:
    assert [sampling_params(completion(seed=seed), {}).seed for seed in (-1, -2, 0)] == [None, -2, 0]


def test_keys_open_what_they_should_and_nothing_else() -> None:
    ring = KeyRing(["one", "two"], admin_key="boss")
    one, two, boss = (ring.identify(f"Bearer {key}") for key in ("one", "two", "boss"))
    assert one is not None
    assert two is not None
    assert boss is not None
    assert (one.operator, boss.operator) == (False, True)
    for wrong in (None, "", "Bearer", "Bearer ", "Bearer on", "Bearer onee", "Basic one", "one", "Bearer öne"):
        assert ring.identify(wrong) is None
    assert not KeyRing([]).required


def test_cache_salts_differ_between_keys() -> None:
    ring = KeyRing(["one", "two"])
    one, two = ring.identify("Bearer one"), ring.identify("bearer two")
    assert one is not None
    assert two is not None
    salts = {caller.cache_salt(salt) for caller in (one, two) for salt in (None, "a", "b")}
    assert len(salts) == 6
    assert None not in salts
    assert one.cache_salt("a") == one.cache_salt("a")
    assert "one" not in (one.key_id or "")


def test_keys_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    assert ServerSettings(api_keys=("zero",), api_keys_file=str(file)).all_api_keys() == ("zero", "one", "two")
    with pytest.raises(ValueError, match="cannot be read"):
        ServerSettings(api_keys_file=str(tmp_path / "none")).all_api_keys()
    file.write_text("\n")
    with pytest.raises(ValueError, match="no key"):
        ServerSettings(api_keys_file=str(file)).all_api_keys()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"port": 70000}, "70000"),
        ({"hang_timeout": 0}, "hang_timeout"),
        ({"log_format": "xml"}, "xml"),
        ({"api_keys": ("",)}, "api_keys"),
        ({"admin_key": "boss"}, "admin_key"),
    ],
)
def test_settings_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerSettings(**fields)
    with pytest.raises(ValueError, match="max_n"):
        Limits(max_n=0)
