"""Between the event loop and the engine: one thread drives the engine, asyncio callers submit, wait and cancel.

Callers put commands into a thread-safe inbox. The engine's thread empties it before every step, runs the step and hands
everything the step said to the event loop in one call. While there is nothing to do the thread sleeps in the inbox.
"""

from __future__ import annotations

import asyncio
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
from ..dynamic.engine.outputs import RequestDelta
from ..dynamic.engine.quality import ContractOutcome
from ..dynamic.engine.sampling_params import SamplingParams
from .submission import EngineFailure, RequestTimes, Submission

logger = logging.getLogger("dynamoe.engine")

DeltaObserver = Callable[[RequestTimes, RequestDelta, float], None]


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """One prompt for the engine.

    Arguments:
        contract: what became of the caller's contract; ``params`` then say what may be spent.
        request_id: differs from that of every other request, of other servers and other times as well: what is stored
            about a request outlives the process.
    """

    prompt_token_ids: Sequence[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None
    contract: ContractOutcome | None = None
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True, slots=True)
class _Submit:
    submission: Submission
    requests: Sequence[EngineRequest]


@dataclass(frozen=True, slots=True)
class _Abort:
    ids: list[str]


@dataclass(frozen=True, slots=True)
class _Wake:
    pass


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


class EngineBridge:
    """Runs an engine in a thread of its own.

    Arguments:
        engine: driven by the bridge's thread only, from :meth:`start` on.
        hang_timeout: seconds without progress, while there is work, after which the engine counts as hung: requests
            then end with an error and new ones are refused until it moves again.
        on_delta: called on the event loop for every delta, with its request's times and the moment it was made.
        on_abort: called on the event loop with the ids of prompts that were given up.
        idle_work: called by the bridge's thread while there is nothing to run: does a small piece of other work, and
            returns whether there may be more at once. If not, it is asked again after :meth:`wake` or a request.
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
        self._on_delta = on_delta
        self._inbox: queue.SimpleQueue[_Submit | _Abort | _Wake | _Stop] = queue.SimpleQueue()
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
        """Start the engine's thread; its answers go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._watchdog = asyncio.create_task(self._watch())
        self._thread.start()

    async def stop(self, timeout: float = 5.0) -> bool:
        """End all requests, then the thread after its current step; False if it is busy for longer than ``timeout``."""
        self.close()
        self._inbox.put(_Stop())
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
        """Hand prompts to the engine, all of them or none.

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
        self._inbox.put(_Submit(submission, requests))
        try:
            await submission.accepted
        except (ValueError, EngineFull):
            for request_id in submission.ids:  # the engine has dropped them itself
                self._open.pop(request_id, None)
            raise
        except BaseException:
            submission.close()
            raise
        return submission

    def abort(self, ids: Iterable[str]) -> None:
        """Drop requests; their pages are free after the engine's current step."""
        known = [request_id for request_id in ids if self._open.pop(request_id, None) is not None]
        if known:
            self._on_abort(known)
            self._inbox.put(_Abort(known))

    def wake(self) -> None:
        """Say that there is something for ``idle_work``. From any thread."""
        self._inbox.put(_Wake())

    def close(self) -> None:
        """End all requests with an error and take no more."""
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
            self._on_delta(submission.deliver(delta), delta, made_at)

    def _report_death(self, death: BaseException) -> None:
        self._death = death
        self.fail_all(EngineFailure(f"The engine has died ({type(death).__name__}).", "engine_dead"))

    async def _watch(self) -> None:
        """The watchdog: ends the requests of a hung engine, so that nobody waits in silence."""
        while True:
            await asyncio.sleep(min(1.0, self._hang_timeout / 4))
            failure = self.failure()
            if failure is not None and failure.code == "engine_hung":
                self.fail_all(failure)
                if not self._hang_reported:
                    logger.error("%s The engine's thread is here:\n%s", failure, self._where())
                self._hang_reported = True
            elif self._hang_reported and failure is None:
                logger.warning("the engine moves again")
                self._hang_reported = False

    def _where(self) -> str:
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
            self._tell(self._report_death, death)

    def _take_commands(self) -> bool:
        """Empty the inbox; sleep in it if there is nothing to run. False means: stop."""
        if not self.engine.has_unfinished():
            self._progress_at = None
            command = self._next_command()
            self._progress_at = time.monotonic()
        else:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return True
        while True:
            match command:
                case _Submit(submission, requests):
                    self._add(submission, requests)
                case _Abort(ids):
                    self.engine.abort(ids)
                case _Wake():
                    pass
                case _Stop():
                    return False
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return True

    def _next_command(self) -> _Submit | _Abort | _Wake | _Stop:
        """Wait for a command; while there is none, do idle work."""
        while True:
            try:
                return self._inbox.get_nowait()
            except queue.Empty:
                if not self._idle_work():
                    return self._inbox.get()

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
                )
                added.append(request_id)
        except (ValueError, EngineFull) as refusal:
            self.engine.abort(added)
            error = refusal
        self._tell(submission.settle, error)

    def _step(self) -> None:
        before = self.stats
        deltas = self.engine.step()
        now = time.monotonic()
        self.stats = self.engine.stats()
        if deltas or self.stats != before:  # a step that changes nothing is no sign of life
            self._progress_at = now
        if deltas:
            self._tell(self._deliver, now, deltas)

    def _tell(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            if not self._loop.is_closed():  # closed: the server has ended and nobody listens
                raise
