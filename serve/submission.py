"""The event loop's side of a request in the engine: deltas arrive one by one and are read in batches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass

from ..dynamic.engine.outputs import RequestDelta


class EngineFailure(Exception):
    """The engine cannot finish a request: it died, it hangs, or the server is stopping. ``code`` says which."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class ClientGone(Exception):
    """The client closed the connection."""


@dataclass(slots=True)
class RequestTimes:
    """Times of one prompt's events, in seconds of ``time.monotonic``, and its token counts."""

    arrival: float
    prompt_tokens: int
    first_token: float | None = None
    last_token: float | None = None
    queue_seconds: float | None = None
    generation_tokens: int = 0


class Submission:
    """The prompts of one HTTP request while the engine works on them. Belongs to the event loop's thread.

    Arguments:
        ids: the engine's id of each prompt.
        times: of each prompt.
        abort: called with the ids of prompts to abort.
    """

    def __init__(self, ids: list[str], times: list[RequestTimes], abort: Callable[[Iterable[str]], None]) -> None:
        self.ids = ids
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._number = {request_id: number for number, request_id in enumerate(ids)}
        self._times = times
        self._abort = abort
        self._unfinished = set(ids)
        self._arrived: list[tuple[int, RequestDelta]] = []
        self._wake = asyncio.Event()
        self._error: Exception | None = None

    async def batches(self) -> AsyncIterator[list[tuple[int, RequestDelta]]]:
        """Deltas since the last batch, as (number of the prompt, delta), until all prompts are finished.

        Raises:
            EngineFailure: the engine will not finish.
            ClientGone: :meth:`client_left` was called.
        """
        while True:
            if self._arrived:
                batch, self._arrived = self._arrived, []
                yield batch
            elif not self._unfinished:
                return
            elif self._error is not None:
                raise self._error
            else:
                self._wake.clear()
                await self._wake.wait()

    def resolve(self, error: Exception | None) -> None:
        """The engine accepted the prompts, or refused them with ``error``."""
        if self.accepted.done():
            return
        if error is None:
            self.accepted.set_result(None)
        else:
            self.accepted.set_exception(error)

    def deliver(self, delta: RequestDelta) -> RequestTimes:
        """A delta arrived; returns the times of its prompt."""
        number = self._number[delta.request_id]
        self._arrived.append((number, delta))
        if delta.finished:
            self._unfinished.discard(delta.request_id)
        self._wake.set()
        return self._times[number]

    def fail(self, error: Exception) -> None:
        """No more deltas will come."""
        if self._error is None and self._unfinished:
            self._error = error
            self.resolve(error)
            self._wake.set()

    def client_left(self) -> None:
        """Abort the prompts and end :meth:`batches` with :class:`ClientGone`."""
        self.close()
        self.fail(ClientGone())

    def close(self) -> None:
        """Abort unfinished prompts; does nothing if there are none."""
        if self._unfinished:
            self._abort(self._unfinished)
