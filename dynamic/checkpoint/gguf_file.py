"""Reading GGUF files: memory-mapped, in one file or several parts; every count and size is checked before it is used.

File format, little-endian: magic, version, number of tensors, number of metadata entries; the entries (key, type,
value); the tensors' descriptions (name, sizes with the fastest one first, type, offset); padding; the data.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from .weights import CheckpointError

SUFFIX = ".gguf"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_VERSIONS = (2, 3)
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d"}
_MOST_DIMENSIONS, _MOST_PARTS = 4, 4096
_MOST_KEYS, _MOST_TENSORS, _MOST_STRINGS = 1 << 12, 1 << 14, 1 << 22  # far above what any model has
_LARGEST_ALIGNMENT = 1 << 16


@dataclass(frozen=True, kw_only=True)
class GgufArray:
    """An array of metadata; read from the file when it is asked for.

    Arguments:
        kind: type of the elements.
        count: how many there are.
        begin: offset of the first in the file.
    """

    kind: int
    count: int
    begin: int
    mapped: mmap.mmap = field(repr=False)

    def strings(self) -> list[str] | None:
        """The strings, or None where the elements are something else.

        Raises:
            UnicodeDecodeError: for one that is no UTF-8.
        """
        if self.kind != _STRING:
            return None
        out, at = [], self.begin
        for _ in range(self.count):
            (length,) = struct.unpack_from("<Q", self.mapped, at)
            out.append(self.mapped[at + 8 : at + 8 + length].decode())
            at += 8 + length
        return out

    def numbers(self) -> np.ndarray | None:
        """The numbers, or None where the elements are something else."""
        if self.kind not in _SCALARS:
            return None
        return np.frombuffer(self.mapped, "<" + _SCALARS[self.kind], self.count, self.begin)


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """A tensor.

    Arguments:
        name: in GGUF's terms.
        kind: its type, such as ``F16`` or ``Q4_K``.
        shape: sizes, the fastest one last.
        file: where it is; ``begin`` and ``end`` are byte offsets in it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def rows(self) -> int:
        """Rows of its last size."""
        return math.prod(self.shape[:-1])


class GgufFile:
    """Metadata and tensors of a model, of all its parts together. Opening it reads the headers only.

    Arguments:
        path: the file, or any part of a model that was split.

    Attributes:
        files: the file, or all parts in order.
        metadata: scalars, strings and :class:`GgufArray`, by key; of the first part.
        tensors: by name.

    Raises:
        CheckpointError: for a file that is missing, damaged or cut short, naming it and the entry or tensor.
    """

    def __init__(self, path: Path) -> None:
        self.files = gguf_parts(path)
        self._maps: dict[Path, mmap.mmap] = {}
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        for number, file in enumerate(self.files):
            part = _Header(file)
            self._maps[file] = part.mapped
            self._check_part(file, number, part.metadata)
            for name, tensor in part.tensors.items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"{file}: tensor {_quoted(name)} is in {self.tensors[name].file.name} already"
                    )
                self.tensors[name] = tensor
        promised = self.metadata.get("split.tensors.count", len(self.tensors))
        if promised != len(self.tensors):
            raise CheckpointError(
                f"{path}: split.tensors.count={promised}, but the parts hold {len(self.tensors)} tensors"
            )

    def _check_part(self, file: Path, number: int, metadata: dict[str, Any]) -> None:
        for key, wanted, default in (("split.count", len(self.files), 1), ("split.no", number, 0)):
            # A file that was not split may say so with a count of 0.
            value = metadata.get(key, default if len(self.files) == 1 else None)
            if value != wanted and not (len(self.files) == 1 and key == "split.count" and value == 0):
                raise CheckpointError(
                    f"{file}: {key}={value}, but its name makes it part {number + 1} of {len(self.files)}"
                    " (parts are named …-00001-of-0000N.gguf, side by side)"
                )
        if number == 0:
            self.metadata = metadata
            return
        for key, value in metadata.items():
            if key != "split.no" and not _equal(value, self.metadata.get(key)):
                raise CheckpointError(f"{file}: {_quoted(key)} is not what {self.files[0].name} says")

    def raw(self, tensor: GgufTensor) -> torch.Tensor:
        """A tensor's bytes over the mapped file, uint8, (rows, bytes per row): do not write to it."""
        data = torch.frombuffer(
            self._maps[tensor.file], dtype=torch.uint8, count=tensor.end - tensor.begin, offset=tensor.begin
        )
        return data.view(tensor.rows, -1)

    def release(self) -> None:
        """Drop the pages that were read from this process; reading them again works and reads the file again."""
        for mapped in self._maps.values():
            if hasattr(mapped, "madvise"):
                mapped.madvise(mmap.MADV_DONTNEED)


