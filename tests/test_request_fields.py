"""Every field that other servers know is honoured, without effect, or refused by name; conversations become prompts."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from anthropic.types.message_count_tokens_params import MessageCountTokensParams
from anthropic.types.message_create_params import MessageCreateParamsBase
from dynamoe.dynamic.text.tokenizer import Tokenizer
from dynamoe.serve.errors import ApiError
from dynamoe.serve.request_checks import RequestChecks, check_supported, plain_messages
from dynamoe.serve.settings import Limits
from dynamoe.serve.text import TextPool
from dynamoe.serve.wire import fields
from dynamoe.serve.wire.messages import CountTokensRequest, MessagesRequest
from dynamoe.serve.wire.openai import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    DetokenizeRequest,
    StreamOptions,
    TokenizeRequest,
)
from dynamoe.serve.wire.responses import ResponsesRequest
from openai.types.responses.response_create_params import ResponseCreateParamsBase

CHECKS = RequestChecks(limits=Limits(), vocab_size=320, served_model="tiny")
PAGE = Path(__file__).parents[1] / "docs" / "rest.md"
APIS = PAGE.with_name("apis.md")

# The fields of vLLM's request bodies.
SHARED = """
    model frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream stream_options
    temperature top_p user use_beam_search top_k min_p repetition_penalty watermarking length_penalty stop_token_ids
    include_stop_str_in_output ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens
    truncate_prompt_tokens truncation_side allowed_token_ids prompt_logprobs logprob_token_ids bad_words
    add_special_tokens response_format structured_outputs priority request_id session_id return_tokens_as_token_ids
    return_token_ids routed_experts_prompt_start return_token_offsets return_mm_kwargs cache_salt kv_transfer_params
    ec_transfer_params vllm_xargs repetition_detection thinking_token_budget stream_interval echo logits_processors
    guided_json guided_regex guided_choice guided_grammar
"""
COMPLETION = SHARED + "prompt suffix prompt_embeds best_of"
CONVERSATION = """
    messages add_generation_prompt continue_final_message chat_template chat_template_kwargs media_io_kwargs
    mm_processor_kwargs tools add_special_tokens
"""
CHAT = (
    SHARED
    + CONVERSATION
    + """
    top_logprobs max_completion_tokens tool_choice reasoning_effort include_reasoning parallel_tool_calls documents
    return_prompt_text
"""
)
TOKENIZE = CONVERSATION + "model prompt return_token_strs"


@pytest.mark.parametrize(
    ("model", "refused", "known"),
    [
        (CompletionRequest, fields.COMPLETION, COMPLETION),
        (ChatCompletionRequest, fields.CHAT, CHAT),
        (TokenizeRequest, fields.TOKENIZE, TOKENIZE),
        (DetokenizeRequest, fields.DETOKENIZE, "model tokens"),
        (StreamOptions, {}, "include_usage continuous_usage_stats"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_field_of_vllm_is_honoured_or_refused_or_documented_as_without_effect(
    model: Any, refused: fields.Refused, known: str
) -> None:
    assert not set(model.model_fields) & set(refused)
    assert set(known.split()) <= {*model.model_fields, *refused, *listed("Without effect")}


def listed(heading: str, page: Path = PAGE) -> set[str]:
    """The names in one row of the documentation's table of fields."""
    (row,) = re.findall(rf"^\| {heading}[^|]*\|(.*)\|$", page.read_text(), re.MULTILINE)
    return set(re.findall(r"`(\w+)`", row))


def test_the_documentation_lists_the_refused_fields() -> None:
    tables = (fields.COMPLETION, fields.CHAT, fields.TOKENIZE, fields.DETOKENIZE)
    assert listed("Refused") == {name for table in tables for name in table}
    assert listed("Refused") & listed("Without effect") == set()


