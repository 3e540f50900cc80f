"""Quantised weights of one linear layer, (O, I), or of stacked experts, (E, O, I): what they hold.

A format says what the numbers mean; how they lie in memory is each backend's own affair. ``dequantize`` is the oracle.
Sizes need not divide: last groups and blocks may be ragged. Shape suffixes as in ``types.py``; G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Self

import torch
import torch.nn.functional as F

GROUPS = (32, 64, 128)  # inputs that can share a scale
FP8_BLOCK = 128
ROW_GROUP = 128  # inputs of a rounded row that share a scale
FP8_MAX = 448.0  # largest finite value of e4m3
_SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class _QuantizedWeight:
    """What all formats share: ``data`` has the outputs in its last dimension but one; ``in_features`` is I."""

    data: torch.Tensor = field(repr=False)

    @property
    def in_features(self) -> int:
        return self.data.shape[-1]

    @property
    def out_features(self) -> int:
        return self.data.shape[-2]

    @property
    def num_experts(self) -> int | None:
        """E, or None for a single linear layer."""
        return self.data.shape[0] if self.data.dim() == 3 else None

    @property
    def shape(self) -> tuple[int, ...]:
        """(O, I) or (E, O, I) of the weight that this stands for."""
        return (*self.data.shape[:-1], self.in_features)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, scales and zero points."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Codes, scales and whatever else there is, by field."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def to(self, device: torch.device | str) -> Self:
        """The same weight on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})  # type: ignore[arg-type]

    def expert(self, number: int) -> Self:
        """One of stacked experts, (O, I).

        Raises:
            ValueError: for a single linear layer.
            IndexError: when there is no such expert.
        """
        if self.num_experts is None:
            raise ValueError(f"a weight of shape {self.shape} holds no experts")
        return replace(self, **{name: tensor[number] for name, tensor in self.tensors().items()})  # type: ignore[arg-type]

    def rows(self, start: int, stop: int) -> Self:
        """Outputs ``start … stop - 1``."""
        return self._select(slice(start, stop))

    def take(self, ids: torch.Tensor) -> Self:
        """Some outputs."""
        return self._select(ids)

    def dequantize(self) -> torch.Tensor:
        """The weight in float32: (O, I) or (E, O, I)."""
        raise NotImplementedError

    def _select(self, outputs: slice | torch.Tensor) -> Self:
        parts = {name: tensor[..., outputs, :] for name, tensor in self.tensors().items()}
        return replace(self, **parts)  # type: ignore[arg-type]

    def _check_data(self, dtype: torch.dtype) -> None:
        if self.data.dim() not in (2, 3) or self.data.dtype != dtype or self.data.shape[-1] == 0:
            raise ValueError(f"codes must be {dtype} with 2 or 3 dimensions and some inputs, not {describe(self.data)}")

    def _check_scale(self, scale: torch.Tensor, shape: tuple[int, ...], name: str = "scales") -> None:
        if scale.dtype not in _SCALE_DTYPES or scale.shape != shape:
            raise ValueError(f"{name} must be floating with shape {shape}, not {describe(scale)}")


