"""Shared memory in place of messages, for groups of ranks that are on one machine."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...kernels.cpu.backend import CpuBackend
from ...kernels.cpu.shared_memory import CpuSharedGroup, make_shared_file
from ...kernels.torch.backend import TorchBackend


def share_memory(backend: TorchBackend, group: Any, timeout: float) -> CpuSharedGroup | None:
    """Set up shared memory among the ranks of a group, all of which call this.

    Arguments:
        timeout: seconds until a rank that does not come counts as hung.

    Returns: None on all of them where one is on another machine, or there is no memory for it.
    """
    size = dist.get_world_size(group)
    if size == 1 or not isinstance(backend, CpuBackend):
        return None
    rank, leader = dist.get_rank(group), dist.get_process_group_ranks(group)[0]
    path: Path | None = None
    if rank == 0:
        with suppress(OSError):
            path = make_shared_file(size)
    said = [path]
    dist.broadcast_object_list(said, src=leader, group=group)
    opened = None
    if said[0] is not None:
        with suppress(RuntimeError):
            opened = CpuSharedGroup(backend, said[0], rank, size, timeout)
    everybody = torch.tensor([int(opened is not None)])
    dist.all_reduce(everybody, dist.ReduceOp.MIN, group=group)
    if path is not None:
        path.unlink()
    return opened if everybody.item() else None
