"""Blocks of GGUF's K-quants for tests: weights rounded to them, and random ones with scales of every kind.

The layout is llama.cpp's (``block_q4_K``, ``block_q5_K``, ``block_q6_K`` in ``ggml-common.h``).
"""

from __future__ import annotations

import torch
from dynamoe.dynamic.checkpoint.k_quants import k_quant_weight
from dynamoe.kernels.api.format_join import stack_experts
from dynamoe.kernels.api.quantized_weight import QuantizedWeight

BYTES = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}  # of 256 weights
# Zero, the smallest numbers of float16, its largest one, and their negatives.
EXTREMES = (0.0, 2.0**-24, 3 * 2.0**-24, 2.0**-14, 1.0, 65504.0, -(2.0**-24), -1.5)


def k_blocks(kind: str, weight_OI: torch.Tensor) -> torch.Tensor:
    """Rounded to nearest under scales that reach from end to end of each group: uint8, (O, bytes of a row)."""
    groups_XGI = weight_OI.float().reshape(-1, 256 // (16 if kind == "Q6_K" else 32), 16 if kind == "Q6_K" else 32)
    if kind == "Q6_K":
        scale_XG = groups_XGI.abs().amax(-1) / 31
        scale_XG[:, ::2] *= -1  # both signs occur
        d_X = (scale_XG.abs().amax(-1, keepdim=True) / 127).half()
        codes_XG = _steps(scale_XG, d_X).clamp(-127, 127)
        codes = (_steps(groups_XGI, (d_X * codes_XG)[..., None]) + 32).clamp(0, 63)
        return _q6_k(codes.flatten(1), codes_XG, d_X).reshape(len(weight_OI), -1)
    top = 15 if kind == "Q4_K" else 31
    low_XG, high_XG = groups_XGI.amin(-1).clamp(max=0), groups_XGI.amax(-1).clamp(min=0)
    scale_XG = (high_XG - low_XG) / top
    d_X, dmin_X = ((numbers.amax(-1, keepdim=True) / 63).half() for numbers in (scale_XG, -low_XG))
    scales, mins = _steps(scale_XG, d_X).clamp(0, 63), _steps(-low_XG, dmin_X).clamp(0, 63)
    codes = _steps(groups_XGI + (dmin_X * mins)[..., None], (d_X * scales)[..., None]).clamp(0, top)
    return _with_mins(codes.flatten(1), scales, mins, d_X, dmin_X, kind).reshape(len(weight_OI), -1)


def k_weight(kind: str, weight: torch.Tensor) -> QuantizedWeight:
    """A weight (O, I) or (E, O, I) rounded to K-quants; where a row is no whole blocks, it is cut from one that is."""
    if weight.dim() == 3:
        return stack_experts([k_weight(kind, part_OI) for part_OI in weight])
    whole_OI = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 256))
    whole = k_quant_weight(k_blocks(kind, whole_OI), kind, (len(weight), whole_OI.shape[1]))
    return whole.columns(0, weight.shape[1])


def random_blocks(kind: str, outputs: int, inputs: int) -> torch.Tensor:
    """Random bytes, but for the scales of blocks: small numbers, and :data:`EXTREMES` in the first ones."""
    count = outputs * inputs // 256
    blocks_XB = torch.randint(256, (count, BYTES[kind]), dtype=torch.uint8)
    for at in (208,) if kind == "Q6_K" else (0, 2):
        numbers_X = (torch.rand(count) / 64 + 2e-3).half() * torch.where(torch.rand(count) < 0.5, -1, 1)
        some = min(count, len(EXTREMES))
        numbers_X[torch.randperm(count)[:some]] = torch.tensor(EXTREMES[:some]).half()
        blocks_XB[:, at : at + 2] = numbers_X.half()[:, None].view(torch.uint8)
    return blocks_XB.reshape(outputs, -1)


def _steps(values: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    return torch.where(step == 0, 0.0, values / step.float()).nan_to_num().round()


def _bytes(half_X1: torch.Tensor) -> torch.Tensor:
    return half_X1.half().contiguous().view(torch.uint8)


def _with_mins(
    codes_XI: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor, d: torch.Tensor, dmin: torch.Tensor, kind: str
) -> torch.Tensor:
    scales, mins, codes_XCHJ = scales.byte(), mins.byte(), codes_XI.byte().view(-1, 4, 2, 32)
    packed = [
        scales[:, :4] | scales[:, 4:] >> 4 << 6,
        mins[:, :4] | mins[:, 4:] >> 4 << 6,
        scales[:, 4:] & 15 | mins[:, 4:] << 4,
    ]
    low = (codes_XCHJ[:, :, 0] & 15 | codes_XCHJ[:, :, 1] << 4).flatten(1)
    high = []
    if kind == "Q5_K":
        bits_XGJ = codes_XI.byte().view(-1, 8, 32) >> 4
        high = [sum(bits_XGJ[:, group] << group for group in range(8))]
    return torch.cat([_bytes(d), _bytes(dmin), *packed, *high, low], -1)


def _q6_k(codes_XI: torch.Tensor, scales: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    codes_XHQJ = codes_XI.byte().view(-1, 2, 4, 32)
    low = torch.stack([codes_XHQJ[:, :, q] & 15 | (codes_XHQJ[:, :, q + 2] & 15) << 4 for q in (0, 1)], 2).flatten(1)
    high = sum((codes_XHQJ[:, :, q] >> 4) << 2 * q for q in range(4))
    assert isinstance(high, torch.Tensor)
    return torch.cat([low, high.flatten(1), scales.to(torch.int8).view(torch.uint8), _bytes(d)], -1)
