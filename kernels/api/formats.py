"""Formats of quantised weights, one descriptor each; and how the inputs of a product are rounded.

A format says what the numbers mean and which kernels read them; how they lie in memory is each backend's own affair.
A new format is a :class:`Format`, and kernels where it shall be fast: without them its weights are dequantised.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .codes import Codes

GROUPS = (32, 64, 128)  # inputs that can share a scale
FP8_BLOCK = 128
ROW_GROUP = 128  # inputs of a rounded row that share a scale
FP8_MAX = 448.0  # largest finite value of e4m3
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True, repr=False)
class Format:
    """``weight = number · scale``, ``(number - zero) · scale`` or ``number · scale + offset``.

    Scales, zero points and offsets belong to a group of an output's inputs. In two levels a scale is the product of a
    group's, in few bits, and of one for several groups; offsets likewise (GGUF's K-quants, NVFP4).

    Arguments:
        name: in messages.
        codes: what the numbers are made of.
        groups: how many inputs can share a scale; None: all of an output's.
        block_outs: how many outputs can share a scale.
        scales: dtypes that scales and offsets may have. Powers of two are ``torch.float8_e8m0fnu``.
        two_level: whether there are outer scales.
        outer_group: inputs that share one of those; None: all of an output's.
        outer_scales: dtypes that outer scales and offsets may have.
        zero_points: whether weights may have zero points, which are codes.
        offsets: whether weights may have offsets.
        rows: what the inputs of a product may be rounded to: ``int8``, ``fp8``, or nothing.
        grouped_rows: whether rounded rows meet weights whose scales are for groups.
        cpu: the format's number in the C++ kernels (``quant/quant.h``); None: they have none for it.
        triton: what the Triton kernels call it (``tiles.py``); None likewise.
    """

    name: str
    codes: Codes
    groups: tuple[int | None, ...]
    block_outs: tuple[int, ...] = (1,)
    scales: tuple[torch.dtype, ...] = FLOATS
    two_level: bool = False
    outer_group: int | None = None
    outer_scales: tuple[torch.dtype, ...] = FLOATS
    zero_points: bool = False
    offsets: bool = False
    rows: str = ""
    grouped_rows: bool = True
    cpu: int | None = None
    triton: str | None = None

    def __repr__(self) -> str:
        return self.name

    def check_group(self, group: int | None, block_out: int = 1) -> None:
        """Raises ValueError for numbers of inputs and outputs that cannot share a scale."""
        if block_out not in self.block_outs:
            outs = " or ".join(map(str, self.block_outs))
            raise ValueError(f"{self.name} scales are for {outs} outputs, not {block_out} by {group}")
        if group not in self.groups:
            sizes = ", ".join(str(size) for size in self.groups if size is not None)
            raise ValueError(f"{self.name} groups have {sizes} inputs, not {group}")


INT8 = Format(name="int8", codes=Codes(dtype=torch.int8), groups=(None, *GROUPS), rows="int8", grouped_rows=False,
              cpu=0, triton="int8")  # fmt: skip
INT4 = Format(name="int4", codes=Codes(bits=4, zero=8), groups=GROUPS, zero_points=True, offsets=True, rows="int8",
              cpu=1, triton="int4")  # fmt: skip
FP8 = Format(name="fp8", codes=Codes(dtype=torch.float8_e4m3fn), groups=(None, FP8_BLOCK), block_outs=(1, FP8_BLOCK),
             rows="fp8", cpu=2, triton="fp8")  # fmt: skip
# OCP's MXFP4: 4-bit floats (e2m1) and a power of two for 32 inputs.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MXFP4 = Format(name="mxfp4", codes=Codes(bits=4, table=(*_E2M1, *(-value for value in _E2M1))), groups=(32,),
               scales=(torch.float8_e8m0fnu,), cpu=6, triton="mxfp4")  # fmt: skip
# GGUF's K-quants: scales of groups, and offsets where there are any, in few bits; a float16 number for 256 inputs.
Q4_K = Format(name="q4_k", codes=Codes(bits=4), groups=(32,), scales=(torch.uint8,), two_level=True, outer_group=256,
              outer_scales=(torch.float16,), offsets=True, cpu=3, triton="int4")  # fmt: skip
Q5_K = replace(Q4_K, name="q5_k", codes=Codes(bits=5), cpu=4, triton="int5")
Q6_K = replace(Q5_K, name="q6_k", codes=Codes(bits=6, zero=32), groups=(16,), scales=(torch.int8,), offsets=False,
               cpu=5, triton="int6")  # fmt: skip


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

    def check(self, weights: Format, group: int | None) -> None:
        """Raises ValueError when rows that are rounded like this do not meet weights of this format.

        Arguments:
            group: inputs that share a scale in the weights; None: all.
        """
        if self.kind == "none":
            return
        if weights.rows != self.kind:
            raise ValueError(f"{self.kind} activations do not go with {weights.name} weights")
        if group is not None and not weights.grouped_rows:
            raise ValueError(
                f"{self.kind} activations go with one scale per output of {weights.name} weights,"
                f" not with groups of {group}"
            )
        if self.group != (group or ROW_GROUP):
            raise ValueError(
                f"{self.kind} activations of {weights.name} weights share scales by {group or ROW_GROUP},"
                f" not by {self.group}"
            )


UNQUANTIZED = ActivationScheme()
INT8_PER_GROUP = ActivationScheme("int8", ROW_GROUP)
FP8_PER_GROUP = ActivationScheme("fp8", ROW_GROUP)
