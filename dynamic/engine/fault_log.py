"""A log of errors that something outlives: one line a minute for each kind, however often it happens."""

from __future__ import annotations

import time
from collections.abc import Callable
from logging import Logger


class OncePerMinute:
    """Admits one event of each kind a minute and counts the others. Usable from any thread.

    Arguments:
        clock: seconds.
    """

    SECONDS = 60.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._admitted: dict[str, tuple[float, int]] = {}  # kind → when, and how many since were left out

    def admit(self, kind: str) -> int | None:
        """How many of this kind were left out since the last one; None where this one is to be left out as well.

        Arguments:
            kind: one of a few names: never a client's choice.
        """
        now = self._clock()
        admitted, left_out = self._admitted.get(kind, (-self.SECONDS, 0))
        if now - admitted < self.SECONDS:
            self._admitted[kind] = admitted, left_out + 1
            return None
        self._admitted[kind] = now, 0
        return left_out


class FaultLog:
    """Logs an error with its traceback, then counts others of its kind for a minute. Usable from any thread.

    Arguments:
        logger: takes the errors.
        clock: seconds.
    """

    def __init__(self, logger: Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._kinds = OncePerMinute(clock)

    def report(self, kind: str, error: Exception) -> None:
        """Log that ``kind``, what has failed, has raised an error; see :meth:`OncePerMinute.admit`."""
        left_out = self._kinds.admit(kind)
        if left_out is not None:
            before = f" ({left_out} times more since the last such line)" if left_out else ""
            self._logger.error("%s failed: %s: %s%s", kind, type(error).__name__, error, before, exc_info=error)
