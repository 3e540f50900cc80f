"""The machine's processor, for the records of measurements."""

from __future__ import annotations

import ctypes
import platform
from contextlib import suppress
from functools import cache
from pathlib import Path


@cache
def processor() -> str:
    """Its name, as the system gives it."""
    if (info := Path("/proc/cpuinfo")).exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def release_free_memory() -> None:
    """Give the system back what this process has freed and its C library keeps; glibc's keeps much of a loader's."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
