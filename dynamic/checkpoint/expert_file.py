"""Packed experts on the disk, one record each, to be read one at a time while a model runs.

A folder holds ``records``, one behind the other at multiples of 4,096 bytes, and ``table.json``: a hash in the first
line, and behind it of what the records were made, where they are, and a checksum of each.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from ...kernels.api.disk import flush, forget
from .weights import CheckpointError

PAGE = 4096
_PART = 64  # bytes that the second part of a record begins at a multiple of
_VERSION = 1
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class ExpertReadError(RuntimeError):
    """An expert could not be read while the model ran; the message says which, from where, and why."""


@dataclass(frozen=True, kw_only=True)
class LayerRecords:
    """Where the experts of a layer are, and what they are.

    Arguments:
        first: offset of the first record; stride: bytes from one to the next.
        second: where in a record its second part begins.
        checksums: of each expert's record, and at the end of the one that they share.
        shared_bytes: of that one, without its padding.
        facts: what the kernels have to know beside the bytes.
    """

    first: int
    stride: int
    second: int
    checksums: Sequence[str]
    shared_bytes: int
    facts: Any

    @property
    def num_experts(self) -> int:
        return len(self.checksums) - 1

    @property
    def end(self) -> int:
        return self.first + self.num_experts * self.stride + _padded(self.shared_bytes, PAGE)


def checksum(record: Bytes) -> str:
    """Of whole pages, at the speed of memory: a hash of the sums of every page and of every place in the pages.

    It sees whatever accidents do to a file: bits that flip, stretches of zeros, pages in each other's place.
    """
    words = record.view(np.uint64).reshape(-1, PAGE // 8)
    sums = words.sum(0).tobytes() + words.sum(1).tobytes()
    return hashlib.blake2b(sums, digest_size=16).hexdigest()


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


class ExpertFileWriter:
    """Writes a folder of records beside its place, and moves it there when it is whole.

    One process at a time does so; others wait.

    Arguments:
        folder: its place; what is there before is replaced.
        made_of: see :class:`ExpertFile`.
    """

    def __init__(self, folder: Path, made_of: str) -> None:
        self._folder, self._made_of = folder, made_of
        self._unfinished = folder.with_name(f".{folder.name}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder.with_name(f"{folder.name}.lock"))
        self._lock.acquire()
        shutil.rmtree(self._unfinished, ignore_errors=True)
        self._unfinished.mkdir(parents=True)
        self._stream = (self._unfinished / "records").open("wb", buffering=0)
        self._layers: dict[int, LayerRecords] = {}
        self._end = 0

    def add(self, layer: int, first: Bytes, second: Bytes, shared: bytes, facts: Any) -> None:
        """Write the experts of a layer.

        Arguments:
            first, second: (experts, bytes), the two parts of each expert.
            shared: what they share.
            facts: JSON.

        Raises:
            CheckpointError: the disk is full, or another error of it.
        """
        where, begin = _padded(first.shape[1], _PART), self._end
        record = np.zeros(_padded(where + second.shape[1], PAGE), np.uint8)
        checksums = []
        for one, other in zip(first, second, strict=True):
            record[: len(one)], record[where : where + len(other)] = one, other
            checksums.append(self._write(record))
        rest = np.zeros(_padded(len(shared), PAGE), np.uint8)
        rest[: len(shared)] = np.frombuffer(shared, np.uint8)
        checksums.append(self._write(rest))
        forget(self._stream.fileno(), written=True)
        self._layers[layer] = LayerRecords(
            **{"first": begin, "stride": len(record), "second": where, "checksums": checksums},
            **{"shared_bytes": len(shared), "facts": facts},
        )

    def _write(self, record: Bytes) -> str:
        left = record.data
        try:
            while left:
                left = left[self._stream.write(left) :]
        except OSError as error:
            self.discard()
            raise CheckpointError(f"packed experts cannot be written to {self._folder.parent}: {error}") from error
        self._end += len(record)
        return checksum(record)

    def finish(self) -> None:
        """Move the folder to its place, all of it on the disk before."""
        self._stream.close()
        layers = {str(number): asdict(layer) for number, layer in self._layers.items()}
        table = json.dumps({"version": _VERSION, "made_of": self._made_of, "layers": layers})
        text = hashlib.sha256(table.encode()).hexdigest() + "\n" + table
        (self._unfinished / "table.json").write_text(text, encoding="utf-8")
        for name in ("records", "table.json", "."):
            flush(self._unfinished / name)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._unfinished.replace(self._folder)
        flush(self._folder.parent)
        self._lock.release()

    def discard(self) -> None:
        """Drop what was written."""
        self._stream.close()
        shutil.rmtree(self._unfinished, ignore_errors=True)
        self._lock.release()


class ExpertFile:
    """An open folder of records. It stays open, so that it may be deleted or replaced while a model runs from it.

    Records are read past the page cache where the file system can do that, and leave nothing in it where it cannot.

    Arguments:
        made_of: what the records must have been made of, in words of the writer's.

    Raises:
        CheckpointError: there is no such folder, it is of something else, or not whole.
    """

    def __init__(self, folder: Path, made_of: str) -> None:
        self.folder = folder
        try:
            digest, _, text = (folder / "table.json").read_text(encoding="utf-8").partition("\n")
            table = json.loads(text) if digest == hashlib.sha256(text.encode()).hexdigest() else {}
            same = table.get("version") == _VERSION and table.get("made_of") == made_of
            layers = table["layers"].items() if same else ()
            size = (folder / "records").stat().st_size
        except (OSError, ValueError) as error:
            raise CheckpointError(f"no packed experts in {folder}: {error}") from error
        self.layers = {int(number): LayerRecords(**layer) for number, layer in layers}
        if not same or max((layer.end for layer in self.layers.values()), default=0) != size:
            raise CheckpointError(f"the packed experts in {folder} are damaged, or of another model")
        self._handle, self.direct = self._open()

    def _open(self) -> tuple[int, bool]:
        path = self.folder / "records"
        direct = getattr(os, "O_DIRECT", 0)
        if direct:
            with suppress(OSError):
                handle = os.open(path, os.O_RDONLY | direct)
                try:
                    os.preadv(handle, [mmap.mmap(-1, PAGE)], 0)
                    return handle, True
                except OSError:  # opened, and yet not read like that
                    os.close(handle)
        return os.open(path, os.O_RDONLY), False

    def read(self, layer: int, expert: int, out: Bytes) -> None:
        """Read an expert's record. Usable from several threads.

        Arguments:
            out: contiguous, of the layer's stride, at a multiple of 4,096.

        Raises:
            ExpertReadError: it could not be read, or is not what was written.
        """
        records = self.layers[layer]
        reason = self._read(records.first + expert * records.stride, out, records.checksums[expert])
        if reason:
            raise ExpertReadError(f"expert {expert} of layer {layer} in {self.folder / 'records'}: {reason}")

    def shared(self, layer: int) -> bytes:
        """What the experts of a layer share.

        Raises:
            CheckpointError: as for :meth:`read`.
        """
        records = self.layers[layer]
        buffer = np.frombuffer(mmap.mmap(-1, max(_padded(records.shared_bytes, PAGE), PAGE)), np.uint8)
        out = buffer[: _padded(records.shared_bytes, PAGE)]
        where = records.first + records.num_experts * records.stride
        if reason := self._read(where, out, records.checksums[-1]):
            raise CheckpointError(f"layer {layer} in {self.folder / 'records'}: {reason}")
        return out[: records.shared_bytes].tobytes()

    def _read(self, offset: int, out: Bytes, expected: str) -> str:
        """Fill a buffer; returns what is wrong, if something is."""
        done = 0
        try:
            while done < len(out):
                count = os.preadv(self._handle, [out.data[done:]], offset + done)
                if not count:
                    return f"the file ends {len(out) - done} bytes too early"
                done += count
            if not self.direct:
                forget(self._handle, offset, len(out))
        except OSError as error:
            return f"it cannot be read: {error}"
        return "" if checksum(out) == expected else "its bytes are damaged: their checksum is another one"

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)
