"""GGUF's K-quants: blocks of 256 inputs as weights in our formats. Codes and scales stay; their order changes.

Shape suffixes: O outputs, B blocks of an output, X bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ...kernels.api.codes import nibbles, pack
from ...kernels.api.format_join import concatenate
from ...kernels.api.formats import Q4_K, Q5_K, Q6_K, Format
from ...kernels.api.quantized_weight import QuantizedWeight
from ...kernels.cpu.codes import packed_halves

BLOCK = 256  # inputs
CHUNK = 1 << 22  # numbers that are made from blocks at a time


class Parts(NamedTuple):
    """What blocks hold: codes as the format has them, (O, X); scales and offsets of groups (O, G), of blocks float16
    (O, B)."""

    codes: torch.Tensor
    scale: torch.Tensor
    outer_scale: torch.Tensor
    offset: torch.Tensor | None = None
    outer_offset: torch.Tensor | None = None


class KQuant(NamedTuple):
    """One of the types.

    Arguments:
        nbytes: of a block.
        read: what blocks of bytes, (O, B, X), hold.
    """

    format: Format
    nbytes: int
    read: Callable[[torch.Tensor], Parts]


def k_quant_weight(raw: torch.Tensor, kind: str, shape: tuple[int, int]) -> QuantizedWeight:
    """The weight that blocks of a GGUF file stand for: ``dequantize()`` gives what llama.cpp makes of them, bit by bit.

    Arguments:
        raw: uint8, (O, bytes of a row).
        kind: a name in :data:`K_QUANTS`.
        shape: (O, I).

    Raises:
        ValueError: where the bytes do not fit the shape, or scales are not finite.
    """
    quant, (outputs, inputs) = K_QUANTS[kind], shape
    width = inputs // BLOCK * quant.nbytes
    if inputs < 1 or inputs % BLOCK or raw.dtype != torch.uint8 or raw.shape != (outputs, width):
        raise ValueError(
            f"{outputs} outputs of {inputs} inputs in {kind} are blocks of {quant.nbytes} bytes for {BLOCK} inputs, not"
            f" {raw.dtype} of shape {tuple(raw.shape)}"
        )
    chunks = raw.split(max(1, CHUNK // inputs))
    return concatenate([_weight(quant, kind, chunk, inputs) for chunk in chunks])


def _weight(quant: KQuant, kind: str, raw_OX: torch.Tensor, inputs: int) -> QuantizedWeight:
    parts = quant.read(raw_OX.unflatten(1, (-1, quant.nbytes)))
    check_finite(kind, parts.outer_scale, parts.outer_offset)
    return QuantizedWeight(
        format=quant.format,
        data=parts.codes,
        scale=parts.scale,
        inputs=inputs,
        group=quant.format.groups[0],
        offset=parts.offset,
        outer_scale=parts.outer_scale,
        outer_offset=parts.outer_offset,
    )


def check_finite(kind: str, *scales: torch.Tensor | None) -> None:
    """Raises ValueError where scales or minima of blocks are not finite."""
    for some in scales:
        if some is None:
            continue
        finite = some.view(torch.uint8) != 255 if some.dtype == torch.float8_e8m0fnu else some.isfinite()
        if not bool(finite.all()):
            wrong = some.numel() - int(finite.sum())
            raise ValueError(f"{wrong} of {some.numel()} scales of {kind} blocks are not finite")


def halves(blocks_OBX: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 numbers of blocks that begin with byte ``at``, (O, B)."""
    return blocks_OBX[..., at : at + 2].contiguous().view(torch.float16)[..., 0]


def _six_bit_scales(blocks_OBX: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and offsets of the eight groups of blocks, (O, 8 B): 6 bits each, in bytes 4 … 15.

    Of the first four groups the bits are together; those of the others have their upper two in what is left above them.
    """
    scale_X, offset_X, low_X = blocks_OBX[..., 4:16].split(4, -1)
    later = [(low_X & 15) | (scale_X >> 2 & 48), (low_X >> 4) | (offset_X >> 2 & 48)]
    first = [scale_X & 63, offset_X & 63]
    scale, offset = (torch.cat(pair, -1).flatten(1) for pair in zip(first, later, strict=True))
    return scale, offset


def _with_offsets(blocks_OBX: torch.Tensor, codes_OX: torch.Tensor) -> Parts:
    scale, offset = _six_bit_scales(blocks_OBX)
    return Parts(codes_OX, scale, halves(blocks_OBX, 0), offset, -halves(blocks_OBX, 2))


def _q4_k(blocks_OBX: torch.Tensor) -> Parts:
    return _with_offsets(blocks_OBX, packed_halves(blocks_OBX[..., 16:], 32))


def _q5_k(blocks_OBX: torch.Tensor) -> Parts:
    high = [(blocks_OBX[..., 16:48] >> group & 1) << 4 for group in range(8)]
    codes_OBI = nibbles(blocks_OBX[..., 48:], 32) | torch.cat(high, -1)
    return _with_offsets(blocks_OBX, pack(codes_OBI.flatten(1), 5))


def _q6_k(blocks_OBX: torch.Tensor) -> Parts:
    high_OBHX = blocks_OBX[..., 128:192].unflatten(-1, (2, 32))
    high = torch.cat([(high_OBHX >> shift & 3) << 4 for shift in (0, 2, 4, 6)], -1).flatten(-2)
    scale = blocks_OBX[..., 192:208].contiguous().view(torch.int8).flatten(1)
    codes_OBI = nibbles(blocks_OBX[..., :128], 64) | high
    return Parts(pack(codes_OBI.flatten(1), 6), scale, halves(blocks_OBX, 208))


K_QUANTS = {"Q4_K": KQuant(Q4_K, 144, _q4_k), "Q5_K": KQuant(Q5_K, 176, _q5_k), "Q6_K": KQuant(Q6_K, 210, _q6_k)}
