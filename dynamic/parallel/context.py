"""The processes of one model: who is who, how they sum, and that all of them were started alike.

Shape suffixes as in ``kernels/api/types.py``.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ...kernels.cpu.backend import CpuBackend
from ...kernels.cpu.shared_memory import CpuSharedGroup, make_shared_file
from ...kernels.torch.backend import TorchBackend
from ...moe.exchange import ExpertAxis
from .config import ParallelConfig, launched_rank, launched_size
from .plan import FIRST, Message, decode, length

AXES = ("pipeline", "data", "expert", "tensor")
_IDLE = timedelta(days=30)  # workers wait this long for the next step
_DESCRIPTION = 1 << 16  # bytes
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ParallelContext:
    """The process groups of one model.

    Arguments:
        config: sizes of the axes. Ranks are numbered with the tensor axis innermost, then experts, then copies of the
            model, and the stages outermost.
        device: of the model.

    Attributes:
        world_rank: of this process; rank: its rank within its stage.
        kv_shard: whose rows it runs.
        shards_group: this stage's ranks of all KV shards with the same tensor rank; expert_group: those of one copy.
        mesh: all ranks by :data:`AXES`.

    Raises:
        ValueError: when the launcher started another number of processes.
    """

    def __init__(self, config: ParallelConfig, device: torch.device) -> None:
        started = launched_size()
        if started != config.size:
            raise ValueError(
                f"{_axes(config)} need {config.size} processes; "
                + (f"the launcher started {started}" if started > 1 else f"torchrun --nproc-per-node {config.size}")
            )
        self.config = config
        self.device = device
        self.world_rank = launched_rank()
        self.stage, self.rank = divmod(self.world_rank, config.stage_size)
        self.kv_shard, self.tensor_rank = divmod(self.rank, config.tensor)
        self.data_rank, self.expert_rank = divmod(self.kv_shard, config.expert)
        self.failed = False
        self.received: Counter[str] = Counter()  # bytes from other ranks, by what for
        self._shared: dict[Any, CpuSharedGroup] = {}  # by process group
        self.sums = 0
        self.broadcasts = 0
        if os.environ.get("MASTER_ADDR", "127.0.0.1") in _LOOPBACK:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        timeout = timedelta(seconds=config.timeout)
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timeout)
        self._start: Any = dist.new_group(backend="gloo", timeout=_IDLE)  # some are slow to begin
        # Workers wait for the next message as long as it takes; rank 0, whose messages must be fetched, does not.
        self._plans: Any = dist.new_group(backend="gloo", timeout=timeout if self.leads else _IDLE)
        ranks_PAET = torch.arange(config.size).view([getattr(config, axis) for axis in AXES])
        groups = [self._my_group(ranks_PAET.movedim(axis, -1)) for axis in range(ranks_PAET.dim())]
        self.mesh = DeviceMesh.from_group(groups, device.type, ranks_PAET, mesh_dim_names=AXES)
        self.tensor_group: Any = self.mesh.get_group("tensor")
        self.expert_group: Any = self.mesh.get_group("expert")
        first = self.data_rank * config.expert
        self.expert_axis = ExpertAxis(group=self.expert_group, size=config.expert, rank=self.expert_rank, first=first)
        self.shards_group: Any = self._my_group(ranks_PAET.flatten(1, 2).movedim(1, -1))

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which schedules and serves."""
        return self.world_rank == 0

    def check_alike(self, description: Mapping[str, object]) -> None:
        """Compare what the ranks were started with.

        Raises:
            ValueError: naming the first thing that differs, on every rank.
        """
        text = json.dumps({name: str(value) for name, value in description.items()}).encode()
        assert len(text) <= _DESCRIPTION
        mine = torch.zeros(_DESCRIPTION, dtype=torch.uint8)
        mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        found = [torch.empty_like(mine) for _ in range(self.config.size)]
        dist.all_gather(found, mine, group=self._start)
        first, *others = (json.loads(bytes(t.tolist()).rstrip(b"\0")) for t in found)
        for rank, other in enumerate(others, 1):
            for name in {**first, **other}:
                if first.get(name) != other.get(name):
                    raise ValueError(
                        f"the processes were started differently: {name} is {first.get(name)!r} on rank 0 "
                        f"and {other.get(name)!r} on rank {rank}"
                    )

    def send(self, message: Message) -> None:
        """Rank 0 tells the others what to do."""
        numbers = message.encode()
        self._tell(numbers[:FIRST].contiguous())
        if len(numbers) > FIRST:
            self._tell(numbers[FIRST:].contiguous())

    def receive(self) -> Message:
        """The next instruction of rank 0; waits for it."""
        first = torch.empty(FIRST, dtype=torch.int64)
        self._tell(first)
        if (total := length(first)) <= FIRST:
            return decode(first)
        rest = torch.empty(total - FIRST, dtype=torch.int64)
        self._tell(rest)
        return decode(torch.cat((first, rest)))

    def sum(self, x_TD: torch.Tensor, group: dist.ProcessGroup, purpose: str = "sums") -> torch.Tensor:
        """The sum over a group, added up in the order of the ranks, so that all ranks have the same bits.

        Arguments:
            purpose: that the bytes are counted under.

        Raises:
            RuntimeError: when a rank has died or does not answer in time.
        """
        size = dist.get_world_size(group)
        if size == 1:
            return x_TD
        x_TD = x_TD.contiguous()
        self.count_sums(1, (size - 1) * x_TD.nbytes, purpose)
        shared = self._shared.get(group)
        if shared is not None and x_TD.dtype in (torch.float32, torch.bfloat16):
            with self.watched():
                return shared.sum(x_TD)
        with self.watched():
            parts = self._exchange(x_TD, group)
        total_TD = parts[0].float()
        for part in parts[1:]:
            total_TD = total_TD + part
        return total_TD.to(x_TD.dtype)

    def count_sums(self, sums: int, received: int, purpose: str = "sums") -> None:
        """Sums of a group of this rank, and the bytes of others in them."""
        self.sums += sums
        self.received[purpose] += received

    def _exchange(self, x_TD: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
        """Everybody's addend, in the order of the ranks."""
        ranks = dist.get_process_group_ranks(group)
        if x_TD.device.type != "cpu":
            parts = [torch.empty_like(x_TD) for _ in ranks]
            dist.all_gather(parts, x_TD, group=group)
            return parts
        # Over gloo, messages from rank to rank take less than half of the time of its all-gather.
        parts = [x_TD if rank == self.world_rank else torch.empty_like(x_TD) for rank in ranks]
        others = [(rank, part) for rank, part in zip(ranks, parts, strict=True) if rank != self.world_rank]
        sent = [dist.isend(x_TD, rank, group=group) for rank, _ in others]
        for rank, part in others:
            dist.recv(part, rank, group=group)
        for work in sent:
            if work is not None:
                work.wait()
        return parts

    def swap(
        self, rows: torch.Tensor, sent: Sequence[int], coming: Sequence[int], group: dist.ProcessGroup, purpose: str
    ) -> tuple[torch.Tensor, Any]:
        """Send every rank of a group its part of some rows, and receive what all have for this one.

        Arguments:
            rows: those for the first rank in front; ``sent`` and ``coming`` count them by rank.
            purpose: that the bytes are counted under.

        Returns: the rows of all ranks in their order, and what :meth:`finish` waits for before they are read.
        """
        found, shared = rows.new_empty(sum(coming), *rows.shape[1:]), self._shared.get(group)
        work: Any
        with self.watched():
            if shared is not None:
                work = shared.swap(rows.contiguous(), sent, found, coming)
            else:
                work = dist.all_to_all_single(found, rows, list(coming), list(sent), group=group, async_op=True)
        others = len(found) - coming[dist.get_rank(group)]
        self.received[purpose] += others * found.stride(0) * found.element_size()
        return found, work

    def finish(self, work: Any) -> None:
        """Wait for what :meth:`swap` began.

        Raises:
            RuntimeError: when a rank has died or does not answer in time.
        """
        with self.watched():
            work.wait()

    def share(self, x_RD: torch.Tensor, group: dist.ProcessGroup) -> None:
        """Give rank 0's rows to all of its group: they are written over those of the others."""
        self._broadcast(x_RD, group)
        if not self.leads:
            self.received["logits"] += x_RD.nbytes

    def collect(self, part: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
        """On rank 0: the parts of all of its group, of equal shape; elsewhere nothing."""
        size, shared = dist.get_world_size(group), self._shared.get(group)
        with self.watched():
            if shared is not None:
                parts = shared.gather(part, 0)
            else:
                parts = [torch.empty_like(part) for _ in range(size)] if self.leads else []
                dist.gather(part, parts or None, dst=0, group=group)
        if parts:
            self.received["logits"] += (size - 1) * part.nbytes
        return parts

    @contextmanager
    def watched(self) -> Iterator[None]:
        """An exchange that fails fails the model."""
        try:
            yield
        except RuntimeError as error:
            self.failed = True
            raise RuntimeError(f"a process of the model has died or hangs: {error}") from error

    def gather(self, numbers: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's numbers, int64 and of equal shape on all; on every rank."""
        found = [torch.empty_like(numbers) for _ in range(self.config.size)]
        dist.all_gather(found, numbers, group=self._plans)
        return found

    def share_memory(self, backend: TorchBackend) -> None:
        """Exchange through shared memory from now on in groups whose ranks are on one machine; all ranks call this."""
        for group in (self._plans, self.tensor_group, self.expert_group, self.shards_group):
            if group not in self._shared and (memory := _share_memory(backend, group, self.config.timeout)) is not None:
                self._shared[group] = memory

    @property
    def shares_memory(self) -> bool:
        """Whether all ranks are on one machine and exchange through its memory."""
        return self._plans in self._shared

    @property
    def shared_tensor_group(self) -> CpuSharedGroup | None:
        """The memory of this rank's tensor group."""
        return self._shared.get(self.tensor_group)

    def close(self) -> None:
        """Leave the groups; nothing is waited for after a failure."""
        if not self.failed and dist.is_initialized():
            dist.destroy_process_group()

    def _my_group(self, ranks: torch.Tensor) -> Any:
        """This rank's group: the last axis of ``ranks`` has those of one group."""
        rows = ranks.flatten(0, -2).tolist()
        # Every rank makes all groups, in this order. A mesh's own groups would not have our time-out.
        groups = [dist.new_group(row, timeout=timedelta(seconds=self.config.timeout)) for row in rows]
        return next(group for group, row in zip(groups, rows, strict=True) if self.world_rank in row)

    def _tell(self, numbers: torch.Tensor) -> None:
        self._broadcast(numbers, self._plans)
        self.broadcasts += 1

    def _broadcast(self, numbers: torch.Tensor, group: Any) -> None:
        """Rank 0's numbers take the place of everybody's in a group."""
        with self.watched():
            if (shared := self._shared.get(group)) is not None:
                shared.broadcast(numbers, 0, _IDLE.total_seconds() if group is self._plans else None)
            else:
                dist.broadcast(numbers, src=0, group=group)


def _share_memory(backend: TorchBackend, group: Any, timeout: float) -> CpuSharedGroup | None:
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


def _axes(config: ParallelConfig) -> str:
    sizes = {axis: getattr(config, axis) for axis in reversed(AXES)}
    return ", ".join(f"parallel.{axis}={size}" for axis, size in sizes.items() if size > 1) or "parallel.tensor=1"
