"""Compiles forms of outputs into grammars over the model's tokens (llguidance), each once, beside everything else.

The library bounds its own work by fuel, so that a compilation cannot go on for ever; the deadline is for the caller. It
recurses into grammars, so its threads have stacks that no grammar within the limits on size can exhaust.
"""

from __future__ import annotations

import json
import logging
import os
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
from .grammar_tokens import GrammarTokens
from .structured_limits import GrammarSource, StructuredLimits, read_source
from .structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

    from ..text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_STACK_BYTES = 512 * 1024 * 1024  # address space of a thread that compiles; a chain of 5,000 rules needs some 20 MiB
_LEXER_STATES = 250_000  # of one request: some 10,000 tokens of texts whose length is limited, in some 30 MiB
# Work for one token: enough for 500 optional properties in one object, and a few milliseconds at most.
_STEP_ITEMS, _STEP_FUEL = 5000, 50_000
_BASE_BYTES, _BYTES_PER_CHARACTER = 64 * 1024, 128  # estimates of a matcher's size
_MASK_THREADS, _MASK_CORES = 8, 4  # waking threads takes as long as some masks, longer where the model keeps all busy
_PATIENCE = 5  # times the time for compiling, while others are compiled
_BUSY = "structured outputs of other requests are being compiled"
_CONTROL = re.compile(r"\\u00[01]")


