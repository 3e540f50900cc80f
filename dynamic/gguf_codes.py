"""GGUF's 4-bit blocks as our int4 format: the codes stay what they are, only their order in memory changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..kernels.formats import Int4Weight, pack_int4

_BLOCK = 32  # inputs that share a scale
_HEADERS = {"Q4_0": 1, "Q4_1": 2}  # float16 numbers in front of a block's codes: scale; scale and smallest value
_FUSED = (("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up", "ffn_down"))


def tensors_to_keep(tensors: Mapping[str, Any]) -> set[str]:
    """Names of the tensors whose codes can be kept: those that run together must all be of one 4-bit kind."""
    kept = set()
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    for block in blocks:
        for parts in _FUSED:
            names = [f"blk.{block}.{part}.weight" for part in parts]
            kinds = {tensors[name].tensor_type.name if name in tensors else "" for name in names}
            if len(kinds) == 1 and kinds <= _HEADERS.keys():
                kept.update(names)
    return kept


def int4_of(tensor: Any) -> Int4Weight:
    """A Q4_0 or Q4_1 tensor of a GGUF file, (O, I), its scales and smallest values in float16 as they are."""
    headers = _HEADERS[tensor.tensor_type.name]
    inputs = int(tensor.shape[0])
    size = 2 * headers + _BLOCK // 2
    bytes_OGX = torch.from_numpy(tensor.data.copy()).view(-1, inputs // _BLOCK, size)
    numbers_OGX = bytes_OGX[..., : 2 * headers].contiguous().view(torch.float16)
    both_OGX = bytes_OGX[..., 2 * headers :]
    codes_OI = torch.cat((both_OGX & 15, both_OGX >> 4), -1).flatten(1)  # a block's first half is in the low nibbles
    return Int4Weight(
        data=pack_int4(codes_OI),
        scale=numbers_OGX[..., 0].contiguous(),
        inputs=inputs,
        group=_BLOCK,
        offset=numbers_OGX[..., 1].contiguous() if headers == 2 else None,
    )
