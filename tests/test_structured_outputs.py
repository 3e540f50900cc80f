"""Structured outputs in an engine: finished outputs have the wanted form, alone, in a batch, forked, preempted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import torch
from dynamoe import LLM, SamplingParams
from dynamoe.dynamic.contract.deployment import deployment
from dynamoe.dynamic.engine import grammar_compiler, grammar_processor
from dynamoe.dynamic.engine.grammar_processor import GrammarError, GrammarProcessor
from dynamoe.dynamic.engine.protocols import ProcessorContext
from dynamoe.dynamic.engine.quality import Quality
from dynamoe.dynamic.engine.structured_outputs import StructuredOutputsParams
from structured_schemas import KINDS, many

PROMPTS = [[7, 8, 9], [30, 31, 32, 33]]
# Random models seldom end what has no end of its own: quotes, brackets and the end of text are made more likely.
ENDINGS = ('"', "}", "]", ",", ":")


@pytest.fixture(scope="module")
def llm(make_checkpoint: Callable[..., Path]) -> LLM:
    return LLM(make_checkpoint("mixtral"), progress=False, max_num_seqs=32)


def ask(llm: LLM, forms: Sequence[Any], prompts: Any = None, **settings: Any) -> list[Any]:
    tokenizer = llm.get_tokenizer()
    bias = {tokenizer.encode(text, False)[0]: 4.0 for text in ENDINGS} | {2: 4.0}
    settings = {"max_tokens": 300, "seed": 5, "logit_bias": bias, **settings}
    params = [SamplingParams(structured_outputs=form, **settings) for form in forms]
    prompts = prompts or [PROMPTS[number % 2] for number in range(len(forms))]
    return llm.generate(prompts, params, use_tqdm=False)


def check_schemas(llm: LLM, schemas: Sequence[Any], n: int, **settings: Any) -> None:
    results = ask(llm, [{"json": schema} for schema in schemas], n=n, **settings)
    finished = 0
    for schema, result in zip(schemas, results, strict=True):
        assert len(result.outputs) == n
        for output in result.outputs:
            assert output.finish_reason in ("stop", "length"), (schema, output)
            if output.finish_reason == "stop":
                finished += 1
                jsonschema.validate(json.loads(output.text), schema, jsonschema.Draft202012Validator)
    assert finished >= 0.95 * n * len(schemas)


def test_every_finished_output_is_accepted_by_its_schema(llm: LLM) -> None:
    check_schemas(llm, list(KINDS.values()), n=2, temperature=1.0)
    check_schemas(llm, list(KINDS.values()), n=1, temperature=0.0)


@pytest.mark.slow
def test_two_hundred_schemas(llm: LLM) -> None:
    schemas = many(200)
    assert len({json.dumps(schema) for schema in schemas}) == 200
    check_schemas(llm, schemas, n=3, temperature=1.0)
    check_schemas(llm, schemas, n=1, temperature=0.0)
    check_schemas(llm, schemas, n=1, temperature=1.5, top_p=0.9, top_k=50)


FORMS: list[tuple[Any, str]] = [
    ({"regex": r"[a-c]{2,4}-\d{3}"}, r"[a-c]{2,4}-\d{3}"),
    ({"regex": "^(yes|no|a.b)$"}, "yes|no|a.b"),
    ({"choice": ["yes", "yes please", 'ja, "gern"\n', "é"]}, 'yes|yes please|ja, "gern"\n|é'),
    ({"grammar": 'root ::= "a" root | "b"'}, "a*b"),
    ({"grammar": 'start: sum\nsum: DIGIT ("+" DIGIT)~1..2\nDIGIT: /[0-9]/'}, r"\d(\+\d){1,2}"),
    ({"json_object": True}, r"(?s)\{.*\}"),
    ({"json": '{"enum": [1, "x"]}'}, '1|"x"'),
    ({"json": {"type": "array", "items": {"const": 1}, "maxItems": 3}, "disable_any_whitespace": True}, r"\[[1,]*\]"),
    (
        {"json": {"const": {"a": 1}}, "whitespace_pattern": "[ \n]{3}"},
        r"\{([ \n]{3})?\"a\"([ \n]{3})?:([ \n]{3})?1\s*\}",
    ),
]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_outputs_match_patterns_choices_and_grammars(llm: LLM, temperature: float) -> None:
    results = ask(llm, [form for form, _ in FORMS], temperature=temperature, n=1 if temperature == 0 else 4)
    for (form, pattern), result in zip(FORMS, results, strict=True):
        finished = [output.text for output in result.outputs if output.finish_reason == "stop"]
        assert finished or form == {"json_object": True}
        for text in finished:
            assert re.fullmatch(pattern, text), (form, text)


def tokens(results: Sequence[Any]) -> list[list[list[int]]]:
    return [[output.token_ids for output in result.outputs] for result in results]


SOME = [*({"json": KINDS[name]} for name in ("object", "optional", "recursive", "enum", "string")), FORMS[0][0]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_output_is_the_same_alone_and_beside_others(llm: LLM, temperature: float) -> None:
    together = tokens(ask(llm, [*SOME, None, None], temperature=temperature, n=1 if temperature == 0 else 2))
    settings = {"temperature": temperature, "n": 1 if temperature == 0 else 2}
    for number, form in enumerate([*SOME, None, None]):
        assert tokens(ask(llm, [form], [PROMPTS[number % 2]], **settings)) == [together[number]]


def test_masks_of_many_rows_are_those_of_each(
    llm: LLM, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens(ask(llm, SOME, temperature=1.0, n=2))
    monkeypatch.setattr(grammar_compiler, "_MASK_CORES", 1)
    threaded = LLM(make_checkpoint("mixtral"), progress=False, max_num_seqs=32)
    assert tokens(ask(threaded, SOME, temperature=1.0, n=2)) == expected
    assert threaded.engine.grammars._executor is not None


def test_completions_fork_and_are_preempted(llm: LLM, make_checkpoint: Callable[..., Path]) -> None:
    forms = [{"json": {"type": "array", "items": KINDS["object"], "minItems": 2, "maxItems": 3}}] * 4
    expected = tokens(ask(llm, forms, [[7, 8, 9 + i] for i in range(4)], temperature=1.0, n=3))
    assert any(ids != completions[0] for completions in expected for ids in completions)
    tight = LLM(make_checkpoint("mixtral"), progress=False, kv_memory="200KiB", max_model_len=180)
    assert tokens(ask(tight, forms, [[7, 8, 9 + i] for i in range(4)], temperature=1.0, n=3)) == [
        [ids[: 180 - 3] for ids in completions] for completions in expected
    ]
    assert tight.engine.stats().preemptions > 0


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0}, {"top_p": 0.9, "top_k": 30}], ids=str)
def test_few_tokens_picked_one_by_one_are_those_of_a_masked_row(
    llm: LLM, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens(ask(llm, SOME, **settings))
    for few in (-1, 40):  # all rows are masked; those with neither few allowed nor few forbidden tokens by a table
        monkeypatch.setattr(grammar_processor, "FEW", few)
        assert tokens(ask(llm, SOME, **settings)) == expected


def test_greedy_rows_look_for_allowed_tokens_only_where_the_best_does_not_fit(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms, looked_for, take = [{"regex": f"[^{letters}]{{60}}"} for letters in "eta"], [], GrammarProcessor._take
    monkeypatch.setattr(GrammarProcessor, "_take", lambda *of: looked_for.append(0) or take(*of))
    found = tokens(ask(llm, forms, temperature=0.0, max_tokens=20))
    assert 0 < len(looked_for) < 30
    monkeypatch.setattr(GrammarProcessor, "fits", lambda processor, token: False)
    assert tokens(ask(llm, forms, temperature=0.0, max_tokens=20)) == found
    assert len(looked_for) >= 60


def test_an_output_ends_exactly_where_its_form_is_complete(llm: LLM) -> None:
    (longer,) = ask(llm, [{"regex": "[0-9]{2,5}"}], n=16, temperature=1.0)
    texts = [output.text for output in longer.outputs]
    assert all(re.fullmatch("[0-9]{2,5}", text) for text in texts)
    assert {output.finish_reason for output in longer.outputs} == {"stop"}
    ends = {output.token_ids[-1] in (0, 2) for output in longer.outputs}
    assert ends == {True, False}  # at the end of text where more could follow, else without it
    # Without an end of text an output goes on as long as its form lets it.
    (forced,) = ask(llm, [{"regex": "[0-9]{2,5}"}], n=4, temperature=1.0, ignore_eos=True)
    assert {len(output.text) for output in forced.outputs} == {5}
    (least,) = ask(llm, [{"regex": "[0-9]{2,50}"}], n=4, temperature=1.0, min_tokens=8)
    assert all(len(output.token_ids) >= 8 for output in least.outputs)
    (cut,) = ask(llm, [{"regex": "[0-9]{5}"}], max_tokens=3)
    assert (cut.outputs[0].finish_reason, len(cut.outputs[0].token_ids)) == ("length", 3)
    (full,) = ask(llm, [{"choice": ["ab"]}], max_tokens=2, logit_bias={})
    assert (full.outputs[0].finish_reason, full.outputs[0].text) == ("stop", "ab")
    (stopped,) = ask(llm, [{"choice": ["xyz"]}], stop=["y"])
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].text) == ("stop", "x")


def test_contradictions_end_their_request_and_no_other(llm: LLM) -> None:
    plain = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    digits = {"regex": "[0-9]{3}"}
    contradictions = [
        SamplingParams(structured_outputs=digits, max_tokens=20, min_tokens=10),
        SamplingParams(structured_outputs=digits, allowed_token_ids=[40], temperature=0.0),
        SamplingParams(structured_outputs={"choice": ["ab"]}, bad_words=["a"], n=2),
    ]
    results = llm.generate([PROMPTS[0]] * 5, [plain, *contradictions, plain], use_tqdm=False)
    for result in results[1:4]:
        assert {output.finish_reason for output in result.outputs} == {"error"}
        assert result.error is not None
        assert "no token fits both the structured output and the request's other rules" in result.error
    expected = llm.generate([PROMPTS[0]], plain, use_tqdm=False)[0].outputs[0].token_ids
    assert [results[place].outputs[0].token_ids for place in (0, 4)] == [expected] * 2
    assert not llm.engine.has_unfinished()


def test_log_probabilities_are_the_models_own(llm: LLM) -> None:
    (result,) = ask(llm, [{"choice": ["q"]}], logprobs=3, temperature=0.0)
    (position,) = result.outputs[0].logprobs
    (token,) = result.outputs[0].token_ids
    assert position[token].logprob < 0
    assert len(position) == 4  # the best three, none of which the form allows, and the chosen one
    assert position[token].rank > 3


def test_a_processor_takes_tokens_back(llm: LLM) -> None:
    compiled = llm.engine.grammars.compile(StructuredOutputsParams(json=KINDS["object"]))
    params = SamplingParams(structured_outputs={"json": KINDS["object"]})
    processor = GrammarProcessor(ProcessorContext(params=params, prompt_token_ids=(), stop_token_ids=frozenset({2}),
                                                  grammar=compiled))  # fmt: skip
    ids = llm.get_tokenizer().encode('{"name":"a","age":3}', False)
    rows = []
    for token in ids:
        rows.append(edited(processor))
        assert rows[-1][token] == 0
        assert rows[-1][2] == -torch.inf
        processor.accept(token)
    assert processor.complete
    for token, row in zip(reversed(ids), reversed(rows), strict=True):
        processor.rollback(1)
        assert torch.equal(edited(processor), row)
        other = processor.fork()
        other.accept(token)
        assert torch.equal(edited(processor), row)
    processor.accept(ids[0])
    with pytest.raises(GrammarError, match="cannot keep the form"):
        processor.accept(ids[0])
    assert not processor.complete


def edited(processor: GrammarProcessor) -> torch.Tensor:
    row = torch.zeros(320)
    processor.edit(row)
    return row


def test_contracts_do_not_cover_forms(certify: Callable[..., Any], tmp_path: Path) -> None:
    tiny = LLM("tiny", progress=False)
    certify(tmp_path, deployment(tiny.model, tiny.engine.runner.exits, ()), 0.4, 0.3)
    tiny = LLM("tiny", progress=False, certificates=tmp_path)
    settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": 9, "quality": Quality(alpha=0.4)}
    free, formed = tiny.generate(["Once"] * 2, [SamplingParams(**settings),
        SamplingParams(structured_outputs={"regex": "[a-z ]{9,99}"}, **settings)], use_tqdm=False)  # fmt: skip
    assert free.contract is not None
    assert free.contract.certificate is not None
    assert formed.contract is not None
    assert formed.contract.certificate is None
    assert "no losses were measured on one that a grammar masks" in formed.contract.reason


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of json, json_object, regex, choice, grammar; none is given"),
        ({"json": {}, "regex": "a"}, "json and regex exclude each other"),
        ({"choice": []}, "choice must not be empty"),
        ({"choice": [""]}, "choice must hold texts, none of them empty, not ''"),
        ({"regex": 3}, "regex must be a text, not '3'"),
        ({"regex": "a", "strict": True}, "strict belong to json or json_object, not to regex"),
        ({"json": {}, "foo": 1}, "structured_outputs.foo is not supported here"),
        ({"structural_tag": "x"}, "structured_outputs.structural_tag is not supported here"),
        ("a", "structured_outputs must hold one of json"),
    ],
    ids=str,
)
def test_wrong_forms_are_named(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SamplingParams(structured_outputs=settings)


def test_vllms_classes_are_read() -> None:
    theirs = SimpleNamespace(json=None, regex="a+", choice=None, grammar=None, json_object=None, structural_tag=None,
        disable_any_whitespace=False, whitespace_pattern=None, disable_fallback=False, _backend=None)  # fmt: skip
    ours = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a+"))
    for name in ("structured_outputs", "guided_decoding"):
        assert SamplingParams(**{name: theirs}).structured_outputs == ours.structured_outputs
    with pytest.raises(ValueError, match="are the same"):
        SamplingParams(structured_outputs={"regex": "a"}, guided_decoding={"regex": "a"})
    with pytest.raises(ValueError, match=r"guided_decoding.backend is not supported"):
        SamplingParams(guided_decoding={"regex": "a", "backend": "outlines"})


def test_unusable_forms_are_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(ValueError, match="unclosed group"):
        llm.generate([PROMPTS[0]] * 2, [SamplingParams(), SamplingParams(structured_outputs={"regex": "("})])
    assert not llm.engine.has_unfinished()
