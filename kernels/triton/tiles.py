"""Device functions that the expert kernels share: the weight-tile loader, the activation, the order of tiles.

The loaders are the only place that knows how weights are stored, as they are or quantised.
"""

# pyright: reportArgumentType=false
from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

_INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    """``acc + a @ b`` with float32 sums, never through tf32."""
    if _INTERPRETED:
        # The interpreter keeps bfloat16 as bit patterns and would multiply those.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_weight_tile(
    weights, expert, n0, k0, n_size, k_size, stride_e, stride_n,
    TMA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    EVICT: tl.constexpr,
):  # fmt: skip
    """Tile (BLOCK_N, BLOCK_K) of one expert's (N, K) matrix, zero beyond its edges.

    Arguments:
        weights: with TMA a tensor descriptor over (E, N, K), else a pointer; K is contiguous.
        EVICT: L2 policy of the pointer loads.
    """
    if TMA:
        tile = weights.load([expert, n0, k0]).reshape(BLOCK_N, BLOCK_K)
    else:
        n = n0 + tl.arange(0, BLOCK_N)
        k = k0 + tl.arange(0, BLOCK_K)
        at = weights + expert.to(tl.int64) * stride_e + n[:, None] * stride_n + k[None, :]
        if EVEN_N and EVEN_K:
            tile = tl.load(at, eviction_policy=EVICT)
        elif EVEN_K:
            tile = tl.load(at, mask=(n < n_size)[:, None], other=0.0, eviction_policy=EVICT)
        else:
            tile = tl.load(at, mask=(n < n_size)[:, None] & (k < k_size)[None, :], other=0.0, eviction_policy=EVICT)
    return tile


@triton.jit
def fp8_to_float16(codes):
    """What e4m3 values stand for, given as their bits, uint8: the same bits, but for an exponent that is 8 less."""
    bits = codes.to(tl.int16)
    value = (((bits & 127) << 7) | ((bits & 128) << 8)).to(tl.float16, bitcast=True) * 256.0
    return tl.where((bits & 127) == 127, float("nan"), value)


@triton.jit
def fp4_to_float16(codes):
    """What e2m1 values stand for, given as their bits, int8: the same bits, but for an exponent that is 14 less."""
    bits = codes.to(tl.int16)
    return (((bits & 7) << 9) | ((bits & 8) << 12)).to(tl.float16, bitcast=True) * 16384.0


@triton.jit
def load_quant_tile(
    codes, expert, n0, k0, n_size, k_size, ZERO: tl.constexpr, FORMAT: tl.constexpr, TMA: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile (BLOCK_N, BLOCK_K) of one expert's quantised (N, K) matrix before scaling. Beyond its edges is something
    finite: rows that it meets are zero beyond K, and results beyond N are not stored.

    Returns: int8 for integers, the bits for fp8 and mxfp4: what stands for the weights exactly.

    Arguments:
        codes: uint8, (E, N, K), or (E, N, ⌈K · bits / 8⌉) of codes of 4, 5 and 6 bits, contiguous, with TMA a tensor
            descriptor over them; 8-bit floats come as their bits, because not every target that can run them has the
            type.
        ZERO: what such a code of few bits is taken down by.
    """
    n = n0 + tl.arange(0, BLOCK_N)
    k = k0 + tl.arange(0, BLOCK_K)
    row = expert.to(tl.int64) * n_size + n
    inside = (n < n_size)[:, None] & (k < k_size)[None, :]
    if FORMAT == "int4" or FORMAT == "mxfp4":
        if TMA:
            packed = codes.load([expert, n0, k0 // 2]).reshape(BLOCK_N, BLOCK_K // 2)
        else:
            byte = k0 // 2 + tl.arange(0, BLOCK_K // 2)
            width = (k_size + 1) // 2
            packed_at = codes + row[:, None] * width + byte[None, :]
            packed = tl.load(packed_at, mask=(n < n_size)[:, None] & (byte < width)[None, :], other=0)
        value = tl.interleave(packed & 15, packed >> 4).to(tl.int8) - (ZERO if FORMAT == "int4" else 0)
    elif FORMAT == "int5" or FORMAT == "int6":
        BITS: tl.constexpr = 5 if FORMAT == "int5" else 6  # type: ignore[assignment]
        width = (k_size * BITS + 7) // 8
        byte, shift = k * BITS // 8, k * BITS % 8
        low_at = codes + row[:, None] * width + byte[None, :]
        low = tl.load(low_at, mask=inside, other=0).to(tl.int16)
        high = tl.load(low_at + 1, mask=inside & (shift + BITS > 8)[None, :], other=0).to(tl.int16)
        both = (low | (high << 8)) >> shift.to(tl.int16)[None, :]
        value = (both & ((1 << BITS) - 1)).to(tl.int8) - ZERO  # type: ignore[operator]
    else:
        if TMA:
            q = codes.load([expert, n0, k0]).reshape(BLOCK_N, BLOCK_K)
        else:
            q = tl.load(codes + row[:, None] * k_size + k[None, :], mask=inside, other=0)
        value = q if FORMAT == "fp8" else q.to(tl.int8, bitcast=True)
    return value


@triton.jit
def load_quant_scales(
    scales, outer, expert, n0, k0, n_size, k_size,
    GROUP: tl.constexpr, OUTER_GROUP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the outputs of a tile are scaled by, (BLOCK_N,), float32.

    Arguments:
        scales: (E, N, G), with one level uint8 for powers of two; GROUP: inputs per scale; 0: all.
        outer: what those are multiplied with, one for OUTER_GROUP inputs; None: 1.
    """
    n = n0 + tl.arange(0, BLOCK_N)
    row = expert.to(tl.int64) * n_size + n
    at = row if GROUP == 0 else row * tl.cdiv(k_size, GROUP) + k0 // GROUP
    value = tl.load(scales + at, mask=n < n_size, other=0)
    if outer is None and scales.dtype.element_ty == tl.uint8:
        # Exponents of powers of two; that of the first is below those of normal numbers.
        exponent = value.to(tl.int32)
        return tl.where(exponent == 0, 1 << 22, exponent << 23).to(tl.float32, bitcast=True)
    value = value.to(tl.float32)
    if outer is not None:
        outer_at = outer + row * tl.cdiv(k_size, OUTER_GROUP) + k0 // OUTER_GROUP
        value *= tl.load(outer_at, mask=n < n_size, other=0.0).to(tl.float32)
    return value


@triton.jit
def gated_activation(gate, up, ACTIVATION: tl.constexpr):
    """``act(gate) * up`` in float32. See :func:`reference.activate`."""
    if ACTIVATION == "silu":
        return gate / (1.0 + tl.exp(-gate)) * up
    elif ACTIVATION == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif ACTIVATION == "clamped_swiglu":
        bounded, other = tl.minimum(gate, 7.0), tl.clamp(up, -7.0, 7.0)
        return bounded / (1.0 + tl.exp(-1.702 * bounded)) * (other + 1.0)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate / (1.0 + tl.exp(-2.0 * inner)) * up


@triton.jit
def tile_coordinates(tile, row_tiles, column_tiles, GROUP_M: tl.constexpr):
    """Position of the tile-th program: GROUP_M row tiles share a pass over the columns, so that weights stay in L2."""
    per_group = GROUP_M * column_tiles
    first_row = (tile // per_group) * GROUP_M
    rows = tl.minimum(row_tiles - first_row, GROUP_M)
    inside = tile % per_group
    return first_row + inside % rows, inside // rows
