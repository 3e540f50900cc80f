"""GGUF's blocks of 4 and 8 bits as our formats: the codes are unchanged, only their order in memory differs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...kernels.api.codes import pack_int4
from ...kernels.api.formats import INT4, INT8
from ...kernels.api.quantized_weight import QuantizedWeight

_BLOCK = 32  # inputs that share a scale
_HEADERS = {"Q4_0": 1, "Q4_1": 2, "Q8_0": 1}  # float16 numbers in front of the codes: scale; scale and smallest value
_ALONE = ("token_embd.weight", "output.weight")
_FUSED = (
    ("attn_q", "attn_k", "attn_v"),
    ("attn_output",),
    ("ffn_gate", "ffn_up", "ffn_down"),
    ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
)


def tensors_to_keep(tensors: Mapping[str, Any]) -> set[str]:
    """Names of the tensors whose codes can be kept: those that run together must all be of one kind."""
    kept = {name for name in _ALONE if name in tensors and tensors[name].tensor_type.name in _HEADERS}
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    for block in blocks:
        for parts in _FUSED:
            names = [f"blk.{block}.{part}.weight" for part in parts]
            kinds = {tensors[name].tensor_type.name if name in tensors else "" for name in names}
            if len(kinds) == 1 and kinds <= _HEADERS.keys():
                kept.update(names)
    return kept


def codes_of(tensor: Any) -> QuantizedWeight:
    """A Q4_0, Q4_1 or Q8_0 tensor of a GGUF file, (O, I), its scales and smallest values in float16 as they are."""
    kind = tensor.tensor_type.name
    headers, inputs = _HEADERS[kind], int(tensor.shape[0])
    size = 2 * headers + (_BLOCK if kind == "Q8_0" else _BLOCK // 2)
    bytes_OGX = torch.from_numpy(tensor.data.copy()).view(-1, inputs // _BLOCK, size)
    numbers_OGX = bytes_OGX[..., : 2 * headers].contiguous().view(torch.float16)
    codes_OGX = bytes_OGX[..., 2 * headers :]
    scale = numbers_OGX[..., 0].contiguous()
    if kind == "Q8_0":
        data = codes_OGX.flatten(1).view(torch.int8)
        return QuantizedWeight(format=INT8, data=data, scale=scale, group=_BLOCK)
    codes_OI = torch.cat((codes_OGX & 15, codes_OGX >> 4), -1).flatten(1)  # a block's first half is in the low nibbles
    return QuantizedWeight(
        format=INT4,
        data=pack_int4(codes_OI),
        scale=scale,
        inputs=inputs,
        group=_BLOCK,
        offset=numbers_OGX[..., 1].contiguous() if headers == 2 else None,
    )