def gguf_parts(path: Path) -> tuple[Path, ...]:
    """All parts of a split model, given any of them; a file with another name is the only one.

    Raises:
        CheckpointError: naming the first that is missing.
    """
    match = _PART.fullmatch(path.name)
    files = (path,)
    if match:
        number, count = int(match["number"]), int(match["count"])
        if not 1 <= number <= count <= _MOST_PARTS:
            raise CheckpointError(f"{path}: a name cannot say part {number} of {count}")
        files = tuple(path.with_name(f"{match['stem']}-{n:05}-of-{count:05}{SUFFIX}") for n in range(1, count + 1))
    for file in files:
        if not file.is_file():
            others = f", and {path.name} is one of {len(files)} parts" if len(files) > 1 else ""
            raise CheckpointError(f"no such file: {file}{others}")
    return files


def find_gguf(directory: Path) -> Path | None:
    """The model in a directory of GGUF files: its file or first part; None where there are none.

    Raises:
        CheckpointError: when there are several models, naming two.
    """
    found: dict[str, Path] = {}
    for file in sorted(directory.glob(f"*{SUFFIX}")):
        match = _PART.fullmatch(file.name)
        if not file.name.startswith("mmproj"):  # the part of a model that looks at images
            found.setdefault(match["stem"] if match else file.name, file)
    if len(found) > 1:
        first, second, *_ = found.values()
        raise CheckpointError(
            f"{directory} holds {len(found)} models, such as {first.name} and {second.name}: give one file"
        )
    return next(iter(found.values()), None)


