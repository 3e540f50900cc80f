"""Codes of files brought into the order of our formats: by the C++ kernels where they are loaded, else by torch."""

from __future__ import annotations

import torch

from ..api.codes import nibbles, pack_int4
from .build import is_loaded


def packed_halves(bytes_OBX: torch.Tensor, run: int) -> torch.Tensor:
    """Codes of 4 bits two to a byte, the even input in the low nibble, (O, B · X).

    Arguments:
        bytes_OBX: uint8; of each run of bytes the low nibbles are the first codes, the high ones those behind them.
        run: bytes, an even number.
    """
    if is_loaded() and bytes_OBX.is_cpu:
        return torch.ops.dynamoe_cpu.pack_halves.default(bytes_OBX, run)
    return pack_int4(nibbles(bytes_OBX, run).flatten(1))