class GrammarsBusy(Exception):
    """All threads that compile are at work on others."""


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A grammar for the outputs of one request.

    Arguments:
        matcher: in its first state. Its copies share its lexer, whose size is limited, and nothing else does: what
            other requests write must not matter.
        vocab_size: of the model.
        ignored: keywords of its JSON schema that are not enforced, or not fully.
        executor: the threads that compute the masks of several outputs at once; None where there are few cores.
    """

    matcher: LLMatcher
    vocab_size: int
    ignored: tuple[str, ...]
    executor: LLExecutor | None


@dataclass(slots=True)
class _Known:
    """What is known of a form that compiles, with a matcher for the next request."""

    lenient: bool
    ignored: tuple[str, ...]
    spare: LLMatcher | None = None


@dataclass(slots=True, eq=False)
class Compilation:
    """A matcher that is being made.

    Arguments:
        begun: when (``time.monotonic``); None while it waits.
        stock: it is for the next request.
    """

    source: GrammarSource
    stock: bool = False
    future: Future[CompiledGrammar] = field(default_factory=Future)
    begun: float | None = None
    asked: float = field(default_factory=time.monotonic)


class GrammarCompiler:
    """The grammars of one model. Safe to use from several threads.

    Every request gets a matcher of its own; of a form that is known one is in stock. A form is checked once, by the
    first request for it, while others wait.

    Arguments:
        tokenizer: of the model.
        vocab_size: of the model: token ids are below it.
        limits: set by the operator.
        ends: tokens that end an output, special ones or not: they are no part of a text.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, limits: StructuredLimits, ends: frozenset[int] = frozenset()
    ) -> None:
        self.limits = limits
        self._ends = ends
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._preparing = threading.Lock()
        self._known: OrderedDict[GrammarSource, _Known | str] = OrderedDict()  # or why not; the newest last
        self._size = 0
        self._checking: set[GrammarSource] = set()
        self._waiting: deque[Compilation] = deque()
        self._threads = 0
        self.checks = 0  # so far

    def compile(self, wanted: StructuredOutputsParams) -> CompiledGrammar:
        """Compile a form of outputs; blocks until it is done.

        Raises:
            ValueError: it is wrong, too large, or takes too long.
            GrammarsBusy: others were in front of it for too long.
        """
        self.prepare()
        job = self.start(read_source(wanted, self.limits))
        while True:
            try:
                return job.future.result(self.limits.compile_seconds)
            except FutureTimeout:
                if (error := self.late(job)) is not None:
                    raise error from None

    def check(self, wanted: StructuredOutputsParams) -> None:
        """Raise what :meth:`compile` would raise; only a form that is not known is compiled."""
        source = read_source(wanted, self.limits)
        with self._lock:
            known = self._known.get(source)
        if isinstance(known, str):
            raise ValueError(known)
        if known is None:
            self.compile(wanted)

    def prepare(self) -> None:
        """Build the tokenizer of the library, once: it takes half a second for 50,000 tokens.

        Raises:
            ValueError: the model has none.
        """
        with self._preparing:
            _ = self._tokens, self._executor

    def start(self, source: GrammarSource) -> Compilation:
        """Begin to compile; what is in stock is there at once. Call :meth:`prepare` before."""
        job = Compilation(source)
        with self._lock:
            known = self._known.get(source)
            if known is not None:
                self._known.move_to_end(source)
            if isinstance(known, _Known) and known.spare is not None:
                job.future.set_result(self._grammar(known.spare, known))
                known.spare = None
                self._restock(source)
            elif isinstance(known, str):
                job.future.set_exception(ValueError(known))
            else:
                self._enqueue(job)
        return job

    def late(self, job: Compilation) -> Exception | None:
        """What to tell those who have waited for another ``compile_seconds``; None: to go on waiting, or it is done.

        What takes that long itself is refused from now on, unless it has been compiled before. A job that nobody waits
        for any more is not begun.
        """
        most, now = self.limits.compile_seconds, time.monotonic()
        with self._lock:
            if job.future.done():
                return None
            if job.begun is None:
                if now - job.asked <= _PATIENCE * most:
                    return None
                self._waiting.remove(job)
                job.future.cancel()
                return GrammarsBusy(_BUSY)
            if now - job.begun < most:
                return None
            if isinstance(self._known.get(job.source), _Known):
                return GrammarsBusy(_BUSY)
            text = f"too complex: it takes longer than {most:g} s to compile"
            self._remember(job.source, text)
        return ValueError(text)

    def _enqueue(self, job: Compilation) -> None:
        self._waiting.append(job)
        self._add_thread()

    def _restock(self, source: GrammarSource) -> None:
        if not any(job.stock and job.source == source for job in self._waiting):
            self._enqueue(Compilation(source, stock=True))

    def _add_thread(self) -> None:
        if self._threads >= self.limits.compile_threads:
            return
        self._threads += 1
        before = threading.stack_size(_STACK_BYTES)
        try:
            threading.Thread(target=self._work, name="grammar", daemon=True).start()
        except RuntimeError as error:  # there is no room for its stack
            self._threads -= 1
            logger.error("no thread can be started that compiles structured outputs: %s", error)
            while self._waiting and not self._threads:
                self._waiting.popleft().future.set_exception(GrammarsBusy("structured outputs cannot be compiled now"))
        finally:
            threading.stack_size(before)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            self._run(job)

    def _next(self) -> Compilation | None:
        """The first job that waits, but for those whose form is being checked for another."""
        with self._lock:
            for place, job in enumerate(self._waiting):
                if job.source not in self._checking:
                    del self._waiting[place]
                    job.begun = time.monotonic()
                    if job.source not in self._known:
                        self._checking.add(job.source)
                    return job
            self._threads -= 1
            return None

    def _run(self, job: Compilation) -> None:
        with self._lock:
            known = self._known.get(job.source)
        matcher, started = None, time.thread_time()
        try:
            if known is None:
                known, matcher = self._checked(job.source)
            elif isinstance(known, _Known):
                matcher = self._built(job.source, known.lenient)
        except ValueError as error:
            known = str(error)
        except Exception as error:  # a mistake in the library's Python
            logger.exception("a structured output cannot be compiled")
            known = f"it cannot be compiled ({type(error).__name__})"
        slow = time.thread_time() - started >= self.limits.compile_seconds
        with self._lock:
            self._checking.discard(job.source)
            # Late ones stay refused, unless other work has kept them from the processor.
            if not (slow and isinstance(self._known.get(job.source), str)):
                self._remember(job.source, known)
            if job.stock and isinstance(known, _Known):
                known.spare = matcher
            elif isinstance(known, _Known) and known.spare is None:
                self._restock(job.source)
            if self._waiting:
                self._add_thread()
        if isinstance(known, _Known):
            assert matcher is not None
            job.future.set_result(self._grammar(matcher, known))
        else:
            job.future.set_exception(ValueError(known))

    def _grammar(self, matcher: LLMatcher, known: _Known) -> CompiledGrammar:
        return CompiledGrammar(matcher, self._vocab_size, known.ignored, self._executor)

    def _remember(self, source: GrammarSource, known: _Known | str) -> None:
        self._size += _size(source, known) - _size(source, self._known.pop(source, None))
        self._known[source] = known
        while self._size > self.limits.cache_bytes and self._known:
            self._size -= _size(*self._known.popitem(last=False))

    def _checked(self, source: GrammarSource) -> tuple[_Known, LLMatcher]:
        self.checks += 1
        matcher, lenient, ignored = self._matcher(source)
        mask = run_rust(matcher.compute_bitmask, "it cannot be compiled")
        if matcher.is_error():
            why = _in_short(matcher.get_error())
            raise ValueError("no output can have this form" + (f": {why}" if " " in why else ""))
        if matcher.is_stopped() or not any(mask[: self._vocab_size // 8]):
            raise ValueError("it allows no text, or none that begins with a token of the model")
        return _Known(lenient, tuple(sorted({*source.loose, *ignored}))), matcher

    def _matcher(self, source: GrammarSource) -> tuple[LLMatcher, bool, set[str]]:
        """The matcher, whether it is lenient, and the keywords that it does not enforce."""
        matcher = self._built(source, lenient=False)
        if matcher.is_error() and source.kind == "json" and not source.strict:
            loose = self._built(source, lenient=True)
            if not loose.is_error():
                return loose, True, {name for text in loose.get_grammar_warnings() for name in _unenforced(text)}
        if matcher.is_error():
            problem = matcher.get_error()
            if names := _unenforced(problem):
                raise ValueError(f"the JSON schema is strict, and these keywords are not enforced: {', '.join(names)}")
            raise ValueError(_in_short(problem))
        return matcher, False, set()

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
    def _executor(self) -> LLExecutor | None:
        from llguidance import LLExecutor

        cores = len(os.sched_getaffinity(0))
        return LLExecutor(min(_MASK_THREADS, cores)) if cores >= _MASK_CORES else None

    @cached_property
    def _tokens(self) -> LLTokenizer:
        if isinstance(self._tokenizer, NoTokenizer):
            raise ValueError("structured outputs need the model's tokenizer, without which it was loaded")
        from llguidance import LLTokenizer

        started = time.monotonic()
        tokens = GrammarTokens(self._tokenizer, self._vocab_size, self._ends)
        built = run_rust(lambda: LLTokenizer(cast(Any, tokens)), "the tokenizer cannot be used for structured outputs")
        tokens.longest = built.greedy_tokenize
        logger.info("the tokenizer of structured outputs was built in %.1f s", time.monotonic() - started)
        return built


def _grammar(source: GrammarSource, lenient: bool) -> str:
    """What llguidance reads."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark

    text = source.text
    if source.kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    if source.kind == "choice":
        return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(option) for option in json.loads(text))
    if source.kind == "lark":
        return text
    if source.kind == "gbnf":
        try:
            return gbnf_to_lark(text)
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


def _size(source: GrammarSource, known: _Known | str | None) -> int:
    if isinstance(known, _Known):
        return _BASE_BYTES + _BYTES_PER_CHARACTER * len(source.text)
    return 0 if known is None else 1024 + len(source.text)
