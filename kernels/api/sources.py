"""A hash of the package's own source files: what code computed something."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
_SOURCES = (".py", ".cpp", ".h")


def sources_hash(*folders: str) -> str:
    """The SHA-256 of names and content of the Python and C++ files below folders of the package, 16 digits."""
    return _hash(tuple(sorted(folders)))


@cache
def _hash(folders: Sequence[str]) -> str:
    digest = hashlib.sha256()
    files = [file for folder in folders for file in ROOT.joinpath(folder).rglob("*") if file.suffix in _SOURCES]
    for file in sorted(files):
        digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]
