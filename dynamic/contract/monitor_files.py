"""Which file in a folder a monitor takes, and which old ones are removed."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from .e_process import EProcess
from .monitor_store import MonitorInUse

T = TypeVar("T")
KEEP_DAYS = 90


def open_first(file: Path, open_file: Callable[[Path], T]) -> T:
    """Open the first file that no other process has of ``x.db``, ``x-1.db``, ``x-2.db`` and so on.

    So there are as many files as servers of a model have run at once, whatever their addresses were.

    Raises:
        ValueError: as ``open_file``.
    """
    for number in itertools.count():
        with contextlib.suppress(MonitorInUse):
            return open_file(file.with_name(f"{file.stem}-{number}{file.suffix}") if number else file)
    raise AssertionError("unreachable")


def remove_stale(folder: Path) -> list[Path]:
    """Remove monitors' files of a folder that nobody has written for :data:`KEEP_DAYS` and that no process has.

    One in which a certificate has fired stays, and so does what is no monitor's file.

    Returns: the files that were removed.
    """
    oldest = time.time() - KEEP_DAYS * 86400
    removed = []
    for file in sorted(folder.glob("*.db")):
        with contextlib.suppress(OSError, sqlite3.Error, ValueError, KeyError, TypeError):
            if file.stat().st_mtime < oldest and _remove_unless_needed(file):
                removed.append(file)
    return removed


def _remove_unless_needed(file: Path) -> bool:
    with contextlib.closing(sqlite3.connect(file, timeout=0, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")  # fails while a process has the file
        if any(EProcess.from_json(text).fired for (text,) in connection.execute("SELECT process FROM certificates")):
            return False
        bets = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'bets'").fetchone()
        if bets and connection.execute("SELECT 1 FROM bets WHERE fired IS NOT NULL").fetchone():
            return False
        for path in (file, *(file.with_name(file.name + suffix) for suffix in ("-journal", "-wal", "-shm"))):
            path.unlink(missing_ok=True)
    return True
