"""What a schema, a pattern or a grammar may ask for before any of it is compiled."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import unquote

from ...kernels.api.ranges import check_ranges
from .structured_outputs import StructuredOutputsParams

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
WHITESPACE = " "  # where JSON allows some; weak models would go on with more of it for ever
_LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
# Of keywords whose values map names to schemas.
SCHEMA_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_SINGLE = frozenset({"additionalProperties", "additionalItems", "contains", "propertyNames", "contentSchema"})
_SINGLE |= {"not", "if", "then", "else", "unevaluatedItems", "unevaluatedProperties"}
_COUNTS = ("minItems", "maxItems", "minProperties", "maxProperties")
# One piece of a regular expression: an escape, a class, a bracket, a count, or any other character.
_PIECES = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(?P<least>\d+)(?:,(?P<most>\d*))?\}|.", re.DOTALL)
# Parts of a grammar in which nothing else begins: comments, texts, special tokens and patterns, or character classes.
_LARK_SPANS = re.compile(r'(?:#|//)[^\n]*|"(?:\\.|[^"\\\n])*"?|<[^<>\s]+>|/(?:\\.|[^/\\])+/?')
_GBNF_SPANS = re.compile(r'#[^\n]*|"(?:\\.|[^"\\])*"?|\[(?:\\.|[^\]\\])*\]?')
_LARK = re.compile(r"^[^\S\n]*(?:%llguidance\b|start\s*:)", re.MULTILINE)  # as the library tells it from GBNF


@dataclass(frozen=True, kw_only=True)
class StructuredLimits:
    """Structured outputs: what one may ask for, and what compiling them may cost.

    Arguments:
        max_bytes: size of a schema, a list of choices, a pattern or a grammar.
        max_depth: nesting of schemas in a schema.
        max_properties: properties in a schema, all objects together.
        max_enum: values in all its ``enum`` together, or choices.
        max_literal: characters in one of these values, in a ``const`` or in a choice.
        max_pattern: characters in one regular expression.
        max_repeats: its size with all counted repetitions written out; also ``minItems``, ``maxItems``,
            ``minProperties`` and ``maxProperties``.
        max_multiple: largest whole number in ``multipleOf``.
        compile_seconds: how long compiling may take.
        compile_threads: how many are compiled at once.
        cache_bytes: estimated size of the compiled ones that are kept.
    """

    max_bytes: int = 64 * 1024
    max_depth: int = 64
    max_properties: int = 1000
    max_enum: int = 1000
    max_literal: int = 2000
    max_pattern: int = 1024
    max_repeats: int = 10_000
    max_multiple: int = 10_000
    compile_seconds: float = 2.0
    compile_threads: int = 2
    cache_bytes: int = 64 * 1024 * 1024

    def __post_init__(self) -> None:
        check_ranges(self, *(item.name for item in fields(self)), where="engine.structured.", above=0)


@dataclass(frozen=True, slots=True)
class GrammarSource:
    """A form of outputs within the limits: the key of its compiled grammar.

    Arguments:
        kind: ``json``, ``regex``, ``choice``, ``lark`` or ``gbnf``.
        text: the schema as JSON, the pattern, the choices as JSON, or the grammar.
        whitespace: a regular expression; empty for none.
        strict: see :class:`StructuredOutputsParams`.
        loose: keywords that are enforced only in part.
    """

    kind: str
    text: str
    whitespace: str = ""
    strict: bool = False
    loose: tuple[str, ...] = ()


def read_source(wanted: StructuredOutputsParams, limits: StructuredLimits) -> GrammarSource:
    """Check a form of outputs against the limits. Its cost is linear in its size.

    Raises:
        ValueError: naming what is wrong or too large.
    """
    if wanted.regex is not None:
        _check_size("regex", wanted.regex, limits)
        _check_pattern("regex", wanted.regex, limits)
        return GrammarSource("regex", wanted.regex)
    if wanted.choice is not None:
        _at_most("choice: choices", len(wanted.choice), limits.max_enum)
        _check_literals("choice", wanted.choice, limits)
        text = json.dumps(wanted.choice, ensure_ascii=False)
        _check_size("choice", text, limits)
        return GrammarSource("choice", text)
    if wanted.grammar is not None:
        _check_size("grammar", wanted.grammar, limits)
        kind = "lark" if _LARK.search(wanted.grammar) else "gbnf"
        _check_grammar(wanted.grammar, _LARK_SPANS if kind == "lark" else _GBNF_SPANS, limits)
        return GrammarSource(kind, wanted.grammar)
    whitespace = WHITESPACE if wanted.whitespace_pattern is None else wanted.whitespace_pattern
    _check_pattern("whitespace_pattern", whitespace, limits)
    schema, text = _read_schema(ANY_OBJECT if wanted.json is None else wanted.json, limits)
    tally = _Tally(limits)
    try:
        tally.walk(schema, 1)
        tally.check_references(schema)
    except RecursionError:
        raise ValueError(f"the JSON schema is nested deeper than {limits.max_depth}") from None
    loose = tuple(sorted(tally.loose))
    if loose and wanted.strict:
        raise ValueError(f"the JSON schema is strict, and these keywords are not fully enforced: {', '.join(loose)}")
    return GrammarSource("json", text, "" if wanted.disable_any_whitespace else whitespace, wanted.strict, loose)


def _read_schema(given: str | Mapping[str, Any], limits: StructuredLimits) -> tuple[Mapping[str, Any], str]:
    """A schema and its canonical text, which keeps the order of keys: properties are written in it."""
    schema: Any = given
    try:
        if isinstance(given, str):
            _check_size("the JSON schema", given, limits)
            schema = json.loads(given)
        text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except RecursionError:
        raise ValueError(f"the JSON schema is nested deeper than {limits.max_depth}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"the JSON schema is no JSON: {str(error)[:200]}") from None
    if not isinstance(schema, Mapping):
        raise ValueError(f"the JSON schema must be an object, not {text[:100]}")
    _check_size("the JSON schema", text, limits)
    if "x-guidance" in schema:
        raise ValueError("x-guidance in a JSON schema is not supported; use whitespace_pattern")
    return schema, text


class _Tally:
    """Counts what a schema holds, as far as its parts are schemas themselves."""

    def __init__(self, limits: StructuredLimits) -> None:
        self._limits = limits
        self._properties = 0
        self._values = 0
        self._walked: set[int] = set()  # addresses of the schemas that have been counted
        self._anchors: set[str] = set()
        self._references: list[str] = []
        self._inner_id = False  # there is a schema with an id of its own, against which its references are read
        self.loose: set[str] = set()

    def walk(self, schema: Any, depth: int) -> None:
        if not isinstance(schema, Mapping):
            return
        limits = self._limits
        if depth > limits.max_depth:
            raise ValueError(f"the JSON schema is nested deeper than {limits.max_depth}")
        self._walked.add(id(schema))
        self._inner_id |= depth > 1 and any(isinstance(schema.get(name), str) for name in ("$id", "id"))
        for name, value in schema.items():
            self._keyword(name, value)
            if name in SCHEMA_MAPS and isinstance(value, Mapping):
                for part in value.values():
                    self.walk(part, depth + 1)
            elif name in _LISTS or (name == "items" and isinstance(value, list)):
                for part in value if isinstance(value, list) else ():
                    self.walk(part, depth + 1)
            elif name in _SINGLE or name == "items":
                self.walk(value, depth + 1)
        required = schema.get("required")
        least = schema.get("minProperties")
        if isinstance(least, int) and least > max(1, len(required) if isinstance(required, list) else 0):
            self.loose.add("minProperties")  # keys that are not listed may be repeated

    def check_references(self, root: Any) -> None:
        """Refuse references to what has not been counted: the library follows them to any part of the document.

        Raises:
            ValueError: naming the first.
        """
        for reference in self._references:
            if self._inner_id:
                raise ValueError("the JSON schema: $ref is not supported where a schema within it has an $id")
            found = unquote(reference[1:])
            if not (_is_walked(root, found, self._walked) if found[:1] in ("", "/") else found in self._anchors):
                raise ValueError(f"the JSON schema: $ref {reference[:100]!r} does not exist, or is no schema")

    def _keyword(self, name: str, value: Any) -> None:
        limits = self._limits
        if name in ("properties", "patternProperties") and isinstance(value, Mapping):
            self._properties += len(value)
            _at_most("the JSON schema: properties", self._properties, limits.max_properties)
        if name == "patternProperties" and isinstance(value, Mapping):
            for pattern in value:
                _check_pattern("patternProperties", pattern, limits)
        elif name == "enum" and isinstance(value, list):
            self._values += len(value)
            _at_most("the JSON schema: values of enum", self._values, limits.max_enum)
            _check_literals("enum", value, limits)
        elif name == "const":
            _check_literals("const", [value], limits)
        elif name == "pattern" and isinstance(value, str):
            _check_pattern("pattern", value, limits)
        elif name in _COUNTS and isinstance(value, int):
            _at_most(f"the JSON schema: {name}", value, limits.max_repeats)
        elif name == "multipleOf" and isinstance(value, int):
            _at_most("the JSON schema: multipleOf", value, limits.max_multiple)
        elif name == "$ref" and isinstance(value, str):
            if not value.startswith("#"):
                raise ValueError(f"the JSON schema: $ref must begin with #, not be {value[:100]!r}; nothing is fetched")
            self._references.append(value)
        elif name in ("$anchor", "$dynamicAnchor") and isinstance(value, str):
            self._anchors.add(value)


def _is_walked(part: Any, pointer: str, walked: set[int]) -> bool:
    """Whether a JSON pointer leads from here to a schema that has been counted."""
    for piece in pointer.split("/")[1:]:
        key = piece.replace("~1", "/").replace("~0", "~")
        if isinstance(part, list) and key.isdecimal() and len(key) < 10 and int(key) < len(part):
            part = part[int(key)]
        elif isinstance(part, Mapping) and key in part:
            part = part[key]
        else:
            return False
    return isinstance(part, bool) or id(part) in walked


def _check_size(what: str, text: str, limits: StructuredLimits) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{what} must not hold lone surrogates") from None
    if size > limits.max_bytes:
        raise ValueError(f"{what} has {size} bytes, more than {limits.max_bytes}")
    if not text:
        raise ValueError(f"{what} must not be empty")


def _at_most(what: str, count: int, most: int) -> None:
    if count > most:
        raise ValueError(f"{what} are at most {most}, not {count}")


def _check_literals(what: str, values: Iterable[Any], limits: StructuredLimits) -> None:
    for value in values:
        size = len(value if isinstance(value, str) else json.dumps(value))
        _at_most(f"{what}: characters of a value", size, limits.max_literal)


def _check_pattern(what: str, pattern: str, limits: StructuredLimits) -> None:
    _at_most(f"{what}: characters of a pattern", len(pattern), limits.max_pattern)
    size = pattern_size(pattern)
    if size > limits.max_repeats:
        raise ValueError(f"{what}: with its repetitions a pattern has more than {limits.max_repeats} parts")


def pattern_size(pattern: str) -> int:
    """About how many parts a regular expression has once its counted repetitions are written out."""
    sizes = [0]  # of the open groups
    last = 0  # of the newest part
    for piece in _PIECES.finditer(pattern):
        text = piece.group()
        if text[0] == "(":
            sizes.append(0)
            last = 0
        elif text == ")" and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        elif piece["least"] is not None:
            count = max(int(piece["least"][:9]), int((piece["most"] or "0")[:9]))
            sizes[-1] += last * max(0, count - 1)
            last *= max(1, count)
        elif text not in "?*+|^$":
            last = 1
            sizes[-1] += 1
    return sum(sizes)


def _check_grammar(text: str, spans: re.Pattern[str], limits: StructuredLimits) -> None:
    """Bound the texts, the regular expressions and the repetitions in a grammar; the library bounds its nesting."""
    if "%json" in text:
        raise ValueError("%json in a grammar is not supported; use json")
    for found in spans.finditer(text):
        span = found.group()
        if span[0] == '"':
            _at_most("grammar: characters of a text", len(span) - 2, limits.max_literal)
        elif span[0] == span[-1] == "/" and span[1:2] not in ("", "/"):
            _check_pattern("grammar", span[1:-1], limits)
    for count in re.findall(r"(?:\{|~|,|\.\.)\s*(\d+)", text):
        _at_most("grammar: repetitions", int(count[:9]), limits.max_repeats)
