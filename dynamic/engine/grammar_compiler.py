"""Compiles forms of outputs into grammars over the model's tokens (llguidance), each once, beside everything else.

The library bounds its own work by fuel, so that a compilation cannot go on for ever; the deadline is for the caller. It
recurses into grammars, so its threads have stacks that no grammar within the limits on size can exhaust.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections import OrderedDict, deque
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from ..text.no_tokenizer import NoTokenizer
from ..text.tokenizer_file import run_rust
from .structured_limits import GrammarSource, StructuredLimits, read_source
from .structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from collections.abc import Callable

    from llguidance import LLMatcher, LLTokenizer

    from ..text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

END = b"<end>"  # the text of the token that stands for every token which ends an output
_STACK_BYTES = 512 * 1024 * 1024  # address space of a thread that compiles; a chain of 5,000 rules needs some 20 MiB
_LEXER_STATES = 20_000  # of one output; each takes 1 to 2 KiB
# Work for one token: enough for 500 optional properties in one object, and a few milliseconds at most.
_STEP_ITEMS, _STEP_FUEL = 5000, 50_000
_BASE_BYTES, _BYTES_PER_CHARACTER = 64 * 1024, 64  # estimates of a compiled grammar's size
_CONTROL = re.compile(r"\\u00[01]")


class GrammarsBusy(Exception):
    """All threads that compile are at work on others."""


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A grammar that an output may follow.

    Arguments:
        matcher: in its first state. Whoever follows an output takes a copy.
        vocab_size: of the model.
        ignored: keywords of its JSON schema that are not enforced, or not fully.
        size: estimated, in bytes.
    """

    matcher: LLMatcher
    vocab_size: int
    ignored: tuple[str, ...]
    size: int


@dataclass(slots=True)
class Compilation:
    """A compilation in progress; several requests may wait for it."""

    source: GrammarSource
    future: Future[CompiledGrammar] = field(default_factory=Future)
    begun: bool = False


class GrammarCompiler:
    """The compiled grammars of one model. Safe to use from several threads.

    Arguments:
        tokenizer: of the model.
        vocab_size: of the model: token ids are below it.
        limits: set by the operator.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, limits: StructuredLimits) -> None:
        self.limits = limits
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._preparing = threading.Lock()
        self._known: OrderedDict[GrammarSource, CompiledGrammar | str] = OrderedDict()  # or why not; the newest last
        self._size = 0
        self._running: dict[GrammarSource, Compilation] = {}
        self._waiting: deque[Compilation] = deque()
        self._threads = 0
        self.compilations = 0  # so far

    def compile(self, wanted: StructuredOutputsParams) -> CompiledGrammar:
        """Compile a form of outputs, or find it compiled; blocks until it is done.

        Raises:
            ValueError: it is wrong, too large, or takes too long.
        """
        self.prepare()
        job = self.start(read_source(wanted, self.limits))
        try:
            return job.future.result(self.limits.compile_seconds)
        except FutureTimeout:
            raise self.late(job) from None

    def prepare(self) -> None:
        """Build the tokenizer of the library, once: it takes half a second for 50,000 tokens.

        Raises:
            ValueError: the model has none.
        """
        with self._preparing:
            _ = self._tokens

    def start(self, source: GrammarSource) -> Compilation:
        """Begin to compile; one that is known is done at once. Call :meth:`prepare` before."""
        with self._lock:
            known = self._known.get(source)
            if known is None and (job := self._running.get(source)) is not None:
                return job
            job = Compilation(source)
            if known is None:
                self._running[source] = job
                self._waiting.append(job)
                if self._threads < self.limits.compile_threads:
                    self._threads += 1
                    self._start_thread()
                return job
            self._known.move_to_end(source)
        _settle(job, known)
        return job

    def late(self, job: Compilation) -> Exception:
        """What to tell those who have waited for ``compile_seconds``. What takes that long is refused from now on.

        Returns: a ValueError, or :class:`GrammarsBusy` where others were in front of it.
        """
        if not job.begun:
            return GrammarsBusy("structured outputs of other requests are being compiled")
        text = f"too complex: it takes longer than {self.limits.compile_seconds:g} s to compile"
        with self._lock:
            self._remember(job.source, text)
        return ValueError(text)

    def _start_thread(self) -> None:
        before = threading.stack_size(_STACK_BYTES)
        try:
            threading.Thread(target=self._work, name="grammar", daemon=True).start()
        finally:
            threading.stack_size(before)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                job = self._waiting.popleft()
            self._run(job)

    def _run(self, job: Compilation) -> None:
        job.begun = True
        found: CompiledGrammar | str
        try:
            found = self._compile(job.source)
        except ValueError as error:
            found = str(error)
        except Exception as error:  # a mistake in the library's Python
            logger.exception("a structured output cannot be compiled")
            found = f"it cannot be compiled ({type(error).__name__})"
        with self._lock:  # at any time it is running or known
            if not isinstance(self._known.get(job.source), str):  # late ones stay refused
                self._remember(job.source, found)
            del self._running[job.source]
        _settle(job, found)

    def _remember(self, source: GrammarSource, found: CompiledGrammar | str) -> None:
        self._size += _size(source, found) - _size(source, self._known.pop(source, None))
        self._known[source] = found
        while self._size > self.limits.cache_bytes and self._known:
            self._size -= _size(*self._known.popitem(last=False))

    def _compile(self, source: GrammarSource) -> CompiledGrammar:
        self.compilations += 1
        matcher, ignored = self._matcher(source)
        mask = run_rust(matcher.compute_bitmask, "it cannot be compiled")
        if matcher.is_error():
            why = _in_short(matcher.get_error())
            raise ValueError("no output can have this form" + (f": {why}" if " " in why else ""))
        if matcher.is_stopped() or not any(mask[: self._vocab_size // 8]):
            raise ValueError("it allows no text, or none that begins with a token of the model")
        ignored |= set(source.loose)
        return CompiledGrammar(matcher, self._vocab_size, tuple(sorted(ignored)), _size_of(source))

    def _matcher(self, source: GrammarSource) -> tuple[LLMatcher, set[str]]:
        """The matcher, and the keywords that it does not enforce."""
        matcher = self._built(source, lenient=False)
        if matcher.is_error() and source.kind == "json" and not source.strict:
            loose = self._built(source, lenient=True)
            if not loose.is_error():
                return loose, {name for text in loose.get_grammar_warnings() for name in _unenforced(text)}
        if matcher.is_error():
            problem = matcher.get_error()
            if names := _unenforced(problem):
                raise ValueError(f"the JSON schema is strict, and these keywords are not enforced: {', '.join(names)}")
            raise ValueError(_in_short(problem))
        return matcher, set()

    def _built(self, source: GrammarSource, lenient: bool) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            max_lexer_states=_LEXER_STATES,
            step_max_items=_STEP_ITEMS,
            step_lexer_fuel=_STEP_FUEL,
            verbose_errors=False,
        )

        def build() -> LLMatcher:
            return LLMatcher(self._tokens, _grammar(source, lenient), log_level=0, limits=limits)

        return run_rust(build, "it cannot be compiled")

    @cached_property
    def _tokens(self) -> LLTokenizer:
        if isinstance(self._tokenizer, NoTokenizer):
            raise ValueError("structured outputs need the model's tokenizer, without which it was loaded")
        from llguidance import LLTokenizer

        started = time.monotonic()
        tokens = _Tokens(self._tokenizer, self._vocab_size)
        built = run_rust(lambda: LLTokenizer(cast(Any, tokens)), "the tokenizer cannot be used for structured outputs")
        tokens.longest = built.greedy_tokenize
        logger.info("the tokenizer of structured outputs was built in %.1f s", time.monotonic() - started)
        return built


class _Tokens:
    """A vocabulary as llguidance reads it. Its end-of-text token is one behind the model's: see :data:`END`."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._encode = tokenizer.encode
        self.longest: Callable[[str], list[int]] = lambda text: []
        self.eos_token_id = vocab_size
        self.tokens = [tokenizer.token_bytes(token) or b"" for token in range(vocab_size)] + [END]
        self.special_token_ids = [*sorted(token for token in tokenizer.special_ids if token < vocab_size), vocab_size]

    def __call__(self, text: str | bytes) -> list[int]:
        """The tokens of a part of a text, which have to add up to it: the library breaks if they do not."""
        part = text if isinstance(text, str) else text.decode("utf-8", "replace")
        for before in ("", "\x02"):  # some tokenizers put a space in front of a text
            ids = self._encode(before + part, False)[len(self._encode(before, False)) if before else 0 :]
            if b"".join(self.tokens[token] for token in ids) == part.encode():
                return ids
        return self.longest(part)


