"""The fingerprint of the C++ kernels: a hash of what every operator computes on fixed inputs.

What changes no result keeps it: a comment, a faster loop of the same order, another compiler that keeps to IEEE
arithmetic. One bit of any output of :mod:`.vectors` changes it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from ..api.sources import sources_hash
from ..torch.backend import TorchBackend
from . import build as cpu_build
from .vectors import PLAIN, vectors

logger = logging.getLogger(__name__)


def fingerprint(backend: TorchBackend, isa: str, parts: Iterable[str], processor: str) -> str:
    """A hash of what the operators compute, 64 hexadecimal digits.

    It takes a second or two, once per build, instruction set, dtype and processor: the hashes are kept beside the
    built library.

    Arguments:
        backend: the CPU's; isa: its instruction set.
        parts: keys of :func:`.vectors` that a model uses beside :data:`.PLAIN`.
        processor: its name: kernels of one instruction set should agree on all of them, which is not taken for granted.

    Raises:
        ValueError: for a part without vectors, naming it.
    """
    known = vectors()
    wanted = sorted({PLAIN, *parts})
    if unknown := [part for part in wanted if part not in known]:
        raise ValueError(f"the kernels have no test vectors for {', '.join(unknown)}")
    file = _file(isa, backend.dtype, processor)
    kept = _read(file)
    if missing := [part for part in wanted if part not in kept]:
        kept |= {part: hash_of(known[part](backend)) for part in missing}
        _write(file, kept)
    return hashlib.sha256(json.dumps([[part, kept[part]] for part in wanted]).encode()).hexdigest()


@torch.inference_mode()
def hash_of(outputs: Iterable[torch.Tensor]) -> str:
    """The SHA-256 of tensors: dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for tensor in outputs:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _file(isa: str, dtype: torch.dtype, processor: str) -> Path | None:
    """Where the hashes are kept; None with sources from outside the package, which may change behind their back."""
    if os.environ.get(cpu_build.EXTRA_SOURCES):
        return None
    # Packing and formats are Python, and the vectors go through them.
    sources = sources_hash("kernels/api", "kernels/cpu", "kernels/reference", "kernels/torch")
    definitions = hashlib.sha256(f"{processor} {sources}".encode()).hexdigest()[:16]
    return cpu_build.loaded().with_name(f"outputs-{isa}-{str(dtype).removeprefix('torch.')}-{definitions}.json")


def _read(file: Path | None) -> dict[str, str]:
    try:
        return {} if file is None else dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return {}  # not there, or cut short: computed again


def _write(file: Path | None, hashes: dict[str, str]) -> None:
    if file is None:
        return
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(hashes))
        partial.replace(file)
    except OSError as error:  # a library that was built elsewhere, in a folder that only can be read
        logger.warning("the fingerprint of the kernels is computed at every start: %s", error)
