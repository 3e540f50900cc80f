"""Heads of an int8 cache as the CPU keeps them: their scales right behind their codes."""

from __future__ import annotations

import torch
from dynamoe.kernels.api.kv_codes import SCALE_BYTES, quantize


def encode(x: torch.Tensor) -> torch.Tensor:
    """Heads (..., C), floating, as int8 (..., C + 2)."""
    codes, scale = quantize(x)
    return torch.cat((codes, scale[..., None].view(torch.int8)), -1)


def decode(stored: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`encode`: float32 (..., C)."""
    codes, scale = stored.split((stored.shape[-1] - SCALE_BYTES, SCALE_BYTES), -1)
    return codes.float() * scale.contiguous().view(torch.bfloat16).float()
