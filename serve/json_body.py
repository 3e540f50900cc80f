"""Request bodies from bytes to validated models. Counts of the bytes bound what a body can cause before values are made
of them; the first error ends the validation; large bodies are not parsed on the event loop's thread."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Never, Protocol

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from .errors import describe_problems, invalid
from .settings import Limits

ON_LOOP_BYTES = 16 * 1024  # a body up to this size is parsed on the event loop, which takes less than changing threads
MAX_STRINGS = 1 << 16  # keys included
MAX_CONTAINERS = 1 << 16  # lists and objects
MAX_ENTRIES = 4096  # of a list or object for which the limits have no number
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class Runner(Protocol):
    """Calls a function in another thread."""

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Awaitable[Any]: ...


def check_shape(body: bytes, limits: Limits) -> None:
    """Bound the number of values and their nesting. Costs a few passes over the bytes, whatever they hold.

    Raises:
        ApiError: status 400.
    """
    # Without escaped backslashes and quotes every quote begins or ends a string, so that each second part lies outside.
    bare = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if bare.count(b'"') > 2 * MAX_STRINGS:
        raise invalid(f"The body holds more than {MAX_STRINGS} strings.", code="body_too_complex")
    outside = b"".join(bare.split(b'"')[::2])
    containers = outside.count(b"[") + outside.count(b"{")
    if containers > MAX_CONTAINERS:
        raise invalid(f"The body holds more than {MAX_CONTAINERS} lists and objects.", code="body_too_complex")
    if containers + outside.count(b",") > limits.max_json_values:
        raise invalid(f"The body holds more than {limits.max_json_values} values.", code="body_too_complex")
    depth = 0
    for bracket in outside.translate(None, _NOT_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth < 0:
            raise invalid("The body is not valid JSON: it closes more lists and objects than it opens.")
        if depth > limits.max_json_depth:
            raise invalid(f"The body is nested deeper than {limits.max_json_depth}.", code="body_too_complex")


def parse_json(body: bytes, limits: Limits) -> Any:
    """The value of a JSON text, bounded by :func:`check_shape`.

    Raises:
        ApiError: status 400.
    """
    check_shape(body, limits)
    try:
        return json.loads(body.decode("utf-8-sig"), parse_constant=_no_number)
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at position {error.pos}"
    except UnicodeDecodeError as error:
        problem = f"no UTF-8 at position {error.start}"
    except ValueError as error:  # a number of thousands of digits; or _no_number
        problem = str(error).partition(";")[0]
    raise invalid(f"The body is not valid JSON: {problem}.")


def _no_number(name: str) -> Never:
    raise ValueError(f"{name} is no JSON number")


@dataclass(frozen=True, kw_only=True)
class BodyReader:
    """Turns bodies into the models of their routes.

    Arguments:
        limits: set by the operator.
        run: calls a function in the thread for large bodies.
    """

    limits: Limits
    run: Runner

    async def read(self, model: type[BaseModel], body: bytes) -> BaseModel:
        """Parse and validate a body.

        Raises:
            ApiError: status 400 that names the first problem.
        """
        if len(body) <= ON_LOOP_BYTES:
            return self._read(model, body)
        return await self.run(self._read, model, body)

    def _read(self, model: type[BaseModel], body: bytes) -> BaseModel:
        fields = parse_json(body, self.limits)
        if not isinstance(fields, dict):
            raise invalid("The body must be a JSON object.")
        self._bound(fields)
        try:
            return model.model_validate(fields)
        except ValidationError as error:
            raise describe_problems(error.errors(include_url=False, include_input=False)) from None

    def _bound(self, fields: dict[str, Any]) -> None:
        """Refuse lists that are too long to be validated, also in fields that no model knows."""
        most = {
            "messages": self.limits.max_messages,
            "input": self.limits.max_messages,
            "tools": self.limits.max_tools,
            "stop": self.limits.max_stop,
            "stop_sequences": self.limits.max_stop,
            "stop_token_ids": self.limits.max_stop_token_ids,
            "logit_bias": self.limits.max_logit_bias,
            "prompt": self.limits.max_prompts,
        }
        for name, value in fields.items():
            if name in ("prompt", "tokens") and value and isinstance(value, list) and type(value[0]) in (int, float):
                continue  # one prompt's token ids, which the number of values bounds
            _check_length(name, value, most.get(name, MAX_ENTRIES))
        for field in ("messages", "input"):
            messages = fields.get(field)
            for message in messages if isinstance(messages, list) else ():
                for name, value in message.items() if isinstance(message, dict) else ():
                    _check_length(name, value, MAX_ENTRIES, of=" of a message", param=field)


def _check_length(name: str, value: Any, most: int, of: str = "", param: str | None = None) -> None:
    if isinstance(value, (list, dict)) and len(value) > most:
        shown = name[:100].encode("utf-8", "replace").decode()
        raise invalid(f"{shown}{of} must have at most {most} entries, not {len(value)}.", param=param or shown)


def body_route(reader: BodyReader) -> type[APIRoute]:
    """The class of routes whose bodies are read by ``reader``; their functions get the validated model."""

    class BodyRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()
            model = None if self.body_field is None else self.body_field.field_info.annotation
            if model is None:
                return handle
            assert isinstance(model, type)
            assert issubclass(model, BaseModel)

            class BodyRequest(Request):
                async def json(self) -> BaseModel:
                    return await reader.read(model, await self.body())

            async def read_and_handle(request: Request) -> Response:
                return await handle(BodyRequest(request.scope, request.receive))

            return read_and_handle

    return BodyRoute
