"""A log of errors that something outlives: one line a minute for each kind, however often it happens."""

from __future__ import annotations

import time
from collections.abc import Callable
from logging import Logger


class FaultLog:
    """Logs an error with its traceback, then counts others of its kind for a minute. Usable from any thread.

    Arguments:
        logger: takes the errors.
        clock: seconds.
    """

    SECONDS = 60.0

    def __init__(self, logger: Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._logged: dict[str, tuple[float, int]] = {}  # kind → when, and how many since were only counted

    def report(self, kind: str, error: Exception) -> None:
        """Log that ``kind`` has raised an error.

        Arguments:
            kind: what has failed, one of a few names: never a client's choice.
        """
        now = self._clock()
        logged_at, silent = self._logged.get(kind, (-self.SECONDS, 0))
        if now - logged_at < self.SECONDS:
            self._logged[kind] = logged_at, silent + 1
            return
        self._logged[kind] = now, 0
        before = f" ({silent} times more since the last such line)" if silent else ""
        self._logger.error("%s failed: %s: %s%s", kind, type(error).__name__, error, before, exc_info=error)
