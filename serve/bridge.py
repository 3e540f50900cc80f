"""Connects the event loop to the engine: one thread drives the engine, asyncio callers submit, wait and cancel.

Callers put commands into a thread-safe queue. The engine's thread runs them before every step, and passes all deltas of
the step to the event loop in one call. While the engine is idle the thread blocks on the queue.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import queue
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ..dynamic.engine.engine import Engine, EngineFull
from ..dynamic.engine.fault_log import FaultLog
from ..dynamic.engine.grammar_compiler import CompiledGrammar
from ..dynamic.engine.outputs import RequestDelta
from ..dynamic.engine.quality import ContractOutcome
from ..dynamic.engine.sampling_params import SamplingParams
from ..dynamic.model.machine import release_threads
from .submission import EngineFailure, RequestTimes, Submission

logger = logging.getLogger("dynamoe.engine")

DeltaObserver = Callable[[RequestTimes, RequestDelta, float], None]
Command = Callable[[], object]  # runs on the engine's thread between two steps


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """One prompt for the engine.

    Arguments:
        contract: how the caller's contract was resolved; ``params`` hold the resulting settings.
        grammar: of its structured outputs.
        request_id: unique across servers and restarts, because records about a request outlive the process.
    """

    prompt_token_ids: Sequence[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None
    contract: ContractOutcome | None = None
    grammar: CompiledGrammar | None = None
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)


class EngineBridge:
    """Runs an engine in a separate thread.

    Arguments:
        engine: only the bridge's thread may use it after :meth:`start`.
        hang_timeout: seconds without progress, while there is work, after which the engine counts as hung: requests
            then end with an error and new ones are refused until it makes progress again.
        on_delta: called on the event loop for every delta, with its request's times and the time of its step. An error
            that it, ``on_abort`` or ``idle_work`` raises is logged and ends nothing.
        on_abort: called on the event loop with the ids of aborted prompts.
        idle_work: called by the bridge's thread while the engine is idle: does a small part of other work and returns
            whether more is ready. If not, it is called again after :meth:`wake` or a request.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        hang_timeout: float,
        on_delta: DeltaObserver,
        on_abort: Callable[[Sequence[str]], None],
        idle_work: Callable[[], bool] = lambda: False,
    ) -> None:
        self.engine = engine
        self.stats = engine.stats()
        self._on_abort = on_abort
        self._idle_work = idle_work
        self._hang_timeout = hang_timeout
        self._faults = FaultLog(logger)
        self._on_delta = on_delta
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()  # None: stop
        self._open: dict[str, Submission] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watchdog: asyncio.Task[None] | None = None
        self._progress_at: float | None = None  # None: idle. Written by the engine's thread only.
        self._death: BaseException | None = None
        self._hang_reported = False
        self._closed = False
        self.ended_well = False

    @property
    def num_open(self) -> int:
        """Prompts that are waiting or running."""
        return len(self._open)

    def start(self) -> None:
        """Start the engine's thread; deltas are delivered on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._watchdog = asyncio.create_task(self._watch())
        release_threads()  # of the loading
        self._thread.start()

    async def stop(self, timeout: float = 5.0) -> bool:
        """End all requests, then the thread after its current step; False if that takes longer than ``timeout``."""
        self.close()
        self._commands.put(None)
        if self._watchdog is not None:
            self._watchdog.cancel()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join, timeout)
        stopped = not self._thread.is_alive()
        self.ended_well = stopped and self._death is None
        return stopped

    def failure(self) -> EngineFailure | None:
        """Why the engine cannot take requests, if so."""
        if self._death is not None:
            return EngineFailure(f"The engine has died ({type(self._death).__name__}).", "engine_dead")
        if self._closed:
            return EngineFailure("The server is shutting down.", "shutting_down")
        since = self._progress_at
        if since is not None and time.monotonic() - since > self._hang_timeout:
            return EngineFailure(f"The engine has made no progress for {self._hang_timeout:g} s.", "engine_hung")
        return None

    async def submit(self, requests: Sequence[EngineRequest]) -> Submission:
        """Submit prompts to the engine, all of them or none.

        Raises:
            ValueError: the engine refuses one of them (too long, token ids out of range, can never fit).
            EngineFull: too many are waiting.
            EngineFailure: the engine is dead or hung, or the server is shutting down.
        """
        failure = self.failure()
        if failure is not None:
            raise failure
        now = time.monotonic()
        times = [RequestTimes(arrival=now, prompt_tokens=len(request.prompt_token_ids)) for request in requests]
        submission = Submission([request.request_id for request in requests], times, self.abort)
        for request_id in submission.ids:
            self._open[request_id] = submission
        self._commands.put(functools.partial(self._add, submission, requests))
        try:
            await submission.accepted
        except (ValueError, EngineFull, EngineFailure):
            for request_id in submission.ids:  # the engine has dropped them itself
                self._open.pop(request_id, None)
            raise
        except BaseException:
            submission.close()
            raise
        return submission

    async def call(self, function: Callable[[], object]) -> None:
        """Call a function between two steps, on the engine's thread.

        Raises:
            EngineFailure: the engine is dead or hung, or the server is shutting down.
            Exception: what the function raises.
        """
        if (failure := self.failure()) is not None:
            raise failure
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def run() -> None:
            error = None
            try:
                function()
            except Exception as raised:  # its caller's to handle
                error = raised
            self._notify(settle, error)

        def settle(error: Exception | None) -> None:
            if not done.done():
                done.set_result(None) if error is None else done.set_exception(error)

        self._commands.put(run)
        while not done.done():
            await asyncio.wait((done,), timeout=1.0)
            if not done.done() and (failure := self.failure()) is not None:
                raise failure
        done.result()

    def abort(self, ids: Iterable[str]) -> None:
        """Abort requests; their pages are freed after the engine's current step."""
        known = [request_id for request_id in ids if self._open.pop(request_id, None) is not None]
        if known:
            self._commands.put(functools.partial(self.engine.abort, known))
            self._guarded("an observer of aborts", self._on_abort, known)

    def wake(self) -> None:
        """Signal that ``idle_work`` has something to do. Callable from any thread."""
        self._commands.put(lambda: None)

    def close(self) -> None:
        """End all requests with an error and accept no more."""
        self._closed = True
        self.fail_all(EngineFailure("The server is shutting down.", "shutting_down"))

    def fail_all(self, error: EngineFailure) -> None:
        """End all requests with an error and drop them."""
        for submission in set(self._open.values()):
            submission.fail(error)
        self.abort(list(self._open))

    def _deliver(self, made_at: float, deltas: list[RequestDelta]) -> None:
        for delta in deltas:
            submission = self._open.get(delta.request_id)
            if submission is None:
                continue  # aborted while the step ran
            if delta.finished:
                del self._open[delta.request_id]
            self._guarded("an observer of deltas", self._on_delta, submission.deliver(delta), delta, made_at)

    def _guarded(self, kind: str, function: Callable[..., object], *arguments: object) -> object:
        """Call what must not stop its caller; None if it raises an error."""
        try:
            return function(*arguments)
        except Exception as error:  # whatever it raises
            self._faults.report(kind, error)
            return None

    def _report_death(self, death: BaseException) -> None:
        self._death = death
        self.fail_all(EngineFailure(f"The engine has died ({type(death).__name__}).", "engine_dead"))

    async def _watch(self) -> None:
        """The watchdog: ends the requests of a hung engine with an error."""
        while True:
            await asyncio.sleep(min(1.0, self._hang_timeout / 4))
            failure = self.failure()
            if failure is not None and failure.code == "engine_hung":
                self.fail_all(failure)
                if not self._hang_reported:
                    logger.error("%s Stack of the engine's thread:\n%s", failure, self._stack())
                self._hang_reported = True
            elif self._hang_reported and failure is None:
                logger.warning("the engine makes progress again")
                self._hang_reported = False

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame is not None else "(it has ended)"

    # From here on: the engine's thread.

    def _run(self) -> None:
        try:
            while self._take_commands():
                if self.engine.has_unfinished():
                    self._step()
                else:
                    self.stats = self.engine.stats()
        except BaseException as death:
            logger.exception("the engine has died")
            self._progress_at = None
            self._notify(self._report_death, death)

    def _take_commands(self) -> bool:
        """Run all queued commands; block until there is one if the engine is idle. False means: stop."""
        if not self.engine.has_unfinished():
            self._progress_at = None
            command = self._next_command()
            self._progress_at = time.monotonic()
            if command is None:
                return False
            command()
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _next_command(self) -> Command | None:
        """Wait for a command; while there is none, do idle work."""
        while True:
            try:
                return self._commands.get_nowait()
            except queue.Empty:
                if not self._guarded("idle work", self._idle_work):
                    return self._commands.get()

    def _add(self, submission: Submission, requests: Sequence[EngineRequest]) -> None:
        added: list[str] = []
        error: Exception | None = None
        try:
            for request_id, request in zip(submission.ids, requests, strict=True):
                self.engine.add_request(
                    request_id,
                    request.prompt_token_ids,
                    request.params,
                    priority=request.priority,
                    cache_salt=request.cache_salt,
                    contract=request.contract,
                    grammar=request.grammar,
                )
                added.append(request_id)
        except Exception as refusal:
            self.engine.abort(added)
            error = refusal
            if not isinstance(refusal, (ValueError, EngineFull)):
                self._faults.report("adding a request", refusal)  # a plug-in's constructor, say
                error = EngineFailure(f"The request cannot be run ({type(refusal).__name__}).", "request_failed")
        self._notify(submission.resolve, error)

    def _step(self) -> None:
        before = self.stats
        deltas = self.engine.step()
        now = time.monotonic()
        self.stats = self.engine.stats()
        if deltas or self.stats != before:  # a step that changes nothing is not progress
            self._progress_at = now
        if deltas:
            self._notify(self._deliver, now, deltas)

    def _notify(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            if not self._loop.is_closed():  # closed: the server has ended
                raise
