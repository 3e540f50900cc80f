"""How llama.cpp's converters lay out what Hugging Face calls otherwise: fused, cut, reordered, in other numbers.

A rule says which parts a tensor of the file has. Rows and inputs are moved as the blocks that they are, so that codes
stay as they are; only where heads do not begin at blocks, or numbers change, does a part become float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..checkpoint.gguf_blocks import block_sizes, dequantized
from ..checkpoint.gguf_file import GgufFile, GgufTensor
from ..checkpoint.weights import CheckpointError

PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some rows of a tensor under one of Hugging Face's names.

    Arguments:
        name: of the whole, or below a layer's prefix.
        shape: of the part.
        rows: which ones, in their order; None: all. Of a tensor with one dimension its elements are its rows.
        heads, width: in which order heads of so many inputs are; None: as in the file.
        change: of its numbers, which are float32 then.
    """

    name: str
    shape: tuple[int, ...]
    rows: slice | torch.Tensor | None = field(default=None, compare=False)
    heads: torch.Tensor | None = field(default=None, compare=False)
    width: int = 0
    change: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part and the tensor that it is of."""

    tensor: GgufTensor
    part: Part

    @property
    def shape(self) -> tuple[int, ...]:
        return self.part.shape

    @property
    def is_widened(self) -> bool:
        """Whether it cannot stay as it is in the file."""
        block, _ = block_sizes().get(self.tensor.kind, (1, 0))
        return self.part.change is not None or (self.part.heads is not None and bool(self.part.width % block))

    def rows(self, file: GgufFile) -> torch.Tensor:
        """Its bytes, (rows, bytes per row)."""
        raw, part = self._raw(file), self.part
        if part.heads is not None:
            assert not self.is_widened
            raw = raw.view(len(raw), len(part.heads), -1)[:, part.heads].flatten(1)
        return raw

    def numbers(self, file: GgufFile) -> torch.Tensor:
        """In float32, in the shape of the part."""
        raw, kind, part = self._raw(file), self.tensor.kind, self.part
        if kind in PLAIN:
            weight_OI = raw.flatten().clone().view(PLAIN[kind]).float().view(len(raw), -1)
        else:
            weight_OI = dequantized(raw, kind, (len(raw), part.shape[-1]))
        if part.heads is not None:
            weight_OI = weight_OI.view(len(raw), len(part.heads), -1)[:, part.heads].flatten(1)
        weight = weight_OI.view(part.shape)
        return weight if part.change is None else part.change(weight)

    def _raw(self, file: GgufFile) -> torch.Tensor:
        raw = file.raw(self.tensor)
        raw = raw.view(self.tensor.shape[0], -1) if len(self.tensor.shape) == 1 else raw
        return raw if self.part.rows is None else raw[self.part.rows]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Makes parts of a tensor of a block.

    Arguments:
        names: what the parts are called, below a layer's prefix.
        make: from the tensor and the model's configuration to the parts.
    """

    names: tuple[str, ...]
    make: Callable[[GgufTensor, Config], list[Part]]


def shape_error(tensor: GgufTensor, expected: str) -> CheckpointError:
    return CheckpointError(f"{tensor.file}: tensor {tensor.name!r} has shape {tensor.shape}; it must have {expected}")


def cut(tensor: GgufTensor, sizes: Mapping[str, int]) -> list[Part]:
    """Parts whose rows follow each other, by name."""
    if len(tensor.shape) not in (1, 2) or min(sizes.values()) < 1 or sum(sizes.values()) != tensor.shape[0]:
        rows = " + ".join(map(str, sizes.values()))
        raise shape_error(tensor, f"one or two dimensions and {rows} rows")
    parts, first = [], 0
    for name, size in sizes.items():
        parts.append(Part(name=name, shape=(size, *tensor.shape[1:]), rows=slice(first, first + size)))
        first += size
    return parts


def fused(sizes: Callable[[Config, int], Mapping[str, int]], *names: str) -> Rule:
    """Linear layers one below the other.

    Arguments:
        sizes: rows of each, by name, from the configuration and the rows of all.
    """
    return Rule(names=names, make=lambda tensor, config: cut(tensor, sizes(config, tensor.shape[0])))


def _qkv_sizes(config: Config, rows: int) -> dict[str, int]:
    heads, kv_heads, width = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    return {name: count * width for name, count in zip(_QKV, (heads, kv_heads, kv_heads), strict=True)}


_QKV = tuple(f"self_attn.{part}_proj" for part in "qkv")
_GATE_UP = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
# Of any architecture: converters may put them together.
FUSED_QKV = {
    f"attn_qkv.{kind}": fused(
        lambda config, rows, kind=kind: {f"{n}.{kind}": size for n, size in _qkv_sizes(config, rows).items()},
        *(f"{name}.{kind}" for name in _QKV),
    )
    for kind in ("weight", "bias")
}
# Phi-3 and GLM-4 have gates in front of ups, in the tensor of the ups.
FUSED_GATE_UP = {"ffn_up.weight": fused(lambda config, rows: dict.fromkeys(_GATE_UP, rows // 2), *_GATE_UP)}


def reshaped(name: str, shape: Callable[[GgufTensor], tuple[int, ...]]) -> Rule:
    """The same numbers in another shape."""

    def make(tensor: GgufTensor, config: Config) -> list[Part]:
        wanted = shape(tensor)
        if math.prod(wanted) != math.prod(tensor.shape):
            raise shape_error(tensor, "other dimensions")
        return [Part(name=name, shape=wanted)]

    return Rule(names=(name,), make=make)


def same(name: str) -> Rule:
    return reshaped(name, lambda tensor: tensor.shape)


def flat(name: str) -> Rule:
    """A vector that the file has as a matrix."""
    return reshaped(name, lambda tensor: (math.prod(tensor.shape),))


def taps(name: str) -> Rule:
    """Of a convolution, (channels, taps): each channel sees itself alone."""
    return reshaped(name, lambda tensor: (tensor.shape[0], 1, math.prod(tensor.shape[1:])))


def decay(name: str, shape: Callable[[GgufTensor], tuple[int, ...]] | None = None) -> Rule:
    """Files have ``-exp(A_log)``; a vector unless there is a shape."""
    rule = flat(name) if shape is None else reshaped(name, shape)

    def make(tensor: GgufTensor, config: Config) -> list[Part]:
        return [replace(part, change=lambda x: _log_of_decay(tensor, x)) for part in rule.make(tensor, config)]

    return Rule(names=(name,), make=make)


def _log_of_decay(tensor: GgufTensor, decay_H: torch.Tensor) -> torch.Tensor:
    if not bool((decay_H < 0).all()):
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name!r} must hold negative numbers")
    return (-decay_H.double()).log().float()


def less(offset: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a norm's weight is to a family that adds an offset to it."""
    return lambda weight_D: weight_D - offset
