"""How many processes share a model, and along which axes."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ...kernels.api.ranges import check_ranges, parse_bytes


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the axes; their product is the number of processes that the launcher starts.

    Arguments:
        tensor: processes that share every head and every neuron of an FFN among them.
        expert: processes that share the experts of every mixture among them.
        pipeline: stages of layers; a model with exits is cut at them.
        data: copies of the model, among which the rows of every step are shared out.
        micro_batches: parts of a step that follow one another through the stages; 0: as many as there are stages.
        padded_rows: the exchange between experts sends steps of at most so many rows without asking how many go where.
        timeout: seconds after which a process that does not answer counts as hung.
        placement: file by whose measured load experts are spread over the expert axis; null takes them in their order.
        record_load: file that takes the load of each expert when the processes end.
        rebalance_steps: steps of a window in which the load of experts is counted; behind it they are moved where that
            makes the ranks' loads more even. 0: they stay where they are.
        copies_memory: bytes that each process may hold copies of much used experts in, as a number or with a unit.
        shared_memory: whether processes on one machine exchange through shared memory instead of messages.
    """

    tensor: int = 1
    expert: int = 1
    pipeline: int = 1
    data: int = 1
    micro_batches: int = 0
    padded_rows: int = 256
    timeout: float = 30.0
    placement: str | None = None
    record_load: str | None = None
    rebalance_steps: int = 0
    copies_memory: int | str = 0
    shared_memory: bool = True

    def __post_init__(self) -> None:
        check_ranges(self, "tensor", "expert", "pipeline", "data", where="parallel.", least=1)
        check_ranges(self, "micro_batches", "padded_rows", "rebalance_steps", where="parallel.", least=0)
        check_ranges(self, "timeout", where="parallel.", above=0)
        if self.placement is not None and self.expert == 1:
            raise ValueError(f"parallel.placement={self.placement} needs parallel.expert above 1")
        if self.rebalance_steps and self.expert == 1:
            raise ValueError(f"parallel.rebalance_steps={self.rebalance_steps} needs parallel.expert above 1")
        if parse_bytes(self.copies_memory, "parallel.copies_memory") and not self.rebalance_steps:
            raise ValueError(f"parallel.copies_memory={self.copies_memory} needs parallel.rebalance_steps above 0")

    @property
    def size(self) -> int:
        """Processes in all."""
        return self.stage_size * self.pipeline

    @property
    def stage_size(self) -> int:
        """Processes of one stage."""
        return self.tensor * self.kv_shards

    @property
    def kv_shards(self) -> int:
        """Places where sequences live: each is the processes of one tensor group in every stage."""
        return self.expert * self.data

    def __str__(self) -> str:
        more = [(name, getattr(self, name)) for name in ("data", "pipeline")]
        slots = ", experts move" if self.rebalance_steps else ""  # their results are added up in another order
        return (
            f"tensor {self.tensor}, expert {self.expert}"
            + "".join(f", {n} {size}" for n, size in more if size > 1)
            + slots
        )


def launched_rank() -> int:
    """This process's rank among those that ``torchrun`` or ``deepspeed`` started; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def launched_size() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
