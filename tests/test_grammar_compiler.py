"""Compiling structured outputs: limits, hostile ones, what is not enforced, the cache, every kind of tokenizer."""

from __future__ import annotations

import functools
import itertools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dynamoe.dynamic.engine import grammar_compiler
from dynamoe.dynamic.engine.grammar_compiler import Compilation, GrammarCompiler, GrammarsBusy
from dynamoe.dynamic.engine.structured_limits import StructuredLimits, pattern_size, read_source
from dynamoe.dynamic.engine.structured_outputs import StructuredOutputsParams
from dynamoe.dynamic.text.no_tokenizer import NoTokenizer
from dynamoe.dynamic.text.tokenizer import Tokenizer
from structured_schemas import SMALL, UNENFORCED, closed
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

LIMITS = StructuredLimits()
# Time is not what these tests are about, and the machine may be busy.
PATIENT = StructuredLimits(compile_seconds=120.0)


@pytest.fixture(scope="module")
def tokenizer(make_checkpoint: Callable[..., Path]) -> Tokenizer:
    return Tokenizer.from_directory(make_checkpoint("mixtral"))


@pytest.fixture
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, 320, PATIENT)


def form(**settings: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**settings)


def chain(count: int, link: Callable[[int], Any]) -> dict[str, Any]:
    rules = {str(number): link(number + 1) for number in range(count)} | {str(count): {"type": "integer"}}
    return {"$ref": "#/$defs/0", "$defs": rules}


NESTED: Any = functools.reduce(lambda inner, _: closed({"a": inner}), range(200), SMALL)
HUGE = {"type": "array", "maxItems": 10**11}
HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"json": NESTED}, "nested deeper than 64"),
    ({"json": json.dumps(NESTED)}, "nested deeper than 64"),
    ({"json": "[" * 60_000}, "nested deeper than 64"),
    ({"json": {"enum": [f"value {number}" for number in range(2000)]}}, "values of enum are at most 1000, not 2000"),
    ({"json": {"anyOf": [{"enum": list(range(600))}] * 2}}, "values of enum are at most 1000, not 1200"),
    ({"json": {"enum": ["x" * 3000]}}, "enum: characters of a value are at most 2000, not 3000"),
    ({"json": {"const": [["x" * 3000]]}}, "const: characters of a value are at most 2000"),
    ({"json": closed({f"p{number}": {} for number in range(1001)})}, "properties are at most 1000, not 1001"),
    ({"json": {"description": "x" * 70_000}}, "the JSON schema has 70018 bytes, more than 65536"),
    ({"json": {"pattern": "(a{1,1000}){1,1000}"}}, "pattern: with its repetitions a pattern has more than 10000 parts"),
    ({"json": {"items": {"patternProperties": {"a" * 2000: {}}}}}, "patternProperties: characters of a pattern"),
    ({"json": {"minItems": 10**6}}, "minItems are at most 10000, not 1000000"),
    ({"json": {"type": "integer", "multipleOf": 10**9 + 7}}, "multipleOf are at most 10000"),
    (
        {"json": {"$ref": "http://127.0.0.1/x"}},
        r"\$ref must begin with #, not be 'http://127.0.0.1/x'; nothing is fetched",
    ),
    ({"json": {"items": {"$ref": "file:///etc/passwd"}}}, "nothing is fetched"),
    ({"json": chain(0, dict) | {"$defs": {"0": {"$ref": "#/$defs/0"}}}}, "no output can have this form"),
    (
        {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}}},
        "no output can have this form",
    ),
    ({"json": {"$ref": "#/$defs/missing"}}, "does not exist"),
    ({"json": {"$ref": "#/x/y", "x": {"y": HUGE}}}, r"\$ref '#/x/y' does not exist, or is no schema"),
    ({"json": {"$ref": "#/%78", "x": HUGE}}, "is no schema"),
    ({"json": {"$ref": "#/properties", "properties": {"maxItems": 10**11}}}, "is no schema"),
    ({"json": {"$ref": "#/default/0", "default": [HUGE]}}, "is no schema"),
    ({"json": {"$ref": "#a", "dependencies": {"b": {"$anchor": "a", **HUGE}}}}, "'#a' does not exist"),
    ({"json": {"items": {"$id": "http://x/", "$ref": "#/items/0", "items": {"0": HUGE}}}}, r"has an \$id"),
    ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "Unsatisfiable"),
    ({"json": closed({"a": False})}, "unsatisfiable"),
    ({"json": {"type": "strin"}}, "Invalid type: strin"),
    ({"json": "{"}, "is no JSON"),
    ({"json": "[]"}, "must be an object, not"),
    ({"json": {"const": float("nan")}}, "is no JSON"),
    ({"json": {"const": "\ud800"}}, "lone surrogates"),
    ({"json": {"x-guidance": {}}}, "x-guidance in a JSON schema is not supported"),
    ({"json": {}, "whitespace_pattern": "("}, "unclosed group"),
    ({"regex": "((a{1,1000}){1,1000}){1,1000}"}, "more than 10000 parts"),
    ({"regex": "(" * 400 + "a" + ")" * 400}, "nest"),
    ({"regex": "(?=a)b"}, "look-around"),
    ({"regex": "a" * 1025}, "characters of a pattern are at most 1024"),
    ({"regex": ""}, "regex must not be empty"),
    ({"choice": [str(number) for number in range(1001)]}, "choices are at most 1000, not 1001"),
    ({"choice": ["x" * 2001]}, "choice: characters of a value are at most 2000"),
    ({"grammar": "start: " + "(" * 9000 + '"a"' + ")" * 9000}, "nested"),
    ({"grammar": "root ::= " + "(" * 9000 + '"a"' + ")" * 9000}, "nested too deeply"),
    ({"grammar": 'start: ("a"~1..20000)'}, "repetitions are at most 10000"),
    ({"grammar": "start: A\nA: /(a{1,500}){1,500}/"}, "more than 10000 parts"),
    ({"grammar": "start: A\nA: /(a{1,500}\n){1,500}/"}, "more than 10000 parts"),
    ({"grammar": 'start: <"> A "\nA: /(a{1,500}){1,500}/'}, "more than 10000 parts"),
    ({"grammar": f"start: %json {json.dumps(HUGE)}"}, "%json in a grammar is not supported; use json"),
    ({"grammar": f'start: "{"x" * 2001}"'}, "grammar: characters of a text are at most 2000, not 2001"),
    ({"grammar": "start: a\n/" + "\\/" * 32_000}, "characters of a pattern are at most 1024"),
    ({"grammar": "\n" * 64_000 + "nothing"}, "the grammar cannot be read"),
    ({"grammar": "start: missing"}, "unknown name"),
    ({"grammar": "nothing"}, "the grammar cannot be read"),
    ({"grammar": "start: " + " ".join(['("a"|"b")?'] * 3000)}, "no output can have this form: .*Too many items"),
]


