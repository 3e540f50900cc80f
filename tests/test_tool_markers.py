"""Markers of calls are found in chat templates nobody named, and calls are read back, wherever a stream is split."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dynamoe.dynamic.engine.outputs import CompletionDelta, CompletionOutput
from dynamoe.dynamic.text.chat_template import ChatTemplate, TemplateEnded
from dynamoe.dynamic.text.tokenizer import Tokenizer
from dynamoe.serve.answer_parts import AnswerParts, MarkedReader
from dynamoe.serve.formats import ChatFormat
from dynamoe.serve.tool_markers import IN_WORDS, PROBE, CallMarkers, derive
from hypothesis import given, settings
from hypothesis import strategies as st

TURNS = "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}</s>{% elif m.tool_calls %}<bot>CALLS</s>"
TURNS += "{% else %}<bot>{{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
EACH = "{% for c in m.tool_calls %}CALL{% endfor %}"
OBJECT = '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'


def wide(text: str) -> str:
    """With the wide bars of DeepSeek's tokens."""
    return text.replace("<|", "<\uff5c").replace("|>", "\uff5c>")


TEMPLATES = {  # each written here, in the way of the family
    "hermes": EACH.replace("CALL", f"\n<tool_call>\n{OBJECT}\n</tool_call>"),
    "llama": "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call') }}{% endif %}"
    + EACH.replace("CALL", OBJECT.replace('arguments"', 'parameters"')),
    "llama with a tag": EACH.replace("CALL", f"<|python_tag|>{OBJECT}"),
    "deepseek": "<|tool▁calls▁begin|>"
    + EACH.replace(
        "CALL",
        "<|tool▁call▁begin|>function<|tool▁sep|>{{ c.function.name }}\n```json\n{{ c.function.arguments + '' }}\n"
        "```<|tool▁call▁end|>",
    )
    + "<|tool▁calls▁end|>",
    "mistral": "[TOOL_CALLS] [" + EACH.replace("CALL", f"{OBJECT}{{% if not loop.last %}}, {{% endif %}}") + "]",
    "mistral, newer": EACH.replace(
        "CALL", "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}"
    ),
    "harmony": EACH.replace(
        "CALL",
        "<|channel|>commentary to=functions.{{ c.function.name }} <|constrain|>json<|message|>"
        "{{ c.function.arguments | tojson }}<|call|>",
    ),
}
TEMPLATES["deepseek"] = wide(TEMPLATES["deepseek"])
NAMES = frozenset({"f", "f.g", "weather"})
TOOLS = "{{ tools | tojson }}"


def template(calls: str) -> str:
    return TOOLS + TURNS.replace("CALLS", calls)


@pytest.fixture(scope="module")
def rendered() -> Any:
    """``rendered(name)``: the markers of a template, and what renders calls with it."""
    made: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name not in made:
            jinja = ChatTemplate(template(TEMPLATES[name]), {})

            def render(messages: Any, begin: bool) -> str:
                return jinja.render(messages, add_generation_prompt=begin, tools=PROBE)

            made[name] = derive(render), render, jinja
        return made[name]

    yield make
    for _, _, jinja in made.values():
        jinja.close()


def answer(render: Callable[[Any, bool], str], calls: list[tuple[str, Any]]) -> str:
    """What a model writes that makes these calls."""
    user = {"role": "user", "content": "q"}
    for as_text in (False, True):
        listed = [
            {"id": f"call0000{n}", "type": "function",
             "function": {"name": name, "arguments": json.dumps(arguments) if as_text else arguments}}
            for n, (name, arguments) in enumerate(calls)
        ]  # fmt: skip
        try:
            text = render([user, {"role": "assistant", "content": "", "tool_calls": listed}], False)
        except ValueError:
            continue
        return text[len(render([user], True)) :].removesuffix("</s>")
    raise AssertionError


def plain(calls: Any) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in calls]


ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"city": "Rome", "days": 3},
    {"text": 'a "quoted" {brace} ] </tool_call> \n <tool_call> é'},
    {"nested": {"list": [1, None, {"x": []}], "name": "f"}},
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_of_every_format_are_read_back(rendered: Any, name: str) -> None:
    markers, render, _ = rendered(name)
    assert markers is not None
    for arguments in ARGUMENTS:
        assert plain(markers.read(answer(render, [("weather", arguments)]), NAMES)[1]) == [("weather", arguments)]
    several = list(zip(("f", "weather", "f.g"), ARGUMENTS, strict=False))
    if name != "llama":
        content, calls = markers.read(answer(render, several), NAMES)
        assert (content, plain(calls)) == ("", several)
    if markers.before:
        content, calls = markers.read("I will look. " + answer(render, several[:1]), NAMES)
        assert (content, plain(calls)) == ("I will look.", several[:1])


