"""Rounding to 8 bits: device functions, and the kernel that rounds the rows in front of a product."""

# pyright: reportArgumentType=false
from __future__ import annotations

from dataclasses import dataclass

import torch

import triton
import triton.language as tl

from ..api.formats import ActivationScheme
from .launch import Launch, cdiv

_GROUPS = 8  # that a program rounds


@triton.jit
def all_finite(x, AXIS: tl.constexpr):
    """Whether no number along an axis is NaN or infinite."""
    return tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), axis=AXIS) == 0


@triton.jit
def int8_codes(x, inverse, usable):
    """``x · inverse`` to the nearest integer in ± 127, ties to even; 0 where it is not usable."""
    scaled = tl.minimum(tl.maximum(tl.where(usable, x, 0.0) * inverse, -127.0), 127.0)
    # Adding 1.5 · 2²³ rounds to an integer, which no function of all targets does.
    return ((scaled + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def fp8_bits(x):
    """float32 as the bits of the nearest e4m3 value within ± 448, ties to even, uint8; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(tl.where(x == x, tl.abs(x), 0.0), 448.0)
    size_bits = size.to(tl.int32, bitcast=True)
    normal = ((size_bits + 0x7FFFF + ((size_bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2⁻⁶ values are multiples of 2⁻⁹; adding 1.5 · 2²³ rounds to an integer.
    small = ((size * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(x != x, 127, code)
    return (code | ((bits >> 24) & 128)).to(tl.uint8)


@triton.jit
def round_rows_kernel(
    x_ptr, codes_ptr, scales_ptr, k_size, stride_x, KIND: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """Some groups of one row as codes and scales; see :func:`quant_reference.round_rows`."""
    row = tl.program_id(0).to(tl.int64)
    group_G = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    k_GK = group_G[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside_GK = k_GK < k_size
    x_GK = tl.load(x_ptr + row * stride_x + k_GK, mask=inside_GK, other=0.0).to(tl.float32)
    finite_G = all_finite(x_GK, 1)
    largest_G = tl.max(tl.abs(x_GK), axis=1)
    if KIND == "int8":
        scale_G = tl.div_rn(largest_G, 127.0)
        usable_G = finite_G & (scale_G > 0)
        inverse_G = tl.where(usable_G, tl.div_rn(1.0, tl.where(usable_G, scale_G, 1.0)), 0.0)
        codes_GK = int8_codes(x_GK, inverse_G[:, None], finite_G[:, None])
    else:
        scale_G = tl.where(finite_G & (largest_G > 0), tl.div_rn(largest_G, 448.0), 1.0)
        codes_GK = fp8_bits(tl.div_rn(x_GK, tl.broadcast_to(scale_G[:, None], (GROUPS, GROUP))))
    groups = tl.cdiv(k_size, GROUP)
    tl.store(codes_ptr + row * k_size + k_GK, codes_GK, mask=inside_GK)
    tl.store(scales_ptr + row * groups + group_G, tl.where(finite_G, scale_G, float("nan")), mask=group_G < groups)


@dataclass(frozen=True)
class RoundedRows:
    """Rows of a product as 8-bit codes (int8, or the bits of e4m3 in uint8), (T, K), and float32 scales, (T, G)."""

    codes: torch.Tensor
    scales: torch.Tensor
    kind: str
    group: int


def plan_rows(x_TK: torch.Tensor, scheme: ActivationScheme) -> tuple[torch.Tensor | RoundedRows, list[Launch]]:
    """Rows as a product takes them, and what has to run before it. The elements of a row must be contiguous."""
    if scheme.kind == "none":
        return x_TK, []
    assert scheme.group is not None
    rows, width = x_TK.shape
    groups = cdiv(width, scheme.group)
    rounded = RoundedRows(
        codes=x_TK.new_empty(rows, width, dtype=torch.int8 if scheme.kind == "int8" else torch.uint8),
        scales=x_TK.new_empty(rows, groups, dtype=torch.float32),
        kind=scheme.kind,
        group=scheme.group,
    )
    launch = Launch(
        kernel=round_rows_kernel,
        grid=(rows, cdiv(groups, _GROUPS)),
        args={
            "x_ptr": x_TK,
            "codes_ptr": rounded.codes,
            "scales_ptr": rounded.scales,
            "k_size": width,
            "stride_x": x_TK.stride(0),
        },
        constexprs={"KIND": scheme.kind, "GROUP": scheme.group, "GROUPS": _GROUPS},
    )
    return rounded, [launch]
