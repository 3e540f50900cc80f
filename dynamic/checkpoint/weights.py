"""Reading safetensors checkpoints: memory-mapped, one file or sharded, with every header checked before any weight.

File format: 8 bytes little-endian header length, a JSON header (name → dtype, shape, data_offsets), then the data.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...kernels.api.disk import forget, read_regular
from ...kernels.api.format_join import kind
from ...kernels.api.formats import ActivationScheme
from ...kernels.api.quantized_weight import QuantizedWeight

MAX_DIMENSIONS = 64  # torch has no more
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_NAME = 256  # characters; names are matched with patterns and shown in messages
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODE_DTYPES = {
    **{"I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu},
}
ITEM_BITS = {
    **{"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32},
    **{"F16": 16, "BF16": 16, "I16": 16, "U16": 16},
    **{"I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


Rename = Callable[[Iterable[str]], Mapping[str, str]]


class CheckpointError(ValueError):
    """A checkpoint that cannot be served; the message names the file or tensor and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The position of a tensor: ``begin`` and ``end`` are byte offsets in its file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a stored tensor that is shown as a tensor of its own, such as one of several experts.

    Arguments:
        source: the stored tensor, which is not shown itself.
        take: gives the part, a view.
    """

    source: str
    shape: tuple[int, ...]
    take: Callable[[torch.Tensor], torch.Tensor]


# From all tensors to the pieces, by name, that some of them are shown as.
Divide = Callable[[Mapping[str, TensorInfo]], Mapping[str, Piece]]


def shown(value: Any) -> str:
    """A value of a file for a message of one line: short, without line breaks."""
    return repr(value)[1:-1][:200] if isinstance(value, str) else " ".join(str(value)[:200].split())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: when the file is missing or holds no JSON object.
    """
    try:
        value = json.loads(read_regular(path).decode())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


@dataclass(frozen=True, kw_only=True)
class StoredCodes:
    """A weight as it was stored quantised, (O, I), and how its inputs are rounded."""

    weight: QuantizedWeight
    scheme: ActivationScheme


def run_together(gate: Sequence[StoredCodes], up: Sequence[StoredCodes], down: Sequence[StoredCodes]) -> bool:
    """Whether kernels can run these projections of all experts as one."""
    alike = all(len({kind(part.weight) for part in names}) == 1 for names in (gate, up, down))
    grids = {(part.weight.format, part.weight.group) for part in (*gate, *up)}
    return alike and len(grids) == 1 and len({part.scheme for part in (*gate, *up, *down)}) == 1


class Checkpoint(Mapping[str, TensorInfo]):
    """The tensors of a directory, by name. Opening it reads the headers only.

    ``view(name)`` is a tensor over the mapped file; ``release()`` lets the operating system drop the pages that have
    been read, which keeps the peak of a load near the size of the converted weights.

    Arguments:
        directory: holds one file of weights, or several and their index.
        rename: from the names in the files to those that tensors shall have; those that are not in it are left out.
        divide: finds tensors that are shown in pieces.

    Raises:
        CheckpointError: for a missing, truncated or malformed file.
    """

    def __init__(self, directory: Path, rename: Rename | None = None, divide: Divide | None = None) -> None:
        self.directory = directory
        files, self._index = _weight_files(directory)
        self._maps: dict[str, mmap.mmap] = {}
        self._tensors: dict[str, TensorInfo] = {}
        for file in files:
            self._open(file)
        for name, file in self._index.items():
            if name not in self._tensors:
                raise CheckpointError(f"{directory / file} lacks the tensor {name!r} that the index promises")
        names = {name: name for name in self._tensors} if rename is None else rename(self._tensors)
        self._names_in_files = {ours: theirs for theirs, ours in names.items()}
        if len(self._names_in_files) < len(names):
            theirs, ours = next(pair for pair in names.items() if self._names_in_files[pair[1]] != pair[0])
            raise CheckpointError(f"the tensors {theirs!r} and {self._names_in_files[ours]!r} are both {ours!r}")
        self._whole = {ours: self._tensors[theirs] for theirs, ours in names.items()}
        self._pieces = {} if divide is None else dict(divide(self._whole))
        sources = {piece.source for piece in self._pieces.values()}
        self._tensors = {name: info for name, info in self._whole.items() if name not in sources}
        for name, piece in self._pieces.items():
            if name in self._tensors:
                raise CheckpointError(f"the tensor {name!r} is there twice, by itself and in {piece.source!r}")
            self._tensors[name] = replace(self._whole[piece.source], shape=piece.shape)

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _open(self, file: str) -> None:
        path = self.directory / file
        try:
            with path.open("rb") as stream:
                # Private and writable, so that torch accepts the buffer; nothing ever writes to it.
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        except (OSError, ValueError) as error:  # mmap raises ValueError for an empty file
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        self._maps[file] = mapped
        for name, info in _parse_header(path, file, mapped).items():
            if name in self._tensors:
                raise CheckpointError(f"tensor {name!r} is in both {self._tensors[name].file} and {file}")
            if (promised := self._index.get(name, file)) != file:
                raise CheckpointError(f"tensor {name!r} is in {file}; the index says that it is in {promised!r}")
            self._tensors[name] = info

    def name_in_files(self, name: str) -> str:
        """What a tensor is called in its file."""
        return self._names_in_files[self._pieces[name].source if name in self._pieces else name]

    def view(self, name: str) -> torch.Tensor:
        """The tensor over the mapped file: do not write to it.

        Raises:
            CheckpointError: when the dtype is not a floating-point one that is supported.
        """
        info = self._tensors[name]
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"tensor {name!r} in {self.directory / info.file} has dtype {info.dtype}; "
                f"supported: {', '.join(DTYPES)}"
            )
        return self.raw(name)

    def raw(self, name: str) -> torch.Tensor:
        """As :meth:`view`, also for integers and 8-bit floats: codes of quantised weights.

        Raises:
            CheckpointError: for any other dtype.
        """
        if (piece := self._pieces.get(name)) is not None:
            return piece.take(self.raw(piece.source))
        info = self._whole[name]
        dtype = {**DTYPES, **CODE_DTYPES}.get(info.dtype)
        if dtype is None:
            raise CheckpointError(
                f"tensor {name!r} in {self.directory / info.file} has dtype {info.dtype}, which is not supported"
            )
        if info.begin == info.end:
            return torch.empty(info.shape, dtype=dtype)
        if info.begin % dtype.itemsize:  # legal in the format, but torch needs aligned elements
            data = bytearray(self._maps[info.file][info.begin : info.end])
            return torch.frombuffer(data, dtype=dtype).view(info.shape)
        count = math.prod(info.shape)
        return torch.frombuffer(self._maps[info.file], dtype=dtype, count=count, offset=info.begin).view(info.shape)

    def quantized(self, name: str) -> StoredCodes | None:
        """A weight that is stored quantised; None: it is not. See :mod:`.quantized_checkpoint`."""
        return None

    def admit(self, *, dequantize: bool) -> None:
        """See :meth:`.QuantizedCheckpoint.admit`; plain weights run as they are."""

    def release(self) -> None:
        """Drop the pages read so far from this process, and from the system's cache where the files would fill half
        of the memory; reading them again works and reads the file again."""
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
        large = 2 * sum(map(len, self._maps.values())) > memory
        for file, mapped in self._maps.items():
            if hasattr(mapped, "madvise"):
                mapped.madvise(mmap.MADV_DONTNEED)
            if large:
                with suppress(OSError), (self.directory / file).open("rb") as stream:
                    forget(stream.fileno())


