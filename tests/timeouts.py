"""Ends a test that takes too long, in place of pytest-timeout's own signal, which hypothesis takes for a failure of the
code under test: it would run the example again, without a limit, and then report that the test is flaky.
"""

from __future__ import annotations

import signal
from typing import Any

import pytest


class TimedOut(BaseException):
    """A test took too long. Not an ``Exception``, so that nothing in the test handles it."""


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: Any, settings: Any) -> bool | None:
    """Set an alarm; None leaves the method ``thread`` to pytest-timeout."""
    if settings.method != "signal":
        return None

    def expire(number: int, frame: Any) -> None:
        raise TimedOut(f"{item.nodeid} ran for more than {settings.timeout} s")

    def cancel() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    item.cancel_timeout = cancel
    signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, settings.timeout)
    return True
