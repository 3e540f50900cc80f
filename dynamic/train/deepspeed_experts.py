"""DeepSpeed's expert groups for our mixtures: what its engine needs to know about experts that are spread over ranks.

The engine reduces the gradients of parameters marked as experts over the ranks that hold the same ones. It looks for
such parameters only in models with a layer of its own class; an empty one announces them. Its checkpoints keep the
optimiser's states of experts, but their weights only in modules of its own, so those are written beside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .expert_groups import spread_experts
from .model import TrainableDecoder


class ExpertGroups:
    """The experts of a model, spread over groups of ranks.

    Arguments:
        model: the same on every rank; keeps this rank's part of the experts.
        size: ranks of a group.
    """

    def __init__(self, model: TrainableDecoder, size: int) -> None:
        from deepspeed.utils import groups

        self._name = f"ep_size_{size}"
        groups._create_expert_and_data_parallel(size)
        self.group = groups._get_expert_parallel_group(self._name)
        self._writes = groups._get_expert_data_parallel_rank(self._name) == 0
        self._file = f"experts-{dist.get_rank(self.group)}-of-{size}.pt"
        self._num_experts = model.config.num_experts
        self._parameters = spread_experts([layer.mlp for layer in model.layers], self.group)
        for parameter in self._parameters:
            parameter.allreduce, parameter.group_name = False, self._name  # type: ignore[attr-defined]

    def announcement(self) -> nn.Module:
        """A module without parameters by which the engine knows that there are experts."""
        from deepspeed.moe.layer import MoE

        class Announcement(MoE):
            def __init__(self, name: str, num_experts: int) -> None:
                nn.Module.__init__(self)  # MoE's own would make a router and experts
                self.expert_group_name, self.num_experts = name, num_experts
                self.num_local_experts = 0  # that the engine's checkpoints should write or find

            def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
                assert not use_data_before_expert_parallel_  # the groups are made already

        return Announcement(self._name, self._num_experts)

    def split(self, optimizer: torch.optim.Optimizer) -> None:
        """Give experts parameter groups of their own, with the settings of those they were in."""
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        named = [{**group, "name": str(number)} for number, group in enumerate(optimizer.param_groups)]
        optimizer.param_groups = split_params_into_different_moe_groups_for_optimizer(named)

    def save(self, checkpoint: Path) -> None:
        """Write the weights of this rank's experts, once per group of experts, into a checkpoint's directory."""
        if self._writes:
            checkpoint.mkdir(parents=True, exist_ok=True)
            torch.save([parameter.detach().clone() for parameter in self._parameters], checkpoint / self._file)

    @torch.no_grad()
    def load(self, checkpoint: Path) -> None:
        """Read what :meth:`save` wrote."""
        weights: list[torch.Tensor] = torch.load(checkpoint / self._file, map_location="cpu", weights_only=True)
        for parameter, weight in zip(self._parameters, weights, strict=True):
            parameter.copy_(weight)


def refuse_other_groups(checkpoint: Path, size: int) -> None:
    """
    Raises:
        ValueError: when a checkpoint was written by groups of another size.
    """
    found = max(1, len(list(checkpoint.glob("experts-*.pt"))))
    if found != size:
        raise ValueError(f"{checkpoint} was written with zero.expert={found}, not {size}")


def clip_gradients(model: TrainableDecoder, limit: float, group: Any) -> torch.Tensor:
    """Scale gradients down to a norm over all of the model's parameters, those of other ranks' experts too.

    The engine's own clipping of float32 weights without ZeRO takes the mean of the ranks' norms instead.

    Arguments:
        limit: the norm; 0 leaves them alone.
        group: process group that shares the experts; None where every rank holds all.

    Returns: the norm before.
    """
    shared, experts = [], []
    for parameter in model.parameters():
        if parameter.grad is not None:
            (shared if getattr(parameter, "allreduce", True) else experts).append(parameter.grad)
    square = torch.nn.utils.get_total_norm(experts).square().to(shared[0].device)
    if group is not None:
        dist.all_reduce(square, group=group)
    norm = (torch.nn.utils.get_total_norm(shared).square() + square).sqrt()
    if limit:
        torch.nn.utils.clip_grads_with_norm_(list(model.parameters()), limit, norm)
    return norm
