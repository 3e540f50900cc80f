"""Chat templates: a conversation becomes the prompt text that the model was trained on.

Templates come with checkpoints, so they are treated as untrusted programs: they get plain data only, and run in Jinja's
immutable sandbox in a process of their own (``template_worker.py``), whose processor time, memory and output are
limited. No operation of a template runs in the caller's process, not even those that Jinja evaluates when it compiles.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("template_worker.py")
INHERITED = ("LANG", "LC_ALL", "LC_TIME", "LD_LIBRARY_PATH", "PYTHONHOME", "TZ")  # of the environment; no secrets
MAX_DEPTH = 64  # of lists and dicts in a message or a variable
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # type → its field


def message_text(message: Mapping[str, Any]) -> Any:
    """The content of a message as templates read it: parts become lines, and a refusal stands for an absent text.

    Raises:
        ValueError: for a part that is not text.
    """
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_text_of(part) for part in content)
    return content or message.get("refusal") or content


def _text_of(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get(_TEXT_PARTS[kind]) if isinstance(kind, str) and kind in _TEXT_PARTS else None
    if not isinstance(text, str):
        raise ValueError(f"a chat message holds a part without text, of type {str(kind)[:50]!r}; only text is read")
    return text


# What published templates read. `chat_template` itself is not among them: a caller must not supply a program.
ALLOWED_VARIABLES = frozenset({
    "add_vision_id", "builtin_tools", "clear_thinking", "custom_tools", "date_string", "documents", "enable_thinking",
    "preserve_thinking", "python_tools", "reasoning_effort", "thinking", "thinking_budget", "tools",
    "tools_in_user_message", "xml_tools",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RenderLimits:
    """What a template may use.

    Arguments:
        characters: of its output.
        seconds: of processor time, for each conversation and for compiling.
        memory: bytes of address space.
        patience: seconds that the caller waits, which matters only when the processor has no time for the template.
    """

    characters: int = 4_000_000
    seconds: float = 2.0
    memory: int = 512 << 20
    patience: float = 60.0


class TemplateEnded(ValueError):
    """The template's process has ended before it answered: it broke a limit, or there was no room for it."""


class _Worker:
    """A running process with one compiled template.

    Raises:
        ValueError: the template does not compile within the limits, or no process can be started.
    """

    def __init__(self, source: str, limits: RenderLimits) -> None:
        self.owner = os.getpid()
        self._limits = limits
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-P", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env={name: os.environ[name] for name in INHERITED if name in os.environ}
                | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                start_new_session=True,  # Ctrl-C is for the parent, which may have conversations to finish
            )
        except OSError as error:
            raise TemplateEnded(f"no process for the chat template can be started: {error}") from error
        end = weakref.finalize(self, _end, self._process, self.owner)
        try:
            self.ask({
                "source": source,
                "characters": limits.characters,
                "seconds": limits.seconds,
                "memory": limits.memory,
            })  # fmt: skip
        except ValueError:
            end()
            raise

    def kill(self) -> None:
        """End the process; whoever waits for its answer gets an error."""
        self._process.kill()
        self._process.wait()

    @property
    def usable(self) -> bool:
        """Whether this process owns a worker that still runs; a forked process must not talk through its pipes."""
        return self.owner == os.getpid() and self._process.poll() is None

    def ask(self, message: Mapping[str, Any]) -> str:
        """Send one frame and wait for the answer; a worker that breaks a limit is ended.

        Raises:
            ValueError: what went wrong.
        """
        assert self._process.stdin is not None
        data = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
        view = memoryview(len(data).to_bytes(4, "big") + data)
        try:
            while view:
                view = view[self._process.stdin.write(view) :]
            deadline = time.monotonic() + self._limits.patience
            length = int.from_bytes(self._read(4, deadline), "big")
            if length > 4 * self._limits.characters + 4096:  # bytes of UTF-8; the worker does not send such frames
                raise EOFError
            answer = self._read(length, deadline)
        except (OSError, EOFError):
            self._process.kill()
            raise TemplateEnded(self._ending(self._process.wait())) from None
        text = answer[1:].decode("utf-8", "surrogatepass")
        if answer[:1] != b"+":
            raise ValueError(text)
        return text

    def _ending(self, code: int) -> str:
        if code == -signal.SIGPROF:
            return f"the chat template took more than {self._limits.seconds:g} s of processor time"
        if code == -signal.SIGKILL:
            return f"the chat template was ended: no answer within {self._limits.patience:g} s, or out of memory"
        return f"the chat template's process ended with exit code {code}"

    def _read(self, size: int, deadline: float) -> bytes:
        assert self._process.stdout is not None
        poll, data = select.poll(), bytearray()
        poll.register(self._process.stdout, select.POLLIN)
        while len(data) < size:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            part = self._process.stdout.read(min(size - len(data), 1 << 20))
            if not part:
                raise EOFError
            data += part
        return bytes(data)


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:
        return
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy made of JSON's types alone: objects with methods must not enter the sandbox."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth > MAX_DEPTH:
        raise ValueError(f"{where} is nested deeper than {MAX_DEPTH}")
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, depth + 1) for item in value]
    if isinstance(value, str):
        return str.__str__(value)
    raise ValueError(f"{where} must hold plain JSON values, not {type(value).__name__}")


