"""Shared memory for the tensor axis, where the ranks of a tensor group are on one machine."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ...kernels.cpu_backend import CpuBackend
from ...kernels.cpu_shared import CpuSharedGroup, make_shared_file
from ...kernels.torch_backend import TorchBackend

if TYPE_CHECKING:
    from .context import ParallelContext


def share_memory(context: ParallelContext, backend: TorchBackend) -> CpuSharedGroup | None:
    """Set up shared memory among the ranks of this one's tensor group, all of which call this.

    Returns: None on all of them where one has another machine, there is no memory for it, or it is not wanted.
    """
    group, size = context.tensor_group, context.config.tensor
    if size == 1 or not context.config.shared_memory or not isinstance(backend, CpuBackend):
        return None
    leader = dist.get_process_group_ranks(group)[0]
    path: Path | None = None
    if context.world_rank == leader:
        with suppress(OSError):
            path = make_shared_file(size)
    said = [path]
    dist.broadcast_object_list(said, src=leader, group=group)
    opened = None
    if said[0] is not None:
        with suppress(RuntimeError):
            opened = CpuSharedGroup(backend, said[0], context.tensor_rank, size, context.config.timeout)
    everybody = torch.tensor([int(opened is not None)])
    dist.all_reduce(everybody, dist.ReduceOp.MIN, group=group)
    if path is not None:
        path.unlink()
    return opened if everybody.item() else None