@pytest.mark.parametrize(("settings", "message"), HOSTILE, ids=lambda v: str(v)[:50])
def test_hostile_and_wrong_forms_are_refused(compiler: GrammarCompiler, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compiler.compile(form(**settings))


DEEP_RULES = "\n".join(["start: a0", *(f"a{number}: a{number + 1}" for number in range(4500)), 'a4500: "b"'])
LARGE: list[dict[str, Any]] = [
    {"json": chain(1500, lambda following: {"items": {"$ref": f"#/$defs/{following}"}})},
    {"json": chain(900, lambda following: {"allOf": [{"$ref": f"#/$defs/{following}"}]})},
    {"grammar": DEEP_RULES},
    {"json": closed({f"p{number}": {"type": "string"} for number in range(1000)})},
    {"json": {"enum": [f"value {number}" for number in range(1000)]}},
    {"json": {"type": "string", "minLength": 10**9}},
    {"json": functools.reduce(lambda inner, _: closed({"a": inner}), range(60), SMALL)},
    {"choice": [f"choice {number}" for number in range(1000)]},
]


@pytest.mark.parametrize("settings", LARGE, ids=lambda value: str(value)[:40])
def test_the_largest_forms_within_the_limits_compile(compiler: GrammarCompiler, settings: dict[str, Any]) -> None:
    """The first and the third exhaust an ordinary stack."""
    matcher = compiler.compile(form(**settings)).matcher.deep_copy()
    assert any(matcher.compute_bitmask())
    assert not matcher.is_error()


@pytest.mark.parametrize(
    "reference",
    ["#", "#/properties/a~1b%25", "#/%24defs/%61~0%20", "#/prefixItems/1/anyOf/0", "#here", "#/additionalProperties"],
)
def test_references_lead_to_any_schema(compiler: GrammarCompiler, reference: str) -> None:
    schema = {
        "properties": {"a/b%": SMALL},
        "$defs": {"a~ ": {"$anchor": "here"}},
        "prefixItems": [{"$ref": reference}, {"anyOf": [{}]}],
        "additionalProperties": True,
    }
    assert compiler.compile(form(json=schema)).ignored == ()


def test_texts_and_patterns_in_grammars_may_hold_anything(compiler: GrammarCompiler) -> None:
    """Their parts are told apart as the library does it."""
    lark = 'start: "/" A B // a "\nA: /"[#] {2}/ # /\nB: "# \\" /" | /a\\/"/'
    gbnf = 'root ::= [^"/] "/" [-+*/] "\\"" "x" # a "\n' + f"# {'y' * 3000}"
    for grammar in (lark, gbnf):
        assert compiler.compile(form(grammar=grammar)).matcher is not None


@pytest.mark.parametrize(
    ("schema", "names"), UNENFORCED, ids=lambda value: str(sorted(value) if isinstance(value, set) else value)[:40]
)
def test_keywords_that_are_not_enforced_are_named(
    compiler: GrammarCompiler, schema: dict[str, Any], names: set[str]
) -> None:
    assert set(compiler.compile(form(json=schema)).ignored) == names
    with pytest.raises(
        ValueError, match=f"strict, and these keywords are not (fully )?enforced: .*({'|'.join(names)})"
    ):
        compiler.compile(form(json=schema, strict=True))


def test_additional_keys_cannot_spell_a_listed_one(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"a": SMALL}, "required": ["a"], "additionalProperties": {"type": "null"}}
    matcher = compiler.compile(form(json=schema)).matcher

    def fits(text: str) -> bool:
        copy, ids = matcher.deep_copy(), tokenizer.encode(text, False)
        return copy.try_consume_tokens(ids) == len(ids) and copy.is_accepting()

    assert fits('{"a":1,"b":null}')
    assert not fits('{"a":1,"\\u0061":null}')
    assert not fits('{"a":1,"a":null}')


