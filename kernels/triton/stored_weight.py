"""Quantised weights as kernels read them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from triton.tools.tensor_descriptor import TensorDescriptor

from ..api.quantized_weight import QuantizedWeight
from .grouped_gemm import TileConfig
from .variants import NoKernelError

BITS = {"int4": 4, "mxfp4": 4, "int5": 5, "int6": 6}  # of a code; of all others 8
_ALIGNED = 16  # bytes between rows that tensor descriptors address


class WeightKind(NamedTuple):
    """How a quantised weight is kept: all of it that decides what a kernel does with it.

    Arguments:
        format: as the kernel calls it.
        group: inputs that share a scale; 0: all.
        outer_group: inputs that share an outer scale; 0: there are none.
        offsets: whether groups have some.
    """

    format: str
    group: int
    outer_group: int = 0
    offsets: bool = False

    @property
    def bits(self) -> int:
        """Of a code."""
        return BITS.get(self.format, 8)

    @property
    def bytes(self) -> float:
        """Of a weight, with its share of the scales and offsets."""
        own, outer = 1 if self.outer_group or self.format == "mxfp4" else 4, 2
        scales = own / self.group if self.group else 0.0
        scales += outer / self.outer_group if self.outer_group else 0.0
        return self.bits / 8 + scales * (2 if self.offsets else 1)

    def tma(self, inputs: int) -> bool:
        """Whether tensor descriptors can address the codes: bytes, or halves of them."""
        return self.bits in (4, 8) and inputs * self.bits % (8 * _ALIGNED) == 0


@dataclass(frozen=True)
class StoredWeight:
    """A quantised weight as the kernel reads it, all contiguous: uint8 codes; scales and offsets in float32, powers of
    two as their exponents, or in two levels as they are, the outer ones for ``outer_group`` inputs each."""

    format: str
    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None
    group: int
    outputs: int
    inputs: int
    outer_scales: torch.Tensor | None = None
    outer_offsets: torch.Tensor | None = None
    outer_group: int = 0

    @property
    def kind(self) -> WeightKind:
        return WeightKind(self.format, self.group, self.outer_group, self.offsets is not None)

    def operand(self, config: TileConfig, tma: bool) -> torch.Tensor | TensorDescriptor:
        """The codes as a kernel takes them."""
        if not tma:
            return self.codes
        codes = self.codes if self.codes.dim() == 3 else self.codes[None]
        return TensorDescriptor.from_tensor(codes, [1, config.block_n, config.block_k * self.kind.bits // 8])


def kernel_form(weight: QuantizedWeight) -> QuantizedWeight:
    """A weight whose scales and offsets are what the kernel reads, so that no launch has to convert them: contiguous
    float32, powers of two or two levels, offsets in place of zero points, a scale for every output. Formats without a
    kernel stay as they are."""
    if weight.format.triton is None:
        return weight
    if weight.outer_scale is not None or weight.scale.dtype == torch.float8_e8m0fnu:
        return replace(weight, **{name: tensor.contiguous() for name, tensor in weight.tensors().items()})
    return QuantizedWeight(
        format=replace(weight.format, offsets=True) if weight.needs_offsets else weight.format,
        data=weight.data.contiguous(),
        scale=weight.scales().contiguous(),
        inputs=weight.inputs,
        group=weight.group,
        offset=weight.offsets().contiguous() if weight.needs_offsets else None,
    )


def store_weight(weight: QuantizedWeight) -> StoredWeight:
    """The kernel's view of a weight in :func:`kernel_form`; nothing is copied.

    Raises:
        NoKernelError: for a format without a kernel.
    """
    name = weight.format.triton
    if name is None:
        raise NoKernelError(f"{weight.format.name} weights")
    assert all(t.is_contiguous() for t in weight.tensors().values())
    exponents = weight.scale.dtype == torch.float8_e8m0fnu
    assert weight.scale.dtype == torch.float32 or exponents or weight.outer_scale is not None
    scale = weight.scale.view(torch.uint8) if exponents else weight.scale
    codes, shape = weight.data.view(torch.uint8), (weight.out_features, weight.in_features)
    outer = (weight.outer_scale, weight.outer_offset, weight.format.outer_group or 0)
    return StoredWeight(name, codes, scale, weight.offset, weight.group or 0, *shape, *outer)