@pytest.mark.parametrize("name", [*TEMPLATES, "in words"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello [1] {x} <tool",
        "{",
        '{"name": "unknown", "arguments": {}}',
        '<tool_call>\n{"name": "f", "arguments": ',
        '[TOOL_CALLS][{"name": "f"}]',
        '[{"name": "f", "arguments": [1]}]',
        "<|python_tag|>print(1)",
        wide("<|tool▁calls▁begin|><|tool▁call▁begin|>function<|tool▁sep|>f\n```json\n{]"),
        "[" * 20000,
    ],
    ids=lambda text: text[:20],
)
def test_what_is_no_call_is_content(rendered: Any, name: str, text: str) -> None:
    markers = IN_WORDS if name == "in words" else rendered(name)[0]
    assert markers.read(text, NAMES) == (text, [])


def test_templates_in_other_ways_have_no_markers() -> None:
    tagged = EACH.replace(
        "CALL",
        "<function={{ c.function.name }}>{% for k, v in c.function.arguments.items() %}<parameter={{ k }}>{{ v }}"
        "</parameter>{% endfor %}</function>",
    )
    for calls in (tagged, "{{ m.content }}"):
        jinja = ChatTemplate(template(calls), {})
        try:
            assert derive(lambda m, begin, j=jinja: j.render(m, add_generation_prompt=begin, tools=PROBE)) is None
        finally:
            jinja.close()


@pytest.fixture(scope="module")
def tokenizer(make_checkpoint: Callable[..., Path]) -> Tokenizer:
    return Tokenizer.from_directory(make_checkpoint("mixtral"))


def writer(tokenizer: Tokenizer, markers: CallMarkers, special: tuple[str, ...] = (), one: bool = False) -> ChatFormat:
    parts = AnswerParts(tokenizer=tokenizer, reader=lambda: MarkedReader(markers, NAMES, one), special=special)
    return ChatFormat(id="a", parts=parts, top_logprobs=None)


def streamed(write: ChatFormat, pieces: list[str]) -> tuple[str, list[Any], str | None]:
    """The content, calls and finish reason of a stream of these pieces of text."""
    content, calls, reason = "", [], None
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        choice = write.chunk(0, CompletionDelta(0, [], piece, finish_reason="stop" if last else None), None)
        if choice is not None:
            content += choice["delta"].get("content") or ""
            for call in choice["delta"].get("tool_calls", []):
                if "id" in call:
                    calls.append(call)
                else:
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            reason = choice["finish_reason"]
    return content, calls, reason


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([name for name in TEMPLATES if name != "llama"]),
    st.lists(st.tuples(st.sampled_from(sorted(NAMES)), st.dictionaries(st.text(max_size=4), VALUES)), max_size=3),
    st.text("abc <[{", max_size=8),
    st.data(),
)
def test_streams_hold_what_whole_answers_hold(
    rendered: Any, tokenizer: Tokenizer, name: str, calls: list[Any], said: str, data: st.DataObject
) -> None:
    markers, render, _ = rendered(name)
    text = said + (answer(render, calls) if calls else "")
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=10)) | {0, len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(cuts)] or [""]

    whole = writer(tokenizer, markers).whole(0, CompletionOutput(0, text, finish_reason="stop"), None)
    content, parts, reason = streamed(writer(tokenizer, markers), pieces)
    expected = whole["message"].get("tool_calls", [])
    assert [part["function"] for part in parts] == [call["function"] for call in expected]
    assert content.rstrip() == (whole["message"]["content"] or "").rstrip()
    assert reason == whole["finish_reason"] == ("tool_calls" if expected else "stop")
    if not set(said) & set("<[{"):
        assert [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in expected] == calls


def test_special_tokens_are_no_content_and_one_call_is_the_most(tokenizer: Tokenizer) -> None:
    markers = CallMarkers(before="<c>", separator="<c>")
    write = writer(tokenizer, markers, special=("<|x|>",), one=True)
    call = '<c>{"name": "f", "arguments": {}}'
    choice = write.whole(0, CompletionOutput(0, f"<|x|>ok {call}{call}", finish_reason="stop"), None)
    assert choice["message"]["content"] == "ok"
    assert len(choice["message"]["tool_calls"]) == 1


def test_a_template_that_ended_has_shown_nothing() -> None:
    def render(_messages: Any, _begin: bool) -> str:
        raise TemplateEnded("the chat template was ended")

    with pytest.raises(TemplateEnded):
        derive(render)
