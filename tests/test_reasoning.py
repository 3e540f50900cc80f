"""Reasoning: its markers are found in templates nobody named, streams are split where whole answers are, budgets close
the block, and the form of an answer begins behind it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dynamoe import LLM, SamplingParams
from dynamoe.dynamic.engine.logits_processors import ORDER
from dynamoe.dynamic.engine.reasoning import Phase, ReasoningTracker
from dynamoe.dynamic.engine.reasoning_params import ReasoningParams
from dynamoe.dynamic.text.tokenizer import Tokenizer
from dynamoe.serve.answer_parts import ChannelReader, MarkedReader, Part, PlainReader, ReasoningReader
from dynamoe.serve.reasoning_markers import HARMONY, ReasoningMarkers, derive
from dynamoe.serve.tool_markers import CallMarkers
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Template

THINK = ReasoningMarkers(begin="<think>", end="</think>", close="\n</think>", after="\n\n")
USER = "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}</s>{% else %}<bot>"
TURN = "{{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
TEMPLATES = {  # each written here, in the way of a family
    "kept": (USER + "<think>\n{{ m.reasoning_content }}\n</think>\n\n" + TURN, [], THINK),
    "brackets": (
        USER + "[THINK]{{ m.reasoning }}[/THINK]" + TURN,
        [],
        ReasoningMarkers(begin="[THINK]", end="[/THINK]", close="[/THINK]"),
    ),
    "words": (
        USER + "<|START_THINKING|>{{ m.thinking }}<|END_THINKING|> " + TURN,
        [],
        ReasoningMarkers(begin="<|START_THINKING|>", end="<|END_THINKING|>", close="<|END_THINKING|>", after=" "),
    ),
    "dropped": (USER + "{{ m.content.split('</think>')[-1] }}" + TURN + "<think>", [], THINK),
    "tokens only": (USER + TURN, ["<s>", "<think>", "</think>", "<|im_end|>"], THINK),
    "roles are no markers": (USER + "<|a|>{{ m.reasoning }}<|b|>" + TURN, [], None),
    "nothing": (USER + TURN, ["<s>", "</s>"], None),
    "harmony": ("<|start|>assistant<|channel|>final<|message|>" + USER + TURN, [], HARMONY),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_markers_are_found(name: str) -> None:
    source, tokens, expected = TEMPLATES[name]
    assert derive(lambda messages: Template(source).render(messages=messages), source, tokens) == expected


@pytest.mark.parametrize(
    ("markers", "prompt", "continued", "opened"),
    [
        (THINK, "<u>q</s><bot><think>\n", "", True),
        (THINK, "<u><think></s><bot>", "", None),
        (THINK, "<bot><think>\n\n</think>\n\n", "", False),
        (THINK, "<bot><think>a", "<think>a", True),
        (THINK, "<bot>a", "a", False),
        (HARMONY, "<|start|>user<|message|>q<|end|><|start|>assistant", "", None),
        (HARMONY, "<|start|>assistant<|channel|>analysis<|message|>a", "a", True),
        (HARMONY, "<|start|>assistant<|channel|>final<|message|>a", "a", False),
    ],
)
def test_prompts_say_whether_a_block_is_open(
    markers: ReasoningMarkers, prompt: str, continued: str, opened: bool | None
) -> None:
    assert markers.opened(prompt, continued) is opened


CALL = CallMarkers(before="<c>", separator="<c>")
CALLS = '{"name": "f", "arguments": {"x": 1}}'


def joined(parts: list[Part]) -> dict[str, str]:
    said: dict[str, str] = {}
    for part in parts:
        text = part.call.name if part.call is not None else part.text
        said[part.kind] = said.get(part.kind, "") + text
    return said


READERS: dict[str, tuple[Callable[[], Any], str, dict[str, str]]] = {
    "block": (
        lambda: ReasoningReader(THINK, PlainReader(), False),
        " <think>\nwhy <b> </thin\n</think>\n\nso < it is ",
        {"reasoning": "why <b> </thin", "content": "so < it is "},
    ),
    "opened": (
        lambda: ReasoningReader(THINK, PlainReader(), True),
        "\n why</think>so",
        {"reasoning": "why", "content": "so"},
    ),
    "none": (lambda: ReasoningReader(THINK, PlainReader(), False), "<thin air", {"content": "<thin air"}),
    "cut off": (lambda: ReasoningReader(THINK, PlainReader(), True), "why </thi", {"reasoning": "why </thi"}),
    "call behind it": (
        lambda: ReasoningReader(THINK, MarkedReader(CALL, {"f"}), True),
        f"why</think>\nso<c>{CALLS}",
        {"reasoning": "why", "content": "so", "call": "f", "arguments": '{"x": 1}'},
    ),
    "channels": (
        lambda: ChannelReader(PlainReader(), {"f"}),
        "<|channel|>analysis<|message|>why <|x|><|end|><|start|>assistant<|channel|>commentary<|message|>hm<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|> more<|end|><|start|>assistant<|channel|>final<|message|>so",
        {"reasoning": "why <|x|> more", "content": "hm\nso"},
    ),
    "channels with a call": (
        lambda: ChannelReader(PlainReader(), {"f"}),
        "<|channel|>analysis<|message|>why<|end|><|start|>assistant<|channel|>commentary to=functions.f "
        '<|constrain|>json<|message|>{"x": 1}<|call|>',
        {"reasoning": "why", "call": "f", "arguments": '{"x": 1}'},
    ),
    "channels with a broken call": (
        lambda: ChannelReader(PlainReader(), {"f"}),
        "<|channel|>commentary to=functions.f<|message|>{x<|call|>",
        {"content": "{x"},
    ),
    "no channels": (lambda: ChannelReader(PlainReader()), "so <|e", {"content": "so <|e"}),
}


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_parts_do_not_depend_on_where_a_text_is_split(name: str, data: st.DataObject) -> None:
    make, text, expected = READERS[name]
    assert joined(make().add(text, True)) == expected
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)) | {0, len(text)})
    reader, parts = make(), []
    for begin, end in itertools.pairwise(cuts):
        parts += reader.add(text[begin:end], False)
    assert joined(parts + reader.add("", True)) == expected


@pytest.fixture(scope="module")
def llm(make_checkpoint: Callable[..., Path]) -> LLM:
    return LLM(make_checkpoint("mixtral"))


@pytest.fixture(scope="module")
def tokenizer(make_checkpoint: Callable[..., Path]) -> Tokenizer:
    return Tokenizer.from_directory(make_checkpoint("mixtral"))


def block(**changes: Any) -> ReasoningParams:
    return ReasoningParams(**{"begin": "<think>", "end": "</think>", "close": "\n</think>", "after": "\n\n", **changes})


def params(reasoning: ReasoningParams, **changes: Any) -> SamplingParams:
    common: dict[str, Any] = {"temperature": 1.0, "seed": 3, "n": 3, "max_tokens": 80, "logit_bias": {2: -100, 0: -100}}
    return SamplingParams(**{**common, "reasoning": reasoning, **changes})


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_a_budget_closes_the_block_with_the_markers_own_tokens(llm: LLM, tokenizer: Tokenizer, budget: int) -> None:
    (result,) = llm.generate(["a b"], params(block(opened=True, budget=budget), max_tokens=30))
    closing = tokenizer.encode("\n</think>", False)
    for output in result.outputs:
        assert any(list(output.token_ids[at : at + len(closing)]) == closing for at in range(budget, budget + 4)), (
            output.text
        )
        assert "\ufffd\n</think>" not in output.text
        assert len(output.token_ids) == 30
    (free,) = llm.generate(["a b"], params(block(opened=True, budget=29), max_tokens=29))
    (none,) = llm.generate(
        ["a b"], SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=29, logit_bias={2: -100, 0: -100})
    )
    assert [o.token_ids for o in free.outputs] == [o.token_ids for o in none.outputs]


CITY = {"choice": ["Paris", "Rome"]}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_form_begins_behind_the_block(llm: LLM, temperature: float) -> None:
    settings = params(block(opened=True, budget=6), structured_outputs=CITY, temperature=temperature)
    (result,) = llm.generate(["a b"], settings)
    for output in result.outputs:
        reasoning, end, answer = output.text.partition("\n</think>\n\n")
        assert end, output.text
        assert answer in ("Paris", "Rome")
        assert reasoning
        assert output.finish_reason == "stop"


def test_the_form_begins_at_once_where_no_block_begins(llm: LLM, tokenizer: Tokenizer) -> None:
    (begin,) = set(tokenizer.encode("<think>", False)[:1])
    for bias, expected in ((-100, r"(Paris|Rome)"), (100, r"<think>.*</think>\n\n(Paris|Rome)")):
        settings = params(block(budget=4), structured_outputs=CITY, logit_bias={begin: bias})
        for each in (settings, replace(settings, temperature=0.0)):
            for output in llm.generate(["a b"], each)[0].outputs:
                assert re.fullmatch(expected, output.text, re.DOTALL), output.text


def test_in_channels_the_form_follows_a_block(llm: LLM) -> None:
    reasoning = HARMONY.params(opened=False, budget=5)
    (result,) = llm.generate(["a b"], params(reasoning, structured_outputs=CITY, max_tokens=200))
    for output in result.outputs:
        said = joined(ChannelReader(PlainReader()).add(output.text, True))
        assert said["content"] in ("Paris", "Rome")
        assert output.text.endswith(f"{HARMONY.close}{HARMONY.after}{said['content']}")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_trackers_forget_what_is_taken_back(tokenizer: Tokenizer, data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(["<think>why</think>so", "<thin so", "<think>a longer block of reasoning"]))
    reasoning = block(budget=data.draw(st.sampled_from([None, 3])))
    whole = ReasoningTracker(reasoning, tokenizer)
    places = [whole.place]
    tokens = tokenizer.encode(text, False)
    for token in tokens:
        whole.accept(token)
        places.append(whole.place)
    tracker, at = ReasoningTracker(reasoning, tokenizer), 0
    for _ in range(8):
        count = data.draw(st.integers(-at, len(tokens) - at))
        for token in tokens[at : at + max(count, 0)]:
            tracker.accept(token)
        tracker.rollback(max(-count, 0))
        at += count
        assert tracker.place == tracker.fork().place == places[at]
    if "</think>" in text:
        assert whole.place.phase is Phase.AFTER
        assert whole.place.used == len(tokens) - len(tokenizer.encode("<think>", False)) - len(
            tokenizer.encode("so", False)
        )


def test_only_forms_come_behind_what_closes_a_block() -> None:
    assert [kind.__name__ for kind in ORDER[-2:]] == ["ReasoningProcessor", "GrammarProcessor"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"begin": ""}, "begin"),
        ({"budget": -1}, "budget"),
        ({"close": "x"}, "close"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block(**fields)
    with pytest.raises(ValueError, match="ReasoningParams"):
        SamplingParams(reasoning=json.loads("{}"))
