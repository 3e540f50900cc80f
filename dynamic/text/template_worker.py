"""Renders chat templates for ``chat_template.py``, in a process of its own that the kernel stops at its limits.

A script that imports nothing of the package. Its input and output are frames: four bytes of length, then the content.
The first frame holds the template and the limits, every further one the variables of a rendering; each is answered by
``+`` and a text, or by ``-`` and what went wrong.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

MAX_MESSAGE_CHARACTERS = 500


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


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise, strftime_now=_strftime_now, dict=_new_dict, namespace=_Namespace)
    return environment


def _render(template: jinja2.Template, variables: dict[str, Any], max_characters: int) -> str:
    parts, size = [], 0
    for part in template.generate(variables):
        parts.append(part)
        size += len(part)
        if size > max_characters:
            raise jinja2.exceptions.TemplateRuntimeError(f"wrote more than {max_characters} characters")
    return "".join(parts)


def _read(stream: BinaryIO) -> dict[str, Any] | None:
    length = stream.read(4)
    if len(length) < 4:
        return None  # the parent has ended
    return json.loads(stream.read(int.from_bytes(length, "big")).decode("utf-8", "surrogatepass"))


def _write(stream: BinaryIO, kind: bytes, text: str) -> None:
    data = kind + text.encode("utf-8", "surrogatepass")
    stream.write(len(data).to_bytes(4, "big") + data)
    stream.flush()


def main() -> None:
    """Answer frames until the input ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    setup = _read(requests)
    if setup is None:
        return
    max_memory, seconds, max_characters = setup["memory"], setup["seconds"], setup["characters"]
    # Should a template ever escape the sandbox: no core dumps, no files, no further files or sockets.
    limits = {resource.RLIMIT_AS: max_memory, resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))
    template = None
    variables: dict[str, Any] | None = {}
    while variables is not None:
        # Ends the process even inside one long operation. Compiling counts, too: it evaluates constant expressions.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            if template is None:
                template, answer = _environment().from_string(setup["source"]), (b"+", "")
            else:
                answer = b"+", _render(template, variables, max_characters)
        except MemoryError:
            answer = b"-", f"the chat template needs more than {max_memory >> 20} MiB of memory"
        except jinja2.TemplateError as error:
            answer = b"-", f"the chat template refused the conversation: {error}"
        except Exception as error:  # whatever it is, it is the template's
            answer = b"-", f"the chat template failed on the conversation: {error or type(error).__name__}"
        kind, text = answer
        if kind == b"-" and template is None:
            text = "the model's chat template does not compile: " + text.partition(": ")[2]
        _write(answers, kind, text if kind == b"+" else text[:MAX_MESSAGE_CHARACTERS])
        signal.setitimer(signal.ITIMER_PROF, 0)
        variables = _read(requests)


if __name__ == "__main__":
    main()
