"""Estimates the memory of a training run before it starts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_GIB = 2**30
# Gradients of activations live beside what was saved for them; temporary buffers of single operations come on top.
_WORKSPACE_FACTOR = 1.3


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes that a run needs at its peak."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = (self.total, self.weights, self.gradients, self.optimizer, self.activations)
        total, weights, gradients, optimizer, activations = (f"{p / _GIB:.2f}" for p in parts)
        return (
            f"{total} GiB (weights {weights}, gradients {gradients}, optimiser {optimizer}, activations {activations})"
        )


def estimate_memory(
    model: torch.nn.Module, loss_of_sample: Callable[[], torch.Tensor], samples_per_step: int, moments: int = 2
) -> MemoryEstimate:
    """Measure what one sample keeps for its backward pass, and scale it to a step.

    Arguments:
        loss_of_sample: runs the model on a single sample and returns the loss; called once.
        samples_per_step: samples of a real step.
        moments: tensors of the parameter's size that the optimiser keeps for each parameter.
    """
    saved: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss_of_sample()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return MemoryEstimate(
        weights=weights,
        gradients=trainable,
        optimizer=moments * trainable,
        activations=round(sum(saved.values()) * samples_per_step * _WORKSPACE_FACTOR),
    )


def available_memory(device: torch.device) -> int:
    """Bytes that may still be taken on a device; on a CPU, within this process's control group as well."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists() and (match := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        free = int(match[1]) * 1024
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    with suppress(OSError):  # where there is no cgroup v2
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            free = min(free, max(int(limit) - used, 0))
    return free


def refuse_if_too_large(estimate: MemoryEstimate, available: int) -> None:
    """Raises:
    ValueError: when the estimate exceeds what is available; the message states by how much and what to change.
    """
    if estimate.total > available:
        raise ValueError(
            f"this run needs about {estimate} but only {available / _GIB:.2f} GiB are free; take a smaller batch"
            " (batch_tokens), a shorter sequence or a smaller model"
        )
