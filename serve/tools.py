"""Tools: what a request says about them, and the form of an answer that must call them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..dynamic.engine.structured_limits import SCHEMA_MAPS
from ..dynamic.engine.structured_outputs import StructuredOutputsParams
from .errors import invalid
from .structured import FIELDS
from .wire.openai import ChatCompletionRequest, Tool

MAX_CALLS = 16  # in one answer
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request says about tools.

    Arguments:
        tools: as chat templates read them; empty where the model must not call any.
        form: of the answer, which is a list of calls; None where the model may call or not.
    """

    tools: list[dict[str, Any]]
    form: StructuredOutputsParams | None = None

    @property
    def names(self) -> frozenset[str]:
        """Of the functions."""
        return frozenset(tool["function"]["name"] for tool in self.tools)


def plain_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as chat templates read them.

    Raises:
        ApiError: status 400 for two of one name, or a name or parameters that cannot be.
    """
    names = [tool.function.name for tool in tools]
    for number, tool in enumerate(tools):
        name, parameters = names[number], tool.function.parameters
        if not _NAME.fullmatch(name):
            message = f"tools[{number}]: a name has 1 to 64 letters, digits, _, . or -, unlike {name[:80]!r}."
            raise invalid(message, param="tools")
        if name in names[:number]:
            raise invalid(f"tools[{number}]: there are two functions {name!r}.", "tools")
        if parameters is not None and parameters.get("type", "object") != "object":
            raise invalid(f"tools[{number}]: the parameters of {name!r} must be of type object.", "tools")
    return [tool.model_dump(exclude_none=True) for tool in tools]


def tool_use(body: ChatCompletionRequest) -> ToolUse | None:
    """What a request says about tools; None if the model must not call any.

    Raises:
        ApiError: status 400 that names the field.
    """
    choice, tools = body.tool_choice, plain_tools(body.tools or ())
    if choice == "none" or (not tools and choice in (None, "auto")):
        return None
    if not tools:
        raise invalid("tool_choice needs tools.", param="tool_choice")
    if others := [name for name in FIELDS if getattr(body, name) not in (None, "", {"type": "text"})]:
        raise invalid(f"tools and {others[0]} exclude each other unless tool_choice is none.", param=others[0])
    if body.echo:
        raise invalid("echo and tools exclude each other unless tool_choice is none.", param="echo")
    if choice in (None, "auto"):
        return ToolUse(tools)
    callable_, most = tools, 1 if body.parallel_tool_calls is False else MAX_CALLS
    if isinstance(choice, Mapping):
        name = _named(choice)
        callable_, most = [tool for tool in tools if tool["function"]["name"] == name], 1
        if not callable_:
            raise invalid(f"tool_choice: there is no function {name[:80]!r} in tools.", param="tool_choice")
    elif choice != "required":
        raise invalid(f"tool_choice must be none, auto, required or a function, not {choice[:50]!r}.", "tool_choice")
    strict = any(tool["function"].get("strict") for tool in callable_)
    schema = calls_schema([tool["function"] for tool in callable_], most)
    return ToolUse(tools, StructuredOutputsParams(json=schema, strict=strict))


def _named(choice: Mapping[str, Any]) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if choice.get("type") != "function" or not isinstance(name, str) or set(choice) != {"type", "function"}:
        message = 'tool_choice must be none, auto, required or {"type": "function", "function": {"name": …}}.'
        raise invalid(message, param="tool_choice")
    return name


def calls_schema(functions: Sequence[Mapping[str, Any]], most: int) -> dict[str, Any]:
    """The JSON schema of a list of calls of these functions, at least one and at most so many."""
    calls, parameters = [], {}
    for number, function in enumerate(functions):
        place = f"arguments{number}"
        own = {**_NO_PARAMETERS, **(function.get("parameters") or {})}
        parameters[place] = _moved({name: own[name] for name in own if name not in ("$id", "$schema")}, place)
        properties = {"name": {"const": function["name"]}, "arguments": {"$ref": f"#/$defs/{place}"}}
        calls.append({
            "type": "object",
            "properties": properties,
            "required": ["name", "arguments"],
            "additionalProperties": False,
        })  # fmt: skip
    items = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {"type": "array", "items": items, "minItems": 1, "maxItems": most, "$defs": parameters}


def _moved(schema: Any, place: str, named: bool = False) -> Any:
    """A schema whose references within itself hold where it is one of ``$defs``; or, ``named``, schemas by name."""
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {}
    for name, value in schema.items():
        if named:
            moved[name] = _moved(value, place)
        elif name == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
            moved[name] = f"#/$defs/{place}{value[1:]}"
        elif name in ("const", "enum", "default", "examples"):
            moved[name] = value
        else:
            moved[name] = _moved(value, place, named=name in SCHEMA_MAPS)
    return moved
