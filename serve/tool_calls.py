"""Calls of tools, read from the text of an answer that is a list of them."""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass, field

# The beginning of a call, up to its arguments; what an answer holds between two calls.
_HEAD = re.compile(r'\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"arguments"\s*:\s*')
_BETWEEN = " \n\r\t[],}"


@dataclass(slots=True)
class Call:
    """One call in an answer, as far as it is there."""

    name: str
    arguments: str = ""
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


@dataclass(slots=True)
class CallReader:
    """Finds the calls in a growing text of the form of :func:`.tools.calls_schema`, whole or cut off."""

    calls: list[Call] = field(default_factory=list)
    _head: str = ""  # of a call, until its arguments begin
    _depth: int = 0  # of the brackets that are open in its arguments
    _in_string: bool = False
    _escaped: bool = False

    def add(self, text: str) -> list[tuple[int, bool, str]]:
        """Take more text; returns what it adds: (number of the call, whether it is new, more of its arguments)."""
        found: list[tuple[int, bool, str]] = []
        while text:
            if self._depth:
                length = self._length_of_arguments(text)
                self.calls[-1].arguments += text[:length]
                found.append((len(self.calls) - 1, False, text[:length]))
                text = text[length:]
                continue
            if not self._head:
                text = text.lstrip(_BETWEEN)
            self._head += text
            head = _HEAD.match(self._head)
            rest = self._head[head.end() :] if head else ""
            if head is None or not rest:
                return found
            self._head, text = "", rest
            self.calls.append(Call(json.loads(f'"{head[1]}"')))
            found.append((len(self.calls) - 1, True, ""))
            self._depth = 1
            self.calls[-1].arguments += text[0]
            found.append((len(self.calls) - 1, False, text[0]))
            text = text[1:]
        return found

    def _length_of_arguments(self, text: str) -> int:
        """How much of a text belongs to the arguments that are open."""
        for place, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    return place + 1
        return len(text)
