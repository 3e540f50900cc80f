"""Elementwise functions of torch whose result for a row does not depend on how many rows there are."""

from __future__ import annotations

import torch


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """The logistic function.

    torch runs tensors without gaps in whole vectors and what is left over number by number, which may differ in the
    last bit; a tensor with gaps runs number by number throughout.
    """
    return torch.stack((x, x), -1)[..., 0].sigmoid() if x.device.type == "cpu" else x.sigmoid()