class ChatTemplate:
    """One compiled chat template. Safe to use from several threads, one of which renders at a time.

    Arguments:
        source: the Jinja text.
        special_tokens: variables such as ``bos_token`` that the template may read.
        limits: of each rendering.

    Raises:
        ValueError: when the text is not a template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], limits: RenderLimits | None = None) -> None:
        self.source = source
        self._limits = limits or RenderLimits()
        self._special_tokens = dict(special_tokens)
        self._lock = threading.Lock()
        self._worker = _Worker(source, self._limits)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation.

        Arguments:
            messages: dicts with at least ``role``; keys whose value is None count as absent. Contents are read by
                :func:`message_text`; role ``developer`` counts as ``system`` for templates that do not name it.
            add_generation_prompt: end with the header of the assistant's turn.
            continue_final_message: end with the last message's content instead.
            variables: further variables of the template; only ``ALLOWED_VARIABLES``.

        Raises:
            ValueError: for an empty conversation, a message that is not a dict, a variable that is not allowed, a
                template that rejects the conversation, cannot continue it, or exceeds its limits.
        """
        if unknown := sorted(set(variables) - ALLOWED_VARIABLES):
            raise ValueError(f"chat template variables {unknown} are not allowed; allowed: {sorted(ALLOWED_VARIABLES)}")
        if not messages:
            raise ValueError("a conversation needs at least one message")
        chat = []
        for message in messages:
            if not isinstance(message, Mapping):
                raise ValueError(f"a chat message must be a dict, not {type(message).__name__}")
            plain = _plain({k: v for k, v in message.items() if v is not None}, "a chat message")
            if (text := message_text(plain)) is not None:
                plain["content"] = text
            if plain.get("role") == "developer" and "developer" not in self.source:
                plain["role"] = "system"
            chat.append(plain)
        mark = f"<{uuid.uuid4().hex}>"  # behind the content, so that the template cannot trim the content's end
        if continue_final_message:
            chat[-1]["content"] = f"{chat[-1].get('content', '')}{mark}"
        context = {
            **self._special_tokens,
            "tools": None,
            "documents": None,
            **{name: _plain(value, name) for name, value in variables.items()},
            "messages": chat,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        with self._lock:
            if not self._worker.usable:
                self._worker = _Worker(self.source, self._limits)
            text = self._worker.ask(context)
        if not continue_final_message:
            return text
        if text.count(mark) != 1:
            raise ValueError("the chat template does not write the last message exactly once: it cannot be continued")
        return text.partition(mark)[0]

    def close(self) -> None:
        """End the template's process, and with an error what it is rendering; the next rendering starts another."""
        self._worker.kill()
