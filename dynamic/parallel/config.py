"""How many processes share a model, and along which axes."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the axes; their product is the number of processes that the launcher starts.

    Arguments:
        tensor: processes that share every head and every neuron of an FFN among them.
        expert: processes that share the experts of every mixture among them.
        pipeline: stages of layers; a model with exits is cut at them.
        data: copies of the model; only 1 so far.
        micro_batches: parts of a step that follow one another through the stages; 0: as many as there are stages.
        timeout: seconds after which a process that does not answer counts as hung.
        placement: file by whose measured load experts are spread over the expert axis; null takes them in their order.
        record_load: file that takes the load of each expert when the processes end.
    """

    tensor: int = 1
    expert: int = 1
    pipeline: int = 1
    data: int = 1
    micro_batches: int = 0
    timeout: float = 30.0
    placement: str | None = None
    record_load: str | None = None

    def __post_init__(self) -> None:
        for name in ("tensor", "expert", "pipeline", "data"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name} must be at least 1, not {getattr(self, name)}")
        if self.data > 1:
            raise ValueError(f"parallel.data={self.data} is not supported; only 1 is")
        if self.micro_batches < 0:
            raise ValueError(f"parallel.micro_batches must be at least 0, not {self.micro_batches}")
        if not self.timeout > 0:
            raise ValueError(f"parallel.timeout must be above 0 seconds, not {self.timeout}")
        if self.placement is not None and self.expert == 1:
            raise ValueError(f"parallel.placement={self.placement} needs parallel.expert above 1")

    @property
    def size(self) -> int:
        """Processes in all."""
        return self.stage_size * self.pipeline

    @property
    def stage_size(self) -> int:
        """Processes of one stage."""
        return self.tensor * self.expert

    def __str__(self) -> str:
        stages = f", pipeline {self.pipeline}" if self.pipeline > 1 else ""
        return f"tensor {self.tensor}, expert {self.expert}{stages}"


def launched_rank() -> int:
    """This process's rank among those that ``torchrun`` or ``deepspeed`` started; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def launched_size() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