def _weight_files(directory: Path) -> tuple[list[str], dict[str, str]]:
    """The weight files of a directory, and which file holds which tensor where there is an index."""
    index_path = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file():
        return ["model.safetensors"], {}
    if index_path.is_file():
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{index_path} has no usable weight_map")
        files = sorted(set(weight_map.values()))
        for file in files:
            if (
                Path(file).name != file or not file.isprintable() or len(file) > 255
            ):  # an index must not reach outside its directory
                raise CheckpointError(f"{index_path} names {file!r}, which is not a plain file name")
            if not (directory / file).is_file():
                raise CheckpointError(f"{directory / file} is missing; {index_path.name} names it")
        return files, weight_map
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory} has no safetensors weights, only {pickles[0]}; pickled weights are never loaded, "
            "because loading them can run code: convert them to safetensors first"
        )
    raise CheckpointError(f"{directory} has no weights: neither model.safetensors nor {index_path.name}")


def _parse_header(path: Path, file: str, mapped: mmap.mmap) -> dict[str, TensorInfo]:
    size = len(mapped)
    if size < 8:
        raise CheckpointError(f"{path} is truncated: {size} bytes are too few for a header")
    (header_bytes,) = struct.unpack("<Q", mapped[:8])
    if header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path} is no safetensors file: its header would be {header_bytes} bytes long")
    start = 8 + header_bytes
    if start > size:
        raise CheckpointError(f"{path} is truncated: the header ends at byte {start}, the file at {size}")
    try:
        header = json.loads(mapped[8:start], object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a corrupt header: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a corrupt header: it is no JSON object")
    header.pop("__metadata__", None)
    if (longest := max(map(len, header), default=0)) > MAX_NAME:
        raise CheckpointError(f"{path} has a corrupt header: a tensor's name of {longest} characters")
    tensors = {name: _parse_entry(path, file, name, entry, start) for name, entry in header.items()}
    end, before = start, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.end > size:
            raise CheckpointError(f"{path} is truncated: tensor {name!r} ends at byte {info.end}, the file at {size}")
        if info.begin != end:
            how = "overlap" if info.begin < end else f"have {info.begin - end} bytes between them"
            raise CheckpointError(f"{path} has a corrupt header: {before} and tensor {name!r} {how}")
        end, before = info.end, f"tensor {name!r}"
    if end < size:
        raise CheckpointError(f"{path} is corrupt: no tensor has the {size - end} bytes behind {before}")
    return tensors


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in pairs:
        if name in out:
            raise ValueError(f"{name!r} is there twice")
        out[name] = value
    return out


def _parse_entry(path: Path, file: str, name: str, entry: Any, start: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(number) is int and 0 <= number < 2**63 for number in (*shape, begin, end))
        whole = whole and len(shape) <= MAX_DIMENSIONS and len(entry) == 3
        valid = whole and dtype in ITEM_BITS and (end - begin) * 8 == math.prod(shape) * ITEM_BITS[dtype]
    except (KeyError, TypeError, ValueError):
        valid = False
        dtype, shape, begin, end = "", (), 0, 0
    if not valid:
        raise CheckpointError(f"{path} has a corrupt header: tensor {name!r} is described as {shown(entry)}")
    return TensorInfo(file=file, dtype=dtype, shape=shape, begin=start + begin, end=start + end)
