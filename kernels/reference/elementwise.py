"""Functions of single numbers that give a number the same result wherever it lies in a tensor.

On CPUs torch's own sigmoid, SiLU and softplus compute the numbers at the end of a tensor in another way than those
before them, so that a row's result would depend on how many rows there are. Its exponential does not.
"""

from __future__ import annotations

import torch


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """``1 / (1 + exp(-x))``, as the C++ kernels compute it: with strides torch takes one number after the other."""
    return torch.stack((x, x), -1)[..., 0].sigmoid() if x.device.type == "cpu" else x.sigmoid()


def silu(x: torch.Tensor) -> torch.Tensor:
    """``x · sigmoid(x)``."""
    return x / (1 + torch.exp(-x))


def softplus(x: torch.Tensor) -> torch.Tensor:
    """``log(1 + exp(x))``."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))