@pytest.mark.parametrize(
    ("path", "models", "refused", "clients"),
    [
        ("/v1/responses", [ResponsesRequest], fields.RESPONSES, [ResponseCreateParamsBase]),
        (
            "/v1/messages",
            [MessagesRequest, CountTokensRequest],
            fields.MESSAGES,
            [MessageCreateParamsBase, MessageCountTokensParams],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_field_of_the_official_clients_is_honoured_or_refused_or_documented_as_without_effect(
    path: str, models: list[Any], refused: fields.Refused, clients: list[Any]
) -> None:
    without_effect = listed(f"Without effect on `{path}`", APIS)
    for model, client in zip(models, clients, strict=True):
        assert not set(model.model_fields) & (set(refused) | without_effect)
        assert set(client.__annotations__) <= {*model.model_fields, *refused, *without_effect}
    assert listed(f"Also refused by `{path}`", APIS) == set(refused) - set(fields.CHAT)
    assert set(refused) & without_effect == set()


@pytest.mark.parametrize("table", ["COMPLETION", "CHAT", "TOKENIZE", "DETOKENIZE", "RESPONSES", "MESSAGES"])
def test_refused_fields_are_named_and_their_neutral_values_pass(table: str) -> None:
    models = {"COMPLETION": CompletionRequest, "CHAT": ChatCompletionRequest, "TOKENIZE": TokenizeRequest}
    models |= {"RESPONSES": ResponsesRequest, "MESSAGES": MessagesRequest}
    needed: dict[str, Any] = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "tokens": [1]}
    needed |= {"input": "a", "max_tokens": 1}
    model: Any = models.get(table, DetokenizeRequest)
    needed = {name: value for name, value in needed.items() if name in model.model_fields}
    refused: fields.Refused = getattr(fields, table)
    for name, neutral in refused.items():
        for value in (None, *neutral):
            check_supported(model.model_validate({**needed, name: value}), refused)
        with pytest.raises(ApiError) as caught:
            check_supported(model.model_validate({**needed, name: {"something": "else"}}), refused)
        assert (caught.value.status_code, caught.value.param) == (400, name)
        assert name in caught.value.detail


def chat(*messages: dict[str, Any], **fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate(
        {"messages": list(messages) or [{"role": "user", "content": "a"}], **fields}
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"prompt": "a"}, "prompt"),
        ({"thinking_budget_tokens": 5}, "thinking_budget_tokens"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_chat_refuses_what_would_change_the_meaning(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        CHECKS.chat(chat(**fields))
    assert (caught.value.status_code, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "image_url"),
        ({"role": "user", "content": [{"type": "text"}]}, "text"),
        ({"role": "user", "content": [{"type": "refusal", "text": "no"}]}, "refusal"),
        ({"role": "assistant", "content": "a", "prefix": True}, "continue_final_message"),
        ({"role": "assistant", "content": "a", "partial": True}, "continue_final_message"),
        ({"role": "assistant", "content": "a", "audio": {"id": "1"}}, "audio"),
        ({"role": "system", "content": "a", "tools": [{}]}, "tools"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_messages_that_are_more_than_text_are_refused(message: dict[str, Any], named: str) -> None:
    with pytest.raises(ApiError) as caught:
        CHECKS.chat(chat(message))
    assert (caught.value.status_code, caught.value.param) == (400, "messages")
    assert named in caught.value.detail


def plain(message: dict[str, Any]) -> dict[str, Any]:
    (only,) = plain_messages([ChatMessage.model_validate(message)])
    return only


def test_text_parts_of_a_message_are_lines() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "input_text", "text": "two"}]
    parts += [{"type": "output_text", "text": "three"}, {"type": "refusal", "refusal": "no"}]
    assert plain({"role": "user", "content": parts})["content"] == "one\ntwo\nthree\nno"
    assert plain({"role": "assistant", "content": None, "refusal": "no"})["content"] == "no"


def test_templates_get_what_a_message_says_beside_its_content() -> None:
    message = {"role": "assistant", "content": "a", "tool_calls": [], "prefix": False, "annotations": []}
    for name in ("reasoning", "reasoning_content"):
        read = plain({**message, name: "why"})
        assert (read["reasoning"], read["reasoning_content"]) == ("why", "why")
    assert plain({"role": "tool", "content": "4", "tool_call_id": "x"})["tool_call_id"] == "x"


Render = Callable[..., str]


@pytest.fixture
def render(make_checkpoint: Any, tmp_path: Path) -> Iterator[Callable[[str], Render]]:
    """``render(template)(*messages, **fields)`` is the prompt of a conversation."""
    pools = []

    def make(template: str) -> Render:
        for file in make_checkpoint("llama").glob("tokenizer*.json"):
            shutil.copy(file, tmp_path)
        (tmp_path / "chat_template.jinja").write_text(template)
        pools.append(TextPool(Tokenizer.from_directory(tmp_path), threads=1, max_characters=1000))

        def prompt(*messages: dict[str, Any], **fields: Any) -> str:
            body = chat(*messages, **fields)
            return asyncio.run(pools[-1].encode_chat(plain_messages(body.messages), **body.rendering))[0]

        return prompt

    yield make
    for pool in pools:
        pool.close()


ROLES = (
    "{% for m in messages %}{{ m.role }}:{{ m.content | trim }};{% endfor %}{% if add_generation_prompt %}go{% endif %}"
)


def test_developers_are_the_system_unless_the_template_knows_them(render: Callable[[str], Render]) -> None:
    messages = {"role": "developer", "content": "be kind"}, {"role": "user", "content": "hi"}
    assert render(ROLES)(*messages) == "system:be kind;user:hi;go"
    assert render("{# developer #}" + ROLES)(*messages) == "developer:be kind;user:hi;go"


def test_texts_that_no_tokenizer_takes_are_faults_of_the_messages(render: Callable[[str], Render]) -> None:
    prompt = render("{{ messages[0].content }}{{ reasoning_effort }}")
    half = {"chat_template_kwargs": {"reasoning_effort": "\ud800"}}
    for content, further, fault in (
        ("a" * 1001, {}, "1001 characters is longer"),
        ("a", half, "half of a surrogate pair"),
    ):
        with pytest.raises(ApiError, match=fault) as caught:
            prompt({"role": "user", "content": content}, **further)
        assert (caught.value.status_code, caught.value.param) == (400, "messages")


def test_the_final_message_is_continued(render: Callable[[str], Render]) -> None:
    messages = {"role": "user", "content": "hi"}, {"role": "assistant", "content": " Well, "}
    prompt = render(ROLES)
    assert prompt(*messages, continue_final_message=True) == "user:hi;assistant:Well, "
    assert prompt(*messages, add_generation_prompt=False) == "user:hi;assistant:Well,;"
    with pytest.raises(ApiError, match="exclude each other"):
        prompt(*messages, continue_final_message=True, add_generation_prompt=True)
    for template in ("{{ messages[0].content }}", ROLES + ROLES):
        with pytest.raises(ApiError, match="exactly once"):
            render(template)(*messages, continue_final_message=True)


def test_reasoning_effort_reaches_templates_that_read_it_and_is_refused_elsewhere(
    render: Callable[[str], Render],
) -> None:
    user = {"role": "user", "content": "hi"}
    assert render("{{ reasoning_effort }}")(user, reasoning_effort="low") == "low"
    switch = render("{{ enable_thinking is false }}")
    assert switch(user, reasoning_effort="none") == "True"
    for prompt, effort in ((switch, "low"), (render(ROLES), "none")):
        with pytest.raises(ApiError) as caught:
            prompt(user, reasoning_effort=effort)
        assert (caught.value.status_code, caught.value.param) == (400, "reasoning_effort")
