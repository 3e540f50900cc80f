"""Files of packed weights: written once, read with all threads into memory of the kernels' own, every chunk checked.

A mapped file would be read through small pages, and so would every product with its weights from then on.

File format, little-endian: magic; the length of the header (8 bytes) and its hash (16 bytes, XXH3); the header, JSON;
then the words of all weights, each tensor's from a multiple of 64 bytes on.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ...kernels.api.packed_weight import PackedWeight

_MAGIC = b"DYNAMOE\x01"
_PREFIX = len(_MAGIC) + 8 + 16
_ALIGNMENT = 64
_CHUNK = 4 << 20  # bytes that share a hash
_MOST_HEADER = 1 << 30
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class PackedFileError(ValueError):
    """A file that is damaged, or is not what was looked for; the message says which and why."""


def write_packed(file: Path, key: Mapping[str, Any], weights: Mapping[str, PackedWeight]) -> None:
    """Write packed weights. Nothing waits for the disk: what a crash leaves of the file is seen when it is read.

    Arguments:
        file: a new one, which only its owner can read.
        key: what the weights follow from; it must be asked for when they are read.

    Raises:
        OSError: it cannot be written.
    """
    tensors = [words for weight in weights.values() for words in weight.words]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        hashes = list(pool.map(lambda words: [_hash(chunk).hex() for _, chunk in _chunks(words)], tensors))
    described = {
        name: {"shape": weight.shape, "layouts": weight.layouts, "words": [words.numel() for words in weight.words]}
        for name, weight in weights.items()
    }
    header = json.dumps({"key": key, "weights": described, "hashes": hashes}).encode()
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as stream:
        stream.write(_MAGIC + struct.pack("<Q", len(header)) + _hash(header) + header)
        for words in tensors:
            stream.write(bytes(-stream.tell() % _ALIGNMENT))
            for _, chunk in _chunks(words):
                stream.write(chunk)


def read_packed(file: Path, key: Mapping[str, Any], allocate: Callable[[int], torch.Tensor]) -> dict[str, PackedWeight]:
    """The weights of a file, all of them checked.

    Arguments:
        key: what the weights must follow from.
        allocate: memory for so many words, int32.

    Raises:
        FileNotFoundError: there is none.
        PackedFileError: it is damaged, of another key, or of somebody else who could have changed it.
    """
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise PackedFileError(f"{file} cannot be read: {error}") from error
    try:
        return _read(file, handle, key, allocate)
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise PackedFileError(f"{file} is damaged: {error}") from error
    finally:
        os.close(handle)


def _read(
    file: Path, handle: int, key: Mapping[str, Any], allocate: Callable[[int], torch.Tensor]
) -> dict[str, PackedWeight]:
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & _OTHERS_WRITE:
        raise ValueError("others than this user could have written it")
    prefix = os.pread(handle, _PREFIX, 0)
    (length,) = struct.unpack_from("<Q", prefix, len(_MAGIC))
    if prefix[: len(_MAGIC)] != _MAGIC or length > _MOST_HEADER:
        raise ValueError("it does not begin like a file of packed weights")
    text = os.pread(handle, length, _PREFIX)
    if _hash(text) != prefix[-16:]:
        raise ValueError("its header has changed")
    header = json.loads(text)
    if header["key"] != json.loads(json.dumps(key)):
        raise ValueError("it holds other weights than its name says")
    at, places, weights = _PREFIX + length, [], {}
    for weight in header["weights"].values():
        for count in weight["words"]:
            at += -at % _ALIGNMENT
            places.append((at, count))
            at += 4 * count
    if at != found.st_size:
        raise ValueError(f"it has {found.st_size} bytes, not {at}")
    tensors = [allocate(count) for _, count in places]
    jobs = [
        (begin + offset, chunk, bytes.fromhex(known))
        for (begin, _), words, hashes in zip(places, tensors, header["hashes"], strict=True)
        for (offset, chunk), known in zip(_chunks(words), hashes, strict=True)
    ]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for (offset, _, _), intact in zip(jobs, pool.map(lambda job: _fill(handle, *job), jobs), strict=True):
            if not intact:
                pool.shutdown(cancel_futures=True)
                raise ValueError(f"what it holds from byte {offset} on has changed")
    rest = iter(tensors)
    for name, weight in header["weights"].items():
        weights[name] = PackedWeight(
            shape=tuple(weight["shape"]),
            words=tuple(next(rest) for _ in weight["words"]),
            layouts=tuple(map(tuple, weight["layouts"])),
        )
    return weights


def _fill(handle: int, offset: int, chunk: memoryview, known: bytes) -> bool:
    """Read a chunk, and say whether it has the hash that is known of it."""
    done = 0
    while done < len(chunk):
        if (count := os.preadv(handle, [chunk[done:]], offset + done)) == 0:
            return False
        done += count
    return _hash(chunk) == known


def _chunks(words: torch.Tensor) -> Iterator[tuple[int, memoryview]]:
    """The bytes of a tensor in chunks, and where each begins."""
    data = memoryview(words.numpy().data).cast("B")
    for at in range(0, len(data), _CHUNK):
        yield at, data[at : at + _CHUNK]


def _hash(data: bytes | memoryview) -> bytes:
    from xxhash import xxh3_128_digest

    return xxh3_128_digest(data)
