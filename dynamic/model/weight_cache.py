"""Weights that were quantised while a model was loaded, kept on the disk as they were packed, for the next start.

A file belongs to the content of a checkpoint, the quantisation, the code that packs, and the instruction set: another
one of these is another file. Those that were used least recently make room for new ones. The folder and what is in it
belong to the user alone; a file that is damaged, or that somebody else could have written, is made anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...exits.sidecar import backbone_hash
from ...kernels.api.disk import cache_home
from ...kernels.api.packed_weight import PackedWeight
from ...kernels.api.ranges import parse_bytes
from ...kernels.api.rounding import Rounding
from ...kernels.api.sources import sources_hash
from ...kernels.torch.backend import TorchBackend
from ..checkpoint.packed_file import PackedFileError, read_packed, write_packed
from .load_config import WeightCacheConfig
from .quantization import Quantization

logger = logging.getLogger(__name__)

_SUFFIX, _UNFINISHED, _KNOWN = ".packed", ".unfinished", "checkpoints.json"
_MOST_KNOWN = 256  # checkpoints whose hashes are remembered
_SETTLED = 2.0  # seconds after its last change in which a file may change again and keep its time
_SPARE = 1 << 30  # bytes that stay free on the disk


class WeightCache:
    """The packed weights of one checkpoint, by name: those that a file has, and those that are to be written to one.

    Arguments:
        file: where they are kept.
        key: what they follow from.
        limit: bytes that all files of the folder may have together.
    """

    def __init__(self, file: Path, key: Mapping[str, Any], limit: int) -> None:
        self.file = file
        self._key, self._limit = key, limit
        self._found: dict[str, PackedWeight] = {}
        self._made: dict[str, PackedWeight] = {}

    def read(self, backend: TorchBackend) -> bool:
        """Take what the file has, if there is one; otherwise it is to be written."""
        try:
            self._found = read_packed(self.file, self._key, backend.allocate)
        except FileNotFoundError:
            return False
        except PackedFileError as error:
            logger.warning("%s; the weights are quantised again", error)
            return False
        with suppress(OSError):
            os.utime(self.file)  # it was used last
        return True

    def take(self, name: str) -> PackedWeight | None:
        """What is kept under a name, once: the model owns it then."""
        return self._found.pop(name, None)

    def keep(self, name: str, packed: PackedWeight | None) -> None:
        """Have packed weights written, unless the backend has none to keep."""
        if packed is not None:
            self._made[name] = packed

    def write(self) -> None:
        """Write what is to be kept, if anything is; what goes wrong costs a warning and the time at the next start."""
        if not self._made:
            return
        size = sum(packed.nbytes for packed in self._made.values())
        try:
            with _locked(self.file.parent) as mine:
                if not mine:
                    logger.info("another process writes to %s: these weights are not kept", self.file.parent)
                elif self._make_room(size):
                    self._write()
        except OSError as error:
            logger.warning("the quantised weights are not kept for the next start: %s", error)
        self._made = {}

    def _make_room(self, size: int) -> bool:
        folder = self.file.parent
        for left_over in folder.glob(f"*{_UNFINISHED}"):
            left_over.unlink()
        others = [(found.st_mtime, found.st_size, file) for file, found in _files(folder) if file != self.file]
        room = min(self._limit, shutil.disk_usage(folder).free - _SPARE + sum(size for _, size, _ in others))
        if size > room:
            logger.warning("%d bytes of quantised weights are not kept: %s has room for %d", size, folder, room)
            return False
        taken = sum(size for _, size, _ in others)
        for _, others_size, file in sorted(others):
            if taken + size <= room:
                break
            file.unlink()
            taken -= others_size
        return True

    def _write(self) -> None:
        unfinished = self.file.with_suffix(_UNFINISHED)
        try:
            write_packed(unfinished, self._key, self._made)
            os.replace(unfinished, self.file)
        finally:
            unfinished.unlink(missing_ok=True)


def open_cache(
    config: WeightCacheConfig, path: Path, backend: TorchBackend, quantization: Quantization, *, mtp: bool = False
) -> WeightCache | None:
    """The cache for a checkpoint; None where nothing is to be kept: no quantisation of ours, a small checkpoint, a
    backend that packs nothing, or a folder that cannot be had.

    Arguments:
        path: the checkpoint's directory.
        quantization: of its weights while they are loaded.
        mtp: whether the layers that predict further tokens are loaded too.
    """
    isa = getattr(backend, "isa", None)
    method = quantization.layers
    if not config.enabled or isa is None or method is None or not isinstance(method.quantize, Rounding):
        return None
    files = sorted(path.glob("*.safetensors"))
    if sum(file.stat().st_size for file in files) < parse_bytes(config.least, "weight_cache.least"):
        return None
    folder = cache_home() / "weights" if config.folder is None else Path(config.folder).expanduser()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise OSError(f"others than this user may write to {folder}")
        key = {
            "checkpoint": _content(folder, path, files),
            "config": hashlib.sha256((path / "config.json").read_bytes()).hexdigest(),
            "quantization": [quantization.method, str(quantization), asdict(method.scheme), _facts(method.quantize)],
            "dtype": str(backend.dtype),
            "backend": [backend.name, isa],
            "mtp": mtp,
            "code": [sources_hash("kernels", "dynamic/checkpoint", "dynamic/model"), torch.__version__],
        }
    except OSError as error:
        logger.warning("quantised weights are not kept: %s", error)
        return None
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return WeightCache(folder / (name + _SUFFIX), key, parse_bytes(config.size, "weight_cache.size"))


def _facts(rounding: Rounding) -> dict[str, Any]:
    return {**vars(rounding), "format": rounding.format.name}


def _content(folder: Path, path: Path, files: list[Path]) -> str:
    """The hash of a checkpoint's weights, remembered as long as sizes, times and places of its files are the same."""
    stamps = [[file.name, *_stamp(file)] for file in files]
    known, name = _read_known(folder / _KNOWN), str(path.resolve())
    if name in known and known[name][0] == stamps:
        return known[name][1]
    changed = max(max(stamp[2:4]) for stamp in stamps)
    digest = backbone_hash(path)
    if stamps == [[file.name, *_stamp(file)] for file in files] and time.time_ns() - changed > _SETTLED * 1e9:
        known.pop(name, None)
        kept = {**dict(list(known.items())[1 - _MOST_KNOWN :]), name: [stamps, digest]}
        partial = folder / f"{_KNOWN}.{os.getpid()}"
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as stream:
            json.dump(kept, stream)
        os.replace(partial, folder / _KNOWN)
    return digest


def _stamp(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


def _read_known(file: Path) -> dict[str, Any]:
    try:
        known = json.loads(file.read_bytes())
        return known if isinstance(known, dict) and all(len(entry) == 2 for entry in known.values()) else {}
    except (OSError, ValueError, TypeError):
        return {}


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for file in folder.glob(f"*{_SUFFIX}"):
        with suppress(FileNotFoundError):
            yield file, file.stat()


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether this process alone may write to a folder: nobody waits for another one, which may be stopped."""
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)
