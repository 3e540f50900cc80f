"""Device functions that know how keys and values lie in a cache: loading a tile, storing heads; and their views.

The formats are those of ``kv_codes.py``. Shape suffixes as in ``triton_attention.py``.
"""

# pyright: reportArgumentType=false
from __future__ import annotations

from dataclasses import dataclass

import torch

import triton
import triton.language as tl

from ..api.kv_codes import SCALE_BYTES, codes_and_scales
from ..api.types import KVLayer
from .rounding import all_finite, fp8_bits, int8_codes
from .tiles import fp8_to_float16


@triton.jit
def load_kv_tile(
    pages, at_LC, ok_L, ok_C, dtype: tl.constexpr, FORMAT: tl.constexpr, NATIVE_FP8: tl.constexpr
):  # fmt: skip
    """Heads of some positions, (BLOCK_L, C_PAD), zero where there are none: 8 bits before scaling, exact in ``dtype``.

    Arguments:
        FORMAT: ``int8``, ``fp8`` (as its bits, because not every target that can run it has the type), or "" for
            what is floating, which keeps its own dtype.
        NATIVE_FP8: the target converts e4m3.
    """
    stored_LC = tl.load(pages + at_LC, mask=ok_L[:, None] & ok_C[None, :], other=0)
    if FORMAT == "int8":
        return stored_LC.to(tl.float32).to(dtype)  # the interpreter makes no bfloat16 of integers
    elif FORMAT == "fp8":
        if NATIVE_FP8:
            return stored_LC.to(tl.float8e4nv, bitcast=True).to(dtype)
        else:
            return fp8_to_float16(stored_LC).to(tl.float32).to(dtype)
    else:
        return stored_LC


@triton.jit
def store_heads(pages, scales, at_GC, scale_at_G, a_GC, b_GC, ok_GC, ok_G, HALF: tl.constexpr, FORMAT: tl.constexpr):
    """Heads of one token, given as the two halves of their channels, into their slot, bit by bit as the oracle does.

    Arguments:
        at_GC: elements from ``pages`` to the channels of the first half.
    """
    if FORMAT == "int8":
        a_GC, b_GC = a_GC.to(tl.float32), b_GC.to(tl.float32)
        finite_G = all_finite(a_GC, 1) & all_finite(b_GC, 1)
        largest_G = tl.maximum(tl.max(tl.abs(a_GC), axis=1), tl.max(tl.abs(b_GC), axis=1))
        bits_G = tl.div_rn(largest_G, 127.0).to(tl.int32, bitcast=True)
        scale_G = (((bits_G + 0xFFFF) >> 16) << 16).to(tl.float32, bitcast=True)
        usable_G = finite_G & (scale_G > 0)
        inverse_G = tl.where(usable_G, tl.div_rn(1.0, tl.where(usable_G, scale_G, 1.0)), 0.0)
        scale_G = tl.where(finite_G, scale_G, float("nan"))
        tl.store(scales + scale_at_G, scale_G.to(scales.dtype.element_ty), mask=ok_G)
        tl.store(pages + at_GC, int8_codes(a_GC, inverse_G[:, None], finite_G[:, None]), mask=ok_GC)
        tl.store(pages + at_GC + HALF, int8_codes(b_GC, inverse_G[:, None], finite_G[:, None]), mask=ok_GC)
    elif FORMAT == "fp8":
        tl.store(pages + at_GC, fp8_bits(a_GC.to(tl.float32)), mask=ok_GC)
        tl.store(pages + at_GC + HALF, fp8_bits(b_GC.to(tl.float32)), mask=ok_GC)
    else:
        tl.store(pages + at_GC, a_GC.to(pages.dtype.element_ty), mask=ok_GC)
        tl.store(pages + at_GC + HALF, b_GC.to(pages.dtype.element_ty), mask=ok_GC)


@dataclass(frozen=True)
class StoredKV:
    """Keys and values of a layer as kernels read and write them.

    Arguments:
        keys, values: codes, bits or numbers, (B, G, P, C), channels contiguous.
        key_scales, value_scales: bfloat16, (B, G, P); only of int8.
        format: see :func:`load_kv_tile`.
        rest: what holds further channels of keys, (B, G, P, X); rest_at, scale_at: where in it a token's further
            channels and its scale begin.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None
    value_scales: torch.Tensor | None
    format: str
    rest: torch.Tensor | None = None
    rest_at: int = 0
    scale_at: int = 0

    @property
    def arguments(self) -> dict[str, torch.Tensor | int | None]:
        """What kernels take to find heads and scales."""
        scale_strides = (0, 0, 0) if self.key_scales is None else self.key_scales.stride()
        return {
            "keys_ptr": self.keys,
            "values_ptr": self.values,
            "key_scales_ptr": self.key_scales,
            "value_scales_ptr": self.value_scales,
            **dict(zip(("stride_b", "stride_g", "stride_p"), self.keys.stride()[:3], strict=True)),
            **dict(zip(("scale_b", "scale_g", "scale_p"), scale_strides, strict=True)),
        }


def stored_latents(layer: KVLayer, latent: int) -> StoredKV:
    """Views of a layer's entries, see ``kernels/api/latents.py``.

    Raises:
        ValueError: for codes of an odd number of channels: what is behind them does not begin at whole numbers.
    """
    entries = layer.keys_BGPC
    if not layer.coded:
        return StoredKV(entries, entries, None, None, "", entries, latent)
    if latent % 2:
        raise ValueError(f"latents of {latent} channels have no keys behind their codes at even bytes")
    # All of the views begin where the entries do: that stays aligned.
    halves = entries.view(torch.bfloat16)
    scales = halves[..., 0]
    return StoredKV(entries, entries, scales, scales, "int8", halves, (latent + SCALE_BYTES) // 2, latent // 2)


def stored_kv(layer: KVLayer) -> StoredKV:
    """Views of a layer's pages.

    Raises:
        ValueError: when keys and values are laid out differently.
    """
    keys, values = layer.keys_BGPC, layer.values_BGPC
    if keys.stride() != values.stride():
        strides = f"{keys.stride()} and {values.stride()}"
        raise ValueError(f"keys_BGPC and values_BGPC must be contiguous, or at least laid out alike, not {strides}")
    if layer.coded:
        keys, key_scales = codes_and_scales(keys, layer.scales_behind_page)
        values, value_scales = codes_and_scales(values, layer.scales_behind_page)
        return StoredKV(keys, values, key_scales, value_scales, "int8")
    if keys.dtype == torch.float8_e4m3fn:
        return StoredKV(keys.view(torch.uint8), values.view(torch.uint8), None, None, "fp8")
    return StoredKV(keys, values, None, None, "")
