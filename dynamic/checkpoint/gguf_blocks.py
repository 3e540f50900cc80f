"""Blocks of quantised numbers as GGUF files store them: in a format of ours where there is one, else as float32.

Shape suffixes: O outputs, I inputs, G groups of inputs, X bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...kernels.api.codes import nibbles
from ...kernels.api.formats import INT4, INT8, Format
from ...kernels.api.quantized_weight import QuantizedWeight
from ...kernels.cpu.codes import packed_halves
from .k_quants import CHUNK, K_QUANTS, check_finite, halves, k_quant_weight
from .mxfp4 import mxfp4_weight
from .weights import CheckpointError

_BLOCK = 32  # inputs that share a scale
_HALF = _BLOCK // 2  # of a block in the low nibbles of its bytes, the rest in the high ones
# Types without a format of ours that run dequantised unasked, with a warning: they are not far smaller than that.
WIDENED = ("Q5_1",)


_SIZES = {
    **{"Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "Q8_1": (32, 40)},
    **{"Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210)},
    **{"Q8_K": (256, 292), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ3_XXS": (256, 98), "IQ1_S": (256, 50)},
    **{"IQ4_NL": (32, 18), "IQ3_S": (256, 110), "IQ2_S": (256, 82), "IQ4_XS": (256, 136), "IQ1_M": (256, 56)},
    **{"TQ1_0": (256, 54), "TQ2_0": (256, 66), "MXFP4": (32, 17), "NVFP4": (64, 36), "Q1_0": (128, 18)},
}


def block_sizes() -> dict[str, tuple[int, int]]:
    """By type of quantised blocks: inputs in a block, and its bytes."""
    return _SIZES


def gguf_weight(raw_OX: torch.Tensor, kind: str, shape: tuple[int, int]) -> QuantizedWeight | None:
    """A weight at its own width; None for types that have no format here.

    Arguments:
        raw_OX: whole blocks of the wanted outputs and inputs, uint8, in any strides.
        kind: GGUF's name of the type.
        shape: (O, I).

    Raises:
        ValueError: for scales that are not finite.
    """
    if kind in K_QUANTS:
        return k_quant_weight(raw_OX, kind, shape)
    if (read := _FORMATS.get(kind)) is None:
        return None
    weight = read(raw_OX.contiguous().view(shape[0], shape[1] // _BLOCK, -1))
    check_finite(kind, weight.scale, weight.offset)
    return weight


def has_format(kind: str) -> bool:
    """Whether weights of a type stay at their width."""
    return kind in K_QUANTS or kind in _FORMATS


def dequantized(raw_OX: torch.Tensor, kind: str, shape: tuple[int, int]) -> torch.Tensor:
    """The weight in float32, (O, I); a part of the rows at a time, so that it takes little more memory than that.

    Raises:
        CheckpointError: for a type that cannot be dequantised.
        ValueError: for scales that are not finite.
    """
    from gguf import GGMLQuantizationType, dequantize

    outputs, inputs = shape
    step = max(CHUNK // inputs, 1)
    weight_OI = torch.empty(shape)
    for first in range(0, outputs, step):
        rows = raw_OX[first : first + step].contiguous().numpy()
        try:
            part = dequantize(rows, GGMLQuantizationType[kind])
        except NotImplementedError as error:
            raise CheckpointError(f"type {kind} cannot be dequantised") from error
        weight_OI[first : first + step] = torch.from_numpy(part)
    if not bool(weight_OI.isfinite().all()):
        raise ValueError(f"some scales of its {kind} blocks are not finite")
    return weight_OI


def _weight(
    form: Format, codes_OX: torch.Tensor, scale_OG: torch.Tensor, offset_OG: torch.Tensor | None = None
) -> QuantizedWeight:
    """From codes of whole rows as the format has them, and of each block its scale and its smallest value if any."""
    return QuantizedWeight(
        format=form,
        data=codes_OX,
        scale=scale_OG,
        inputs=scale_OG.shape[1] * _BLOCK,
        group=_BLOCK,
        offset=offset_OG,
    )


def _q4_0(blocks: torch.Tensor) -> QuantizedWeight:
    return _weight(INT4, packed_halves(blocks[..., 2:], _HALF), halves(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> QuantizedWeight:
    return _weight(INT4, packed_halves(blocks[..., 4:], _HALF), halves(blocks, 0), halves(blocks, 2))


def _q5_0(blocks: torch.Tensor) -> QuantizedWeight:
    """-16 … 15 in 8 bits; the fifth bits come first, one for each input."""
    fifth = (blocks[..., 2:6, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    codes = nibbles(blocks[..., 6:], _HALF) | (fifth.flatten(-2) << 4)
    return _weight(INT8, (codes.view(torch.int8) - 16).flatten(1), halves(blocks, 0))


def _q8_0(blocks: torch.Tensor) -> QuantizedWeight:
    return _weight(INT8, blocks[..., 2:].view(torch.int8).flatten(1).contiguous(), halves(blocks, 0))


def _mxfp4(blocks: torch.Tensor) -> QuantizedWeight:
    return mxfp4_weight(packed_halves(blocks[..., 1:], _HALF).view(*blocks.shape[:2], -1), blocks[..., 0])


_FORMATS: dict[str, Callable[[torch.Tensor], QuantizedWeight]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
    "MXFP4": _mxfp4,
}
