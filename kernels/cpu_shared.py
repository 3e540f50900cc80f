"""Processes of one machine that add up in shared memory (``cpu/shared.h``), without messages."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .cpu_backend import CpuBackend

FOLDER = Path("/dev/shm")


def make_shared_file(size: int) -> Path:
    """A file for the group of so many processes; whoever made it unlinks it once all have opened it.

    Raises:
        OSError: where there is no shared memory, or too little.
    """
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
    """This process in a group of ``size``.

    Arguments:
        path: the file that all of them open.
        timeout: seconds until a process that does not come counts as hung.

    Raises:
        RuntimeError: when the file cannot be opened or mapped.
    """

    def __init__(self, backend: CpuBackend, path: Path, rank: int, size: int, timeout: float) -> None:
        self.handle: Any = torch.classes.dynamoe_cpu.SharedGroup(backend.isa_number, str(path), rank, size, timeout)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of everybody's, added up in the order of the ranks in float32; float32 or bfloat16, contiguous.

        Raises:
            RuntimeError: when a process has died or does not come in time; the group is of no use then.
        """
        return self.handle.sum(x)
