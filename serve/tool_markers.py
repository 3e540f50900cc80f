"""How a model writes calls of tools, found by rendering its chat template with calls; and the calls in its answers.

A call is a JSON object that holds the name and the arguments, with markers around it, or the name between markers and
the arguments as JSON behind it. White space is ignored where markers are compared: models vary it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..dynamic.text.chat_template import TemplateEnded
from .tool_calls import Call

Render = Callable[[Sequence[Mapping[str, Any]], bool], str]

NAME, KEY, VALUE = "fnqzname", "argqzkey", "valqzvalue"  # texts that no template holds
_DECODER = json.JSONDecoder()
PROBE = [{"type": "function", "function": {"name": NAME, "description": "", "parameters": {
    "type": "object", "properties": {KEY: {"type": "string"}}, "required": [KEY]}}}]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class CallMarkers:
    """How calls are written.

    Arguments:
        before: in front of the first call, without its white space; may be empty.
        between: between a name and its arguments; None where both are in one JSON object.
        name_key, arguments_key: of that object.
        separator: between two calls.
        end: what may follow the last one.
    """

    before: str
    between: str | None = None
    name_key: str = "name"
    arguments_key: str = "arguments"
    separator: str = ""
    end: str = ""

    def begin(self, text: str) -> tuple[int, bool]:
        """Where calls begin in a text, and whether that is certain; the text's length where they do not.

        Without a marker, a text that begins with a bracket may be a call.
        """
        if not self.before:
            begins = text.lstrip()
            return (0, begins[:1] == "{") if begins[:1] in ("", "{") else (len(text), False)
        for place, character in enumerate(text):
            if character == self.before[0]:
                end, whole = _match(text, place, self.before)
                if end is not None:
                    return place, whole
        return len(text), False

    def read(self, text: str, names: Collection[str]) -> tuple[str, list[Call]]:
        """What a text says beside calls of these functions, and the calls; all is content where a call is malformed."""
        place, certain = self.begin(text)
        if not certain:
            return text, []
        at = _match(text, place, self.before)[0] or place
        calls: list[Call] = []
        while (found := self._call(text, at, names)) is not None:
            call, at = found
            calls.append(call)
            following, whole = _match(text, at, self.separator) if self.separator else (at, True)
            if following is None or not whole or self._call(text, following, names) is None:
                break
            at = following
        if not calls:
            return text, []
        rest = "" if self.end.startswith(_packed(text[at:])) else text[at:].strip()
        return text[:place].rstrip() + rest, calls

    def _call(self, text: str, at: int, names: Collection[str]) -> tuple[Call, int] | None:
        """The call that begins here, and where it ends."""
        if self.between is None:
            found = _json(text, at)
            if found is None or not isinstance(found[0], dict):
                return None
            value, end = found
            name, arguments = value.get(self.name_key), value.get(self.arguments_key)
        else:
            at += len(text[at:]) - len(text[at:].lstrip())
            name = next((n for n in sorted(names, key=len, reverse=True) if text.startswith(n, at)), None)
            behind, whole = (None, False) if name is None else _match(text, at + len(name), self.between)
            found = _json(text, behind) if behind is not None and whole else None
            if found is None:
                return None
            arguments, end = found
        if isinstance(arguments, str):
            found = _json(arguments, 0)
            arguments = None if found is None else found[0]
        if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
            return None
        return Call(name, json.dumps(arguments, ensure_ascii=False)), end


# Of a template that does not read tools: see `introduced`.
IN_WORDS = CallMarkers(before="[", separator=",", end="]")


def derive(render: Render) -> CallMarkers | None:
    """How a template writes calls; None where that is in neither of the two ways.

    Arguments:
        render: a conversation in the template, with the tools of :data:`PROBE`; the second argument asks for the
            beginning of the next turn.

    Raises:
        TemplateEnded: it could not be rendered this time.
    """
    user = {"role": "user", "content": "q"}
    for arguments in ({KEY: VALUE}, json.dumps({KEY: VALUE})):
        texts: list[str] = []
        for count in (1, 2):
            function = {"name": NAME, "arguments": arguments}
            calls = [{"id": f"call0000{n}", "type": "function", "function": function} for n in range(count)]
            try:
                begun = render([user], True)
                text = render([user, {"role": "assistant", "content": "", "tool_calls": calls}], False)
            except TemplateEnded:
                raise
            except ValueError:  # some templates write one call only, or want arguments as text
                break
            same = next((n for n, (x, y) in enumerate(zip(begun, text, strict=False)) if x != y), len(begun))
            texts.append(text[same:])
        if texts and (markers := _in_object(*texts) or _behind_name(*texts)) is not None:
            return markers
    return None


def _in_object(one: str, two: str = "") -> CallMarkers | None:
    first, both = _objects(one), _objects(two)
    if len(first) != 1 or (two and len(both) != 2):
        return None
    begin, end, value = first[0]
    name_key = next((key for key, item in value.items() if item == NAME), None)
    arguments_key = next((key for key, item in value.items() if key != name_key and KEY in str(item)), None)
    if name_key is None or arguments_key is None:
        return None
    return CallMarkers(
        before=_packed(one[:begin]),
        name_key=name_key,
        arguments_key=arguments_key,
        separator=_packed(two[both[0][1] : both[1][0]]) if two else "",
        end=_packed(one[end:]),
    )


def _behind_name(one: str, two: str = "") -> CallMarkers | None:
    name = one.find(NAME)
    arguments, first = _arguments(one, name), _arguments(two, two.find(NAME))
    if arguments is None or (two and first is None):
        return None
    return CallMarkers(
        before=_packed(one[:name]),
        between=_packed(one[name + len(NAME) : arguments[0]]),
        separator="" if first is None else _packed(two[first[1] : two.find(NAME, first[1])]),
        end=_packed(one[arguments[1] :]),
    )


def _objects(text: str) -> list[tuple[int, int, dict[str, Any]]]:
    """The JSON objects in a text that hold the probe's name directly: where they begin and end."""
    found, at = [], 0
    while (at := text.find("{", at)) >= 0:
        value = _json(text, at)
        if value is not None and isinstance(value[0], dict) and NAME in value[0].values():
            found.append((at, value[1], value[0]))
            at = value[1]
        else:
            at += 1
    return found


def _arguments(text: str, name: int) -> tuple[int, int] | None:
    """Where the probe's arguments stand behind its name as JSON."""
    place = text.find("{", name)
    found = _json(text, place) if name >= 0 and place >= 0 else None
    return None if found is None or found[0] != {KEY: VALUE} else (place, found[1])


def _json(text: str, at: int) -> tuple[Any, int] | None:
    """The JSON value that begins here, behind white space, and where it ends."""
    begin = at + len(text[at:]) - len(text[at:].lstrip())
    try:
        return _DECODER.raw_decode(text, begin)
    except (ValueError, RecursionError):
        return None


def _packed(text: str) -> str:
    return "".join(text.split())


def _match(text: str, at: int, marker: str) -> tuple[int | None, bool]:
    """Where a marker that begins here ends, white space aside, and whether all of it is there; None if it is not."""
    left = marker
    while left:
        while at < len(text) and text[at].isspace():
            at += 1
        if at == len(text):
            return at, False
        if text[at] != left[0]:
            return None, False
        at, left = at + 1, left[1:]
    return at, True
