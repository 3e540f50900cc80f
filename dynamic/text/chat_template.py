"""Chat templates: a conversation becomes the prompt text that the model was trained on.

Templates come with checkpoints, so they are treated as untrusted programs: they run in Jinja's immutable sandbox, get
plain data only, and are stopped when they write too much or take too long.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

MAX_RENDERED_CHARACTERS = 4_000_000
MAX_RENDER_SECONDS = 5.0

# What published templates read. `chat_template` itself is not among them: a caller must not supply a program.
ALLOWED_VARIABLES = frozenset({
    "add_vision_id", "builtin_tools", "clear_thinking", "custom_tools", "date_string", "documents", "enable_thinking",
    "preserve_thinking", "python_tools", "reasoning_effort", "thinking", "thinking_budget", "tools",
    "tools_in_user_message", "xml_tools",
})  # fmt: skip


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what the assistant wrote, for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's ``namespace`` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"chat templates must not set the attribute {name!r} of a namespace")


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with a deadline that every attribute, item and call checks."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        self.clock = threading.local()
        self.filters["tojson"] = _to_json
        self.globals.update(raise_exception=_raise, strftime_now=_strftime_now, dict=_new_dict, namespace=_Namespace)

    def check_time(self) -> None:
        if time.monotonic() > getattr(self.clock, "deadline", float("inf")):
            raise jinja2.exceptions.TemplateRuntimeError(f"took more than {MAX_RENDER_SECONDS} s")

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.check_time()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.check_time()
        return super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.check_time()
        return super().call(__context, __obj, *args, **kwargs)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _new_dict(*args: Any, **kwargs: Any) -> dict:
    return dict(*args, **kwargs)


def _plain(value: Any, where: str) -> Any:
    """A copy made of JSON's types alone: objects with methods must not enter the sandbox."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    if isinstance(value, str):
        return str.__str__(value)
    raise ValueError(f"{where} must hold plain JSON values, not {type(value).__name__}")


class ChatTemplate:
    """One compiled chat template.

    Arguments:
        source: the Jinja text.
        special_tokens: variables such as ``bos_token`` that the template may read.

    Raises:
        ValueError: when the text is not a template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._environment = _Environment()
        self._special_tokens = dict(special_tokens)
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the model's chat template does not compile: {error}") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt text of a conversation.

        Arguments:
            messages: dicts with at least ``role``; keys whose value is None count as absent.
            add_generation_prompt: end with the header of the assistant's turn.
            variables: further variables of the template; only ``ALLOWED_VARIABLES``.

        Raises:
            ValueError: for an empty conversation, a message that is not a dict, a variable that is not allowed, a
                template that rejects the conversation, writes too much or takes too long.
        """
        if unknown := sorted(set(variables) - ALLOWED_VARIABLES):
            raise ValueError(f"chat template variables {unknown} are not allowed; allowed: {sorted(ALLOWED_VARIABLES)}")
        if not messages:
            raise ValueError("a conversation needs at least one message")
        chat = []
        for message in messages:
            if not isinstance(message, Mapping):
                raise ValueError(f"a chat message must be a dict, not {type(message).__name__}")
            chat.append(_plain({k: v for k, v in message.items() if v is not None}, "a chat message"))
        context = {
            **self._special_tokens,
            "tools": None,
            "documents": None,
            **{name: _plain(value, name) for name, value in variables.items()},
            "messages": chat,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._run(context)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refused the conversation: {error}") from error
        except (TypeError, KeyError, AttributeError, ZeroDivisionError, OverflowError, RecursionError) as error:
            raise ValueError(f"the chat template failed on the conversation: {error}") from error

    def _run(self, context: dict[str, Any]) -> str:
        environment = self._environment
        environment.clock.deadline = time.monotonic() + MAX_RENDER_SECONDS
        parts, size = [], 0
        try:
            for part in self._template.generate(context):
                parts.append(part)
                size += len(part)
                environment.check_time()
                if size > MAX_RENDERED_CHARACTERS:
                    message = f"wrote more than {MAX_RENDERED_CHARACTERS} characters"
                    raise jinja2.exceptions.TemplateRuntimeError(message)
        finally:
            environment.clock.deadline = float("inf")
        return "".join(parts)
