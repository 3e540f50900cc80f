"""How fast an engine gets through its requests."""

from __future__ import annotations

import time


class Pace:
    """How fast requests finish, as a moving average."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._interval = 1.0

    def finished(self) -> None:
        """A request is done."""
        now = time.monotonic()
        if self._last is not None:
            self._interval += 0.1 * (now - self._last - self._interval)
        self._last = now

    @property
    def seconds_per_request(self) -> float:
        """At least one second, at most a minute."""
        return min(max(self._interval, 1.0), 60.0)