def test_a_form_is_compiled_once(compiler: GrammarCompiler) -> None:
    wanted = [form(json={"type": "object"}), form(json='{ "type": "object" }'), form(json_object=True)]
    found: list[Any] = []
    threads = [threading.Thread(target=lambda w=w: found.append(compiler.compile(w))) for w in wanted * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    assert len({id(one.matcher) for one in found}) == 12  # every request has one of its own
    assert compiler.checks == 1
    for _ in range(3):  # so is one that cannot be
        with pytest.raises(ValueError, match="unclosed group"):
            compiler.compile(form(regex="("))
    assert compiler.checks == 2
    # The order of properties is the one in which they are written, so that it matters.
    for names in ("ab", "ba"):
        compiler.compile(form(json=closed(dict.fromkeys(names, SMALL))))
    assert compiler.checks == 4


def test_outputs_of_other_requests_do_not_use_up_a_grammar(
    compiler: GrammarCompiler, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_compiler, "_LEXER_STATES", 600)
    lengths = []
    (quote,), (letter,) = tokenizer.encode('"', False), tokenizer.encode("q", False)
    for _ in range(3):
        matcher = compiler.compile(form(json={"type": "string", "maxLength": 3000})).matcher
        matcher.consume_token(quote)
        lengths.append(0)
        while any(matcher.compute_bitmask()) and not matcher.is_error() and matcher.consume_token(letter):
            lengths[-1] += 1
    assert lengths[0] == lengths[1] == lengths[2] > 10


def test_the_cache_is_bounded(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, 320, StructuredLimits(cache_bytes=200_000, compile_seconds=120.0))
    for number in range(10):
        compiler.compile(form(choice=[str(number)]))
    assert compiler._size <= 200_000
    assert 1 <= len(compiler._known) <= 3
    compiler.compile(form(choice=["9"]))
    assert compiler.checks == 10
    compiler.compile(form(choice=["0"]))
    assert compiler.checks == 11


def test_a_known_form_is_not_compiled_to_be_checked(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.check(form(regex="a"))
    with pytest.raises(ValueError, match="unclosed group"):
        compiler.check(form(regex="("))
    monkeypatch.setattr(GrammarCompiler, "compile", None)
    compiler.check(form(regex="a"))
    with pytest.raises(ValueError, match="unclosed group"):
        compiler.check(form(regex="("))


def test_without_room_for_a_thread_nobody_waits(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(GrammarsBusy, match="cannot be compiled now"):
            compiler.compile(form(regex="a"))
    assert compiler.compile(form(regex="a")).matcher is not None


def test_one_grammar_is_kept_in_stock(compiler: GrammarCompiler) -> None:
    compiler._threads = compiler.limits.compile_threads  # none is started
    for _ in range(3):
        compiler._restock(read_source(form(regex="a"), LIMITS))
    assert len(compiler._waiting) == 1


@pytest.mark.parametrize("slow_itself", [True, False])
def test_what_takes_too_long_is_refused_and_those_behind_it_may_come_again(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, slow_itself: bool
) -> None:
    """It stays refused only if the time was its own."""
    compiler = GrammarCompiler(tokenizer, 320, StructuredLimits(compile_seconds=0.2, compile_threads=1))
    compiler.prepare()
    release, check = threading.Event(), GrammarCompiler._checked

    def slow(self: GrammarCompiler, source: Any) -> Any:
        release.wait(60)
        return check(self, source)

    monkeypatch.setattr(GrammarCompiler, "_checked", slow)
    with pytest.raises(ValueError, match=r"too complex: it takes longer than 0\.2 s"):
        compiler.compile(form(regex="a"))
    with pytest.raises(GrammarsBusy):
        compiler.compile(form(regex="b"))
    assert not compiler._waiting  # nobody waits for it
    if slow_itself:
        monkeypatch.setattr(time, "thread_time", itertools.count(1000).__next__)
    release.set()
    behind = compiler.start(read_source(form(regex="b"), LIMITS))
    assert behind.future.result(60).matcher is not None
    first = compiler.start(read_source(form(regex="a"), LIMITS))
    if slow_itself:
        with pytest.raises(ValueError, match="too complex"):  # as before, without another attempt
            first.future.result(60)
    else:
        assert first.future.result(60).matcher is not None


def test_a_form_that_compiled_before_is_not_refused_for_the_time_it_takes(compiler: GrammarCompiler) -> None:
    wanted = form(regex="a")
    compiler.compile(wanted)
    job = Compilation(read_source(wanted, LIMITS), begun=time.monotonic() - 1000)
    assert isinstance(compiler.late(job), GrammarsBusy)
    job.future.cancel()
    assert compiler.late(job) is None
    assert compiler.compile(wanted).matcher is not None


def test_without_a_tokenizer_forms_are_refused(tmp_path: Path) -> None:
    compiler = GrammarCompiler(NoTokenizer(tmp_path, 320), 320, LIMITS)
    with pytest.raises(ValueError, match="need the model's tokenizer"):
        compiler.compile(form(regex="a"))


def sentencepiece(tmp_path: Path) -> Tokenizer:
    """Llama's kind: words with a mark for the space in front of them, and bytes for all else."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["▁", *'{}":,0123456789abcdefghijklmnopqrstuvwxyz', "▁a", "ab", "▁ab", '":', '{"', "▁{"]
    merges = [("▁", "a"), ("a", "b"), ("▁", "ab"), ('"', ":"), ("{", '"'), ("▁", "{")]
    backend = Backend(models.BPE({n: i for i, n in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # type: ignore
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)  # type: ignore[assignment]
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend, {"eos_token": "</s>"}, {}, tmp_path)


def test_tokenizers_with_marks_for_spaces(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path)
    size = tokenizer.vocab_size + 7  # some models have more rows than tokens
    compiler = GrammarCompiler(tokenizer, size, PATIENT)
    matcher = compiler.compile(form(json={"const": {"ab é": "ab"}})).matcher.deep_copy()
    names = ['{"', "ab", "▁", "<0xC3>", "<0xA9>", '":', '"', "a", "b", '"', "}"]
    ids = [tokenizer.backend.token_to_id(name) for name in names]
    assert tokenizer.decode(ids) == '{"ab é":"ab"}'
    for token in ids:
        assert matcher.consume_token(token), matcher.get_error()
    assert matcher.is_stopped()
    spaced = compiler.compile(form(regex=" ?ab{1,2} a")).matcher.deep_copy()
    for name in ("▁ab", "b", "▁a"):
        assert spaced.consume_token(tokenizer.backend.token_to_id(name))
    assert spaced.is_stopped()


def test_texts_are_not_written_with_tokens_that_end_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the tokenizer see the whole of a long text at every step."""
    tokenizer, encode, lengths = sentencepiece(tmp_path), Tokenizer.encode, []

    def counted(self: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
        lengths.append(len(text))
        return encode(self, text, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode", counted)
    end, ab = (tokenizer.backend.token_to_id(name) for name in ("</s>", "ab"))
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, PATIENT, frozenset({ab}))
    text = "x</s>ab" + "y" * 700
    matcher, ids = compiler.compile(form(json={"const": text})).matcher.deep_copy(), []
    while not matcher.is_stopped():
        bits = matcher.compute_bitmask()
        ids.append(next(token for token in range(len(bits) * 8) if bits[token // 8] >> token % 8 & 1))
        assert matcher.consume_token(ids[-1]), matcher.get_error()
    assert b"".join(tokenizer.token_bytes(token) or b"" for token in ids).decode() == f'"{text}"'
    assert not {end, ab} & set(ids)
    assert 512 <= max(lengths) <= 513


@pytest.mark.parametrize(
    ("pattern", "size"),
    [("abc", 3), ("a{3}", 3), ("(ab){2,5}", 10), (r"\d{4}-[0-9a]{2}", 7), ("[]{9}a]{2}", 2),
     ("((a{10}){10}){10}", 1000), ("x{3,}", 3), ("a{99999999999}", 999_999_999), (r"\(a\){2}", 4)],
)  # fmt: skip
def test_the_size_of_a_pattern_counts_its_repetitions(pattern: str, size: int) -> None:
    assert pattern_size(pattern) == size
