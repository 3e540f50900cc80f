"""What form an output must have: fields, their types, and the spellings of vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

KINDS = ("json", "json_object", "regex", "choice", "grammar")


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """The form of an output; exactly one of the first five. Names are those of vLLM.

    Arguments:
        json: a JSON schema, as a mapping or as text: the output is a JSON document that it accepts.
        json_object: the output is any JSON object.
        regex: a regular expression (Rust's syntax) that the whole output matches.
        choice: the output is one of these texts.
        grammar: a grammar in Lark's syntax, or in GBNF, the one of llama.cpp.
        whitespace_pattern: for JSON, a regular expression of the whitespace that may stand, once, wherever JSON allows
            some; None: one space.
        disable_any_whitespace: for JSON, none at all.
        strict: refuse a schema with keywords that are not enforced, instead of naming them.

    Raises:
        ValueError: naming the field that is wrong, or those that exclude each other.
    """

    json: str | Mapping[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.choice, list | tuple):
            object.__setattr__(self, "choice", tuple(self.choice))
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            found = "none is given" if not given else f"{' and '.join(given)} exclude each other"
            raise ValueError(f"structured_outputs needs exactly one of {', '.join(KINDS)}; {found}")
        for name, kinds, words in (
            ("json", (str, Mapping), "a JSON schema"),
            ("json_object", bool, "true"),
            ("regex", str, "a text"),
            ("choice", tuple, "a list of texts"),
            ("grammar", str, "a text"),
            ("whitespace_pattern", str, "a text"),
            ("disable_any_whitespace", bool, "true or false"),
            ("strict", bool, "true or false"),
        ):
            if (value := getattr(self, name)) is not None and not isinstance(value, kinds):
                raise ValueError(f"structured_outputs.{name} must be {words}, not {str(value)[:100]!r}")
        for text in self.choice or ():
            if not isinstance(text, str) or not text:
                raise ValueError(
                    f"structured_outputs.choice must hold texts, none of them empty, not {str(text)[:100]!r}"
                )
        if self.choice == ():
            raise ValueError("structured_outputs.choice must not be empty")
        if not self.is_json and (self.whitespace_pattern is not None or self.disable_any_whitespace or self.strict):
            raise ValueError(
                "structured_outputs: whitespace_pattern, disable_any_whitespace and strict belong to json or"
                f" json_object, not to {given[0]}"
            )
        if self.whitespace_pattern is not None and self.disable_any_whitespace:
            raise ValueError("structured_outputs: whitespace_pattern and disable_any_whitespace exclude each other")

    @property
    def is_json(self) -> bool:
        """Whether the output is a JSON document."""
        return self.json is not None or bool(self.json_object)


# Fields of vLLM's classes that choose its backend, or that this engine has no use for; with the values that it has.
_VLLM: dict[str, tuple[Any, ...]] = {
    "backend": (None, "auto", "guidance"),
    "backend_was_auto": (None, False, True),
    "disable_fallback": (None, False, True),
    "disable_additional_properties": (None, False),
    "structural_tag": (None,),
    "_backend": (None, "auto", "guidance"),
    "_backend_was_auto": (None, False, True),
}


def read_structured_outputs(value: Any, name: str = "structured_outputs") -> StructuredOutputsParams | None:
    """None or a :class:`StructuredOutputsParams` as it is, or one from a mapping of its fields or an object of vLLM's.

    Arguments:
        name: of the setting that holds the value, for messages.

    Raises:
        ValueError: for anything else, and for a field that is unknown or asks for what is not supported.
    """
    if value is None or isinstance(value, StructuredOutputsParams):
        return value
    found = dict(value) if isinstance(value, Mapping) else getattr(value, "__dict__", None)
    if not isinstance(found, dict):
        raise ValueError(f"{name} must hold one of {', '.join(KINDS)}, not {str(value)[:100]!r}")
    known = {item.name for item in fields(StructuredOutputsParams)}
    for field, given in found.items():
        if field in known:
            continue
        if field not in _VLLM or given not in _VLLM[field]:
            raise ValueError(f"{name}.{str(field)[:50]} is not supported here")
    return StructuredOutputsParams(**{field: given for field, given in found.items() if field in known})
