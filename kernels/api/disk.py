"""Bytes that are on the disk before anything relies on them, and bytes that end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def cache_home() -> Path:
    """Of what is made once: ``$DYNAMOE_HOME``, else ``$XDG_CACHE_HOME/dynamoe``, else ``~/.cache/dynamoe``."""
    if home := os.environ.get("DYNAMOE_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynamoe"


def flush(path: Path) -> None:
    """Bring a file, or the entries of a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_regular(file: Path) -> bytes:
    """The bytes of a file. A pipe or a device under its name might give bytes for ever, or none.

    Raises:
        OSError: it is no file, and no link to one, or cannot be read.
    """
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(file))
    return file.read_bytes()


def check_writable(file: Path) -> None:
    """Check that a file could be written, before the work whose result it is to hold.

    Raises:
        OSError: naming it.
    """
    place, number = file if file.exists() else file.parent, 0
    if file.is_dir():
        number = errno.EISDIR
    elif not file.parent.is_dir():
        number = errno.ENOENT
    elif not os.access(place, os.W_OK):
        number = errno.EACCES
    if number:
        raise OSError(number, os.strerror(number), str(file))


def forget(file: int, start: int = 0, count: int = 0, *, written: bool = False) -> None:
    """Take the pages of an open file out of the system's cache: whoever reads more than fits crowds out others.

    Arguments:
        start, count: bytes; 0 goes to the end.
        written: bring what was written to the disk before: only such pages can go.
    """
    if written:
        os.fsync(file)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start, count, os.POSIX_FADV_DONTNEED)
