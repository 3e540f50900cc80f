"""Keys and values as 8-bit integers: how one head of one token lies in the cache, and what it stands for.

C codes, then their scale as two bytes (bfloat16): C + 2 bytes in place of 2 C. A scale is the largest magnitude of the
head over 127, rounded up, so that no code is cut off; rows are quantised one by one and never depend on others.
Symmetric, per token and head, as KVQuant and KIVI do it for values; keys are taken the same way, after their rotation.
"""

from __future__ import annotations

import torch

KV_DTYPES = {"auto": None, "int8": torch.int8}  # as ``engine.kv_dtype`` names them; None: the model's own
SCALE_BYTES = 2


def stored_channels(head_dim: int, dtype: torch.dtype) -> int:
    """Elements that a head of ``head_dim`` channels takes in a cache of this dtype."""
    return head_dim + SCALE_BYTES if dtype == torch.int8 else head_dim


def encode(x: torch.Tensor) -> torch.Tensor:
    """Heads (..., C), floating, as the cache keeps them: int8 (..., C + 2). A head that is not finite stays so."""
    x32 = x.float()
    bits = (x32.abs().amax(-1, keepdim=True) / 127).view(torch.int32)
    scale = ((bits + 0xFFFF) >> 16 << 16).view(torch.float32)
    scale = torch.where(x32.isfinite().all(-1, keepdim=True), scale, torch.nan)
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    codes = (x32 * inverse).round().clamp(-127, 127).nan_to_num().to(torch.int8)
    return torch.cat((codes, scale.bfloat16().view(torch.int8)), -1)


def decode(stored: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`encode`: float32 (..., C)."""
    codes, scale = stored.split((stored.shape[-1] - SCALE_BYTES, SCALE_BYTES), -1)
    return codes.float() * scale.contiguous().view(torch.bfloat16).float()
