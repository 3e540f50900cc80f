"""Directories that are made once, in a cache, and are read for ever after: whole and unchanged, or made again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from ...kernels.api.disk import flush

_SEAL = ".sealed.json"


def seal(directory: Path, hashes: Mapping[str, str] = MappingProxyType({})) -> None:
    """Note the size, the time of change and the hash of every file in a directory, and bring all of it to the disk.

    Called before the directory gets its final name: after a crash it is there with all its bytes, or not at all.

    Arguments:
        hashes: SHA-256 of files that need not be read for it, by name.
    """
    names = _files(directory)
    files = {name: [*_stamp(directory / name), hashes.get(name) or _hash(directory / name)] for name in names}
    (directory / _SEAL).write_text(json.dumps(files))
    for path in (*directory.rglob("*"), directory):
        flush(path)


def is_intact(directory: Path) -> bool:
    """Whether the files of a directory are those that were sealed.

    One that still has its size and its time of change is not read; a copy is, and gets that time.
    """
    try:
        sealed = json.loads((directory / _SEAL).read_text())
        return _files(directory) == sorted(sealed) and all(
            _is_sealed(directory / name, *entry) for name, entry in sealed.items()
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _is_sealed(file: Path, size: int, changed: int, digest: str) -> bool:
    found = _stamp(file)
    if found == [size, changed]:
        return True
    if found[0] != size or _hash(file) != digest:
        return False
    with contextlib.suppress(OSError):  # where it cannot be written, it is read each time
        os.utime(file, ns=(changed, changed))
    return True


def _files(directory: Path) -> list[str]:
    found = (path for path in directory.rglob("*") if path.is_file())
    return sorted(name for path in found if (name := str(path.relative_to(directory))) != _SEAL)


def _stamp(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