@dataclass(frozen=True, kw_only=True)
class Int8Weight(_QuantizedWeight):
    """``weight = data · scale``, one scale per output, or per output and group of inputs (GGUF's Q8_0).

    Arguments:
        data: int8, (O, I) or (E, O, I).
        scale: floating, (O) or (E, O); with a group (…, O, G), G = ⌈I / group⌉.
        group: inputs that share a scale: 32, 64 or 128, the last group may be shorter; None: all of them.

    Raises:
        ValueError: for another dtype, shape or group, naming it.
    """

    scale: torch.Tensor = field(repr=False)
    group: int | None = None

    def __post_init__(self) -> None:
        self._check_data(torch.int8)
        if self.group is None:
            self._check_scale(self.scale, self.data.shape[:-1])
        else:
            check_group("int8", self.group)
            self._check_scale(self.scale, (*self.data.shape[:-1], -(-self.in_features // self.group)))

    def grouped_scale(self) -> torch.Tensor:
        """(…, O, G), G being 1 where there are no groups."""
        return self.scale[..., None] if self.group is None else self.scale

    def _select(self, outputs: slice | torch.Tensor) -> Int8Weight:
        scale = self.scale[..., outputs] if self.group is None else self.scale[..., outputs, :]
        return replace(self, data=self.data[..., outputs, :], scale=scale)

    def dequantize(self) -> torch.Tensor:
        scale = self.grouped_scale().float()
        return self.data.float() * spread(scale, self.group or self.in_features, self.in_features)


@dataclass(frozen=True, kw_only=True)
class Int4Weight(_QuantizedWeight):
    """``weight = (q - zero) · scale``, or ``q · scale + offset``; q in 0 … 15, a scale per output and group of inputs.

    Arguments:
        data: uint8, (…, O, ⌈I / 2⌉): two inputs per byte, the even one in the low nibble.
        scale: floating, (…, O, G) with G = ⌈I / group⌉.
        inputs: I.
        group: inputs that share a scale: 32, 64 or 128; the last group may be shorter.
        zero: uint8 0 … 15, shaped as the scales; None (symmetric) means 8.
        offset: floating, shaped as the scales: takes the place of the zero points where they are no whole numbers
            (GGUF's Q4_1).

    Raises:
        ValueError: for another dtype or shape, or both zero and offset, naming it.
    """

    scale: torch.Tensor = field(repr=False)
    inputs: int
    group: int
    zero: torch.Tensor | None = field(default=None, repr=False)
    offset: torch.Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._check_data(torch.uint8)
        check_group("int4", self.group)
        if self.data.shape[-1] != -(-self.inputs // 2):
            raise ValueError(f"{self.inputs} inputs take {-(-self.inputs // 2)} bytes a row, not {self.data.shape[-1]}")
        shape = (*self.data.shape[:-1], -(-self.inputs // self.group))
        self._check_scale(self.scale, shape)
        if self.zero is not None and self.offset is not None:
            raise ValueError("a weight has zero points or offsets, not both")
        if self.offset is not None:
            self._check_scale(self.offset, shape, "offsets")
        if self.zero is not None:
            if self.zero.dtype != torch.uint8 or self.zero.shape != shape:
                raise ValueError(f"zero points must be uint8 with shape {shape}, not {describe(self.zero)}")
            if self.zero.numel() and (largest := int(self.zero.max())) > 15:
                raise ValueError(f"zero points must be 0 … 15, not {largest}")

    @property
    def in_features(self) -> int:
        return self.inputs

    @property
    def symmetric(self) -> bool:
        return self.zero is None and self.offset is None

    def codes(self) -> torch.Tensor:
        """q as uint8, (…, O, I)."""
        return unpack_int4(self.data)[..., : self.inputs]

    def offsets(self) -> torch.Tensor:
        """float32, shaped as the scales: what is added to ``q · scale``."""
        if self.offset is not None:
            return self.offset.float()
        zero = 8.0 if self.zero is None else self.zero.float()
        return -zero * self.scale.float()

    def dequantize(self) -> torch.Tensor:
        q = self.codes().float()
        scale = spread(self.scale.float(), self.group, self.inputs)
        if self.offset is not None:
            return q * scale + spread(self.offset.float(), self.group, self.inputs)
        zero = 8.0 if self.zero is None else spread(self.zero.float(), self.group, self.inputs)
        return (q - zero) * scale


@dataclass(frozen=True, kw_only=True)
class Fp8Weight(_QuantizedWeight):
    """``weight = data · scale`` with 8-bit floats (e4m3).

    Arguments:
        data: float8_e4m3fn, (O, I) or (E, O, I).
        scale: float32, (…, ⌈O / block_out⌉, ⌈I / block_in⌉): one scale per block.
        block_out: outputs that share a scale, 1 or 128.
        block_in: inputs that share a scale, 128, or None: all of them.

    Raises:
        ValueError: for another dtype, shape or block, naming it.
    """

    scale: torch.Tensor = field(repr=False)
    block_out: int = 1
    block_in: int | None = None

    def __post_init__(self) -> None:
        self._check_data(torch.float8_e4m3fn)
        if self.block_out not in (1, FP8_BLOCK) or self.block_in not in (None, FP8_BLOCK):
            raise ValueError(
                f"fp8 blocks are 1 or {FP8_BLOCK} outputs by {FP8_BLOCK} or all inputs,"
                f" not {self.block_out} by {self.block_in}"
            )
        shape = (*self.data.shape[:-2], -(-self.out_features // self.block_out), self.num_groups)
        self._check_scale(self.scale, shape)

    @property
    def num_groups(self) -> int:
        """Groups of inputs, G."""
        return 1 if self.block_in is None else -(-self.in_features // self.block_in)

    def per_output(self) -> Fp8Weight:
        """The same weight with a scale for every output and group of inputs."""
        if self.block_out == 1:
            return self
        scale = self.scale.repeat_interleave(self.block_out, -2)[..., : self.out_features, :].contiguous()
        return replace(self, scale=scale, block_out=1)

    def _select(self, outputs: slice | torch.Tensor) -> Fp8Weight:
        """With a scale of their own for each output."""
        own = self.per_output()
        return replace(own, data=own.data[..., outputs, :], scale=own.scale[..., outputs, :])

    def dequantize(self) -> torch.Tensor:
        own = self.per_output()
        scale = spread(own.scale.float(), own.block_in or own.in_features, own.in_features)
        return own.data.float() * scale


QuantizedWeight = Int8Weight | Int4Weight | Fp8Weight


@dataclass(frozen=True)
class ActivationScheme:
    """How a product's input is quantised as it comes, row by row: a row's codes never depend on other rows.

    Arguments:
        kind: ``none``, ``int8`` or ``fp8``.
        group: inputs of a row that share a scale: 128, with int4 weights those that share a scale there; None for
            ``none``.

    Raises:
        ValueError: for a kind or group that there is not.
    """

    kind: str = "none"
    group: int | None = None

    def __post_init__(self) -> None:
        groups = {"none": (None,), "int8": GROUPS, "fp8": (ROW_GROUP,)}
        if self.group not in groups.get(self.kind, ()):
            raise ValueError(
                f"activations are none, int8 per {', '.join(map(str, GROUPS))} inputs or fp8 per {ROW_GROUP},"
                f" not {self.kind!r} by {self.group}"
            )

    def check(self, weight: QuantizedWeight) -> None:
        """Raises ValueError when rows that are rounded like this do not meet weights of this format."""
        if self.kind == "none":
            return
        wanted = (Int8Weight, Int4Weight) if self.kind == "int8" else (Fp8Weight,)
        if not isinstance(weight, wanted):
            names = " and ".join(kind.__name__ for kind in wanted)
            raise ValueError(f"{self.kind} activations go with {names}, not with {type(weight).__name__}")
        if isinstance(weight, Int8Weight) and weight.group is not None:
            raise ValueError(f"{self.kind} activations go with one scale per output, not with groups of {weight.group}")
        if self.group != (group := weight.group if isinstance(weight, Int4Weight) else ROW_GROUP):
            raise ValueError(
                f"{self.kind} activations of {type(weight).__name__} share scales by {group}, not by {self.group}"
            )


UNQUANTIZED = ActivationScheme()
INT8_PER_GROUP = ActivationScheme("int8", ROW_GROUP)
FP8_PER_GROUP = ActivationScheme("fp8", ROW_GROUP)


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0 … 15 as uint8, (…, I), two to a byte, the even input in the low nibble: (…, ⌈I / 2⌉)."""
    even = F.pad(codes, (0, codes.shape[-1] % 2))
    return even[..., 0::2] | (even[..., 1::2] << 4)


def unpack_int4(data: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`pack_int4`: bytes (…, X) as codes (…, 2 X)."""
    return torch.stack((data & 15, data >> 4), -1).flatten(-2)


def check_group(what: str, group: int) -> None:
    """Raises ValueError for a number of inputs that cannot share a scale."""
    if group not in GROUPS:
        raise ValueError(f"{what} groups have {', '.join(map(str, GROUPS))} inputs, not {group}")


def spread(values: torch.Tensor, group: int, inputs: int) -> torch.Tensor:
    """Values per group repeated for each input: (…, G) → (…, I)."""
    return values.repeat_interleave(group, -1)[..., :inputs]


def describe(t: torch.Tensor) -> str:
    """For messages."""
    return f"{t.dtype} of shape {tuple(t.shape)}"
