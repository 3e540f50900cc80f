"""What ran where: processor, versions, revision of the code, for the records of measurements."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch

from ...version import __version__

_FEW_ELEMENTS = 1 << 20  # 16 rows of 49,152 logits take one of two threads 0.2 ms less than both
_SOFT_PAUSE = 1  # omp_pause_soft: keeps the threads' settings


@cache
def processor() -> str:
    """Its name, as the system gives it."""
    if (info := Path("/proc/cpuinfo")).exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def run_facts() -> dict[str, str | int]:
    """Revision of the code, versions, date and machine of what this process measures."""
    return {
        "git_revision": git_revision(),
        "version": __version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "processor": processor(),
        "cpus": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
    }


@cache
def git_revision() -> str:
    """The commit of the checkout that the package runs from, with ``-dirty`` where files differ; ``none`` elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed: a repository around it would be somebody else's
        return "none"
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "none"


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def use_threads(count: int | None) -> None:
    """Compute with so many CPU threads; None leaves torch's own choice."""
    if count is not None:
        torch.set_num_threads(count)


@contextmanager
def own_thread_for(elements: int) -> Iterator[None]:
    """Run torch's operators on the calling thread alone, if they go over no more elements than it reads sooner than
    others wake up. Between the kernels' work, whose threads are not torch's, these are always asleep; and where other
    programs use the cores, the caller would wait for their turn.
    """
    threads = torch.get_num_threads()
    change = _openmp_threads() if threads > 1 and elements <= _FEW_ELEMENTS else None
    if change is None:
        yield
        return
    change(1)
    try:
        yield
    finally:
        change(threads)


@cache
def _openmp_threads() -> Callable[[int], object] | None:
    """Sets the calling thread's number alone; torch's own function also sets what new threads begin with."""
    return getattr(ctypes.CDLL(None), "omp_set_num_threads", None)


def release_threads() -> None:
    """Let go of the threads that parallel work of this thread has used, before another thread does such work.

    libgomp counts them while they are idle. With more threads than cores each sleeps at once when it waits, which slows
    an engine in a thread of its own. They are made again when needed.
    """
    with suppress(OSError, StopIteration, AttributeError):
        maps = Path("/proc/self/maps").read_text().splitlines()
        library = next(line.split()[-1] for line in maps if "libgomp" in line)
        ctypes.CDLL(library).omp_pause_resource_all(_SOFT_PAUSE)


def release_free_memory() -> None:
    """Give the system back what this process has freed and its C library keeps; glibc's keeps much of a loader's."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
