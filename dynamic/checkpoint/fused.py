"""Linear layers that are stored as one and read as several: their outputs follow each other."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

import torch

from .weights import Piece, TensorInfo


def rows_of(tensors: Mapping[str, TensorInfo], weight: str, outputs: Mapping[str, int]) -> dict[str, Piece]:
    """The parts of a linear layer, of its weight and of whatever lies beside it: biases, scales, zero points.

    Arguments:
        tensors: those of the checkpoint.
        weight: name of the layer's weight, or of its codes, one row for each output.
        outputs: of each part, by the name of its module.

    Returns: nothing where the parts' sizes do not add up; the weight is then one that nobody knows.
    """
    total, module = tensors[weight].shape[0], weight.rpartition(".")[0]
    if sum(outputs.values()) != total or min(outputs.values()) < 1:
        return {}
    pieces: dict[str, Piece] = {}
    for name, info in tensors.items():
        if name.rpartition(".")[0] != module:
            continue
        last, first = name.rpartition(".")[2], 0
        for part, size in outputs.items():
            if last == "weight_shape":  # the codes' sizes before they were packed, as numbers
                piece = Piece(source=name, shape=info.shape, take=partial(_resized, rows=size))
            elif not info.shape or info.shape[0] == 1:  # one for all outputs
                piece = Piece(source=name, shape=info.shape, take=_whole)
            else:
                step = -(-total // info.shape[0])  # outputs that share a row: zero points of four bits, blocks
                rows = slice(first // step, -(-(first + size) // step))
                if first % step:
                    return {}
                piece = Piece(
                    source=name,
                    shape=(len(range(info.shape[0])[rows]), *info.shape[1:]),
                    take=partial(_rows, rows=rows),
                )
            pieces[f"{part}.{last}"] = piece
            first += size
    return pieces


def gate_and_up(tensors: Mapping[str, TensorInfo], module: str) -> dict[str, Piece]:
    """Halves of fused linear layers as ``gate_proj`` and ``up_proj``.

    Arguments:
        module: regular expression of their names, whose first group is what stands in front of the halves' names.
    """
    pieces: dict[str, Piece] = {}
    for name in tensors:
        if match := re.fullmatch(rf"{module}\.(?:weight|weight_packed)", name):
            half = tensors[name].shape[0] // 2
            pieces |= rows_of(tensors, name, {match[1] + part: half for part in ("gate_proj", "up_proj")})
    return pieces


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _rows(tensor: torch.Tensor, rows: slice) -> torch.Tensor:
    return tensor[rows]


def _resized(sizes: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat((torch.tensor([rows], dtype=sizes.dtype), sizes[1:]))
