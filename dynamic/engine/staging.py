"""Takes what a step needs to the device in one copy."""

from __future__ import annotations

import numpy as np
import torch

_ALIGNMENT = 16  # bytes: kernels are compiled for pointers aligned like this


class HostStaging:
    """Copies arrays of the host to a device together.

    For a GPU they are packed into one page-locked buffer, which goes up in one asynchronous copy; what comes back are
    views of it. On a CPU the arrays are used where they are.

    Arguments:
        device: where to.
        packed: whether to pack; None packs for every device but the CPU.

    Attributes:
        uploads: copies so far.
    """

    def __init__(self, device: torch.device, packed: bool | None = None) -> None:
        self.device = device
        self.uploads = 0
        self._packed = device.type != "cpu" if packed is None else packed

    def upload(self, *arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
        """The arrays as tensors on the device. They must not change afterwards."""
        if not self._packed:
            return tuple(torch.from_numpy(array) for array in arrays)
        starts, total = [], 0
        for array in arrays:
            starts.append(total)
            total += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        # The allocator of page-locked memory hands a buffer out again only when its copy is done.
        host = torch.empty(total, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        bytes_N = host.numpy()
        for start, array in zip(starts, arrays, strict=True):
            bytes_N[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        device_N = host.to(self.device, non_blocking=True)
        self.uploads += 1
        return tuple(
            device_N[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
            for start, array in zip(starts, arrays, strict=True)
        )