def _grammar(source: GrammarSource, lenient: bool) -> str:
    """What llguidance reads."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    text = source.text
    if source.kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    if source.kind == "choice":
        return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(option) for option in json.loads(text))
    if source.kind == "grammar":
        try:
            return any_to_lark(text)
        except RecursionError:
            raise ValueError("the grammar is nested too deeply") from None
        except Exception as error:  # whatever that module raises
            raise ValueError(f"the grammar cannot be read: {str(error)[:300]}") from None
    options: dict[str, Any] = {"lenient": lenient, "coerce_one_of": lenient}
    options |= {"whitespace_pattern": source.whitespace} if source.whitespace else {"whitespace_flexible": False}
    if not _CONTROL.search(text):  # otherwise an additional key could spell one that is listed with \u
        options["json_allowed_escapes"] = 'nrbtf\\"'
    return LLMatcher.grammar_from_json_schema(text, overrides=options)  # type: ignore[arg-type]


def _unenforced(problem: str) -> list[str]:
    """The keywords that a message of the library's says it does not enforce."""
    names: list[str] = []
    for listed in re.findall(r"Unimplemented keys: (\[.*?\])", problem):
        names += json.loads(listed)
    names += [f"format {name}" for name in re.findall(r"Unknown format: ([\w.-]{1,50})", problem)]
    return names + (["oneOf"] if problem.startswith("oneOf ") else [])


def _in_short(problem: str) -> str:
    if problem.startswith("panic"):
        logger.error("the library of structured outputs has failed: %s", problem[:2000])
        return "it cannot be compiled"
    if wrong := re.search(r"regex parse error:.*^error: ([^\n]*)", problem, re.DOTALL | re.MULTILINE):
        return f"a regular expression is wrong: {wrong[1][:200]}"
    return " ".join(re.split("<state>|<non-verbose/>", problem)[0].split())[:300]


def _size_of(source: GrammarSource) -> int:
    return _BASE_BYTES + _BYTES_PER_CHARACTER * len(source.text)


def _size(source: GrammarSource, found: CompiledGrammar | str | None) -> int:
    if isinstance(found, CompiledGrammar):
        return found.size
    return 0 if found is None else 1024 + len(source.text)


def _settle(job: Compilation, found: CompiledGrammar | str) -> None:
    if isinstance(found, str):
        job.future.set_exception(ValueError(found))
    else:
        job.future.set_result(found)
