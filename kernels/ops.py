"""The only place that chooses which backend runs the operations."""

from __future__ import annotations

import torch

from .torch_backend import TorchBackend

BACKENDS = ("auto", "torch")


def select_backend(device: torch.device | str, dtype: torch.dtype, name: str = "auto") -> TorchBackend:
    """The backend for a device and dtype.

    Arguments:
        name: ``auto`` takes the fastest that runs here.

    Raises:
        ValueError: for an unknown name, or a backend that cannot run on that device.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    return TorchBackend(device, dtype)