class _Header:
    """The header of one file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            with file.open("rb") as stream:
                # Private and writable, so that torch accepts the buffer; nothing ever writes to it.
                self.mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:  # mmap raises ValueError for an empty file
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        self._at = 0
        if self.mapped[:4] != b"GGUF":
            raise CheckpointError(f"{file} is not a GGUF file")
        self._at = 4
        version = self._number("I", "the version")
        if version not in _VERSIONS:
            kind = "of big-endian machines" if version % 65536 == 0 else f"of version {version}"
            raise CheckpointError(f"{file} is a GGUF file {kind}; versions {', '.join(map(str, _VERSIONS))} are read")
        num_tensors = self._count("tensors", 32, _MOST_TENSORS)
        num_keys = self._count("metadata entries", 13, _MOST_KEYS)
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._text("a metadata key")
            if key in self.metadata:
                self._fail(f"the metadata entry {_quoted(key)} is there twice")
            self.metadata[key] = self._value(key, self._number("I", f"the type of {_quoted(key)}"))
        self._alignment = self._read_alignment()
        described = [self._described() for _ in range(num_tensors)]
        start = -(-self._at // self._alignment) * self._alignment
        self.tensors: dict[str, GgufTensor] = {}
        for name, kind, shape, offset in described:
            if name in self.tensors:
                self._fail(f"tensor {_quoted(name)} is there twice")
            self.tensors[name] = self._placed(name, kind, shape, start, offset)
        self._check_overlaps()

    def _fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self.file} is damaged in its header: {reason}")

    def _take(self, size: int, what: str) -> int:
        """The offset of the next bytes, which are read now."""
        begin, self._at = self._at, self._at + size
        if self._at > len(self.mapped):
            raise CheckpointError(
                f"{self.file} is cut short or damaged in its header: it has {len(self.mapped)} bytes, and {what}"
                f" reaches to byte {self._at}"
            )
        return begin

    def _number(self, code: str, what: str) -> Any:
        begin = self._take(struct.calcsize("<" + code), what)
        return struct.unpack_from("<" + code, self.mapped, begin)[0]

    def _count(self, what: str, smallest: int, most: int) -> int:
        """How many there are of something that takes at least so many bytes each."""
        count = self._number("Q", f"the number of {what}")
        if count > most or count * smallest > len(self.mapped) - self._at:
            self._fail(f"{count} {what} do not fit a file of {len(self.mapped)} bytes")
        return count

    def _text(self, what: str) -> str:
        length = self._number("Q", what)
        begin = self._take(length, what)
        try:
            return self.mapped[begin : begin + length].decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.file} is damaged in its header: {what} is no UTF-8: {error}") from error

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._text(f"the metadata entry {_quoted(key)}")
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            self._fail(f"the metadata entry {_quoted(key)} has type {kind}, which there is not")
        value = self._number(_SCALARS[kind], f"the metadata entry {_quoted(key)}")
        if kind == _BOOL and value > 1:
            self._fail(f"the metadata entry {_quoted(key)} is neither true nor false but {value}")
        return bool(value) if kind == _BOOL else value

    def _array(self, key: str) -> GgufArray:
        what = f"the metadata entry {_quoted(key)}"
        kind = self._number("I", what)
        if kind != _STRING and kind not in _SCALARS:
            self._fail(f"{what} is an array of type {kind}, which is not read")
        size = 8 if kind == _STRING else struct.calcsize("<" + _SCALARS[kind])
        count = self._count(f"elements of {_quoted(key)}", size, _MOST_STRINGS if kind == _STRING else len(self.mapped))
        begin = self._at
        if kind == _STRING:
            for _ in range(count):
                self._take(self._number("Q", what), what)
        else:
            self._take(count * size, what)
        return GgufArray(kind=kind, count=count, begin=begin, mapped=self.mapped)

    def _read_alignment(self) -> int:
        value = self.metadata.get("general.alignment", 32)
        if type(value) is not int or not 1 <= value <= _LARGEST_ALIGNMENT or value & (value - 1):
            self._fail(f"general.alignment={_quoted(value)} is no power of two up to {_LARGEST_ALIGNMENT}")
        return value

    def _described(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._text("a tensor's name")
        what = f"the description of {_quoted(name)}"
        dimensions = self._number("I", what)
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            self._fail(f"tensor {_quoted(name)} has {dimensions} dimensions; 1 to {_MOST_DIMENSIONS} are read")
        sizes = [self._number("Q", what) for _ in range(dimensions)]
        return name, self._number("I", what), tuple(reversed(sizes)), self._number("Q", what)

    def _placed(self, name: str, number: int, shape: tuple[int, ...], start: int, offset: int) -> GgufTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            self._fail(f"tensor {_quoted(name)} has type {number}, which is not known")
        block, size = GGML_QUANT_SIZES[kind]
        if min(shape) < 1 or shape[-1] % block:
            self._fail(f"tensor {_quoted(name)} has shape {shape}; {kind.name} takes rows of a multiple of {block}")
        if offset % self._alignment:
            self._fail(f"tensor {_quoted(name)} begins at {offset}, no multiple of {self._alignment}")
        begin, length = start + offset, math.prod(shape) // block * size
        if begin + length > len(self.mapped):
            raise CheckpointError(
                f"{self.file} is cut short: it has {len(self.mapped)} bytes, and {_quoted(name)} reaches to byte"
                f" {begin + length}"
            )
        return GgufTensor(name=name, kind=kind.name, shape=shape, file=self.file, begin=begin, end=begin + length)

    def _check_overlaps(self) -> None:
        placed = sorted(self.tensors.values(), key=lambda tensor: tensor.begin)
        for before, after in pairwise(placed):
            if before.end > after.begin:
                self._fail(f"tensors {_quoted(before.name)} and {_quoted(after.name)} overlap")


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, GgufArray) and isinstance(other, GgufArray):
        return one.kind == other.kind and (
            one.strings() == other.strings() if one.kind == _STRING else bool(np.array_equal(*_numbers(one, other)))
        )
    return type(one) is type(other) and one == other


def _numbers(*arrays: GgufArray) -> list[Any]:
    return [array.numbers() for array in arrays]


def _quoted(value: Any) -> str:
    """For a message of one line."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
