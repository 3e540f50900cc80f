"""Processes of one machine that exchange through shared memory (``cpu/shared.h``), without messages."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import build as cpu_build
from .backend import CpuBackend

FOLDER = Path("/dev/shm")


def make_shared_file(size: int) -> Path:
    """A file for the group of so many processes; whoever made it unlinks it once all have opened it.

    Raises:
        OSError: where there is no shared memory, or too little.
    """
    cpu_build.load()
    path = FOLDER / f"dynamoe-{uuid.uuid4().hex}"
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        # Taken now: a page that is missing later would end the process.
        os.posix_fallocate(file, 0, torch.ops.dynamoe_cpu.shared_bytes.default(size))
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(file)
    return path


class CpuSharedGroup:
    """This process in a group of ``size``. All of them call the same methods in the same order; tensors are contiguous.

    Methods raise RuntimeError when a process has died, or does not come in time; the group is of no use then.

    Arguments:
        backend: whose kernels add up.
        path: the file that all of them open.
        timeout: seconds until a process that does not come counts as hung.

    Raises:
        RuntimeError: when the file cannot be opened or mapped.
    """

    def __init__(self, backend: CpuBackend, path: Path, rank: int, size: int, timeout: float) -> None:
        self.handle: Any = torch.classes.dynamoe_cpu.SharedGroup(backend.isa_number, str(path), rank, size, timeout)
        self._rank, self._size, self._timeout = rank, size, timeout

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of everybody's, added up in the order of the ranks in float32; float32 or bfloat16."""
        return self.handle.sum(x)

    def broadcast(self, x: torch.Tensor, root: int, timeout: float | None = None) -> None:
        """The root's numbers take the place of everybody's; ``timeout``: seconds to wait, if not the usual time."""
        self.handle.broadcast(x, root, self._timeout if timeout is None else timeout)

    def gather(self, part: torch.Tensor, root: int) -> list[torch.Tensor]:
        """Everybody's part, on the root; elsewhere nothing."""
        parts = part.new_empty(self._size if self._rank == root else 0, *part.shape)
        self.handle.gather(part, parts, root)
        return list(parts)

    def swap(self, rows: torch.Tensor, sent: Sequence[int], found: torch.Tensor, coming: Sequence[int]) -> Swap:
        """Send every rank its rows, and receive those of all in ``found``; nothing else may be called until it is done.

        Arguments:
            rows: those for the first rank in front; ``sent`` and ``coming`` count them by rank.
        """
        self.handle.begin_swap(rows, list(sent))
        return Swap(self, found, list(coming))


@dataclass(frozen=True)
class Swap:
    """An exchange that has begun."""

    group: CpuSharedGroup
    found: torch.Tensor
    coming: list[int]

    def wait(self) -> None:
        """Until all rows are there."""
        self.group.handle.finish_swap(self.found, self.coming)
