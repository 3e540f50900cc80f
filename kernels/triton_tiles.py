"""Device functions that the expert kernels share: the weight-tile loader, the activation, the order of tiles.

The loader is the only place that knows how weights are stored. A format that dequantises (int8, int4, fp8) adds a
branch here and changes nothing around it.
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
def gated_activation(gate, up, ACTIVATION: tl.constexpr):
    """``act(gate) * up`` in float32. See :func:`reference.activate`."""
    if ACTIVATION == "silu":
        return gate / (1.0 + tl.exp(-gate)) * up
    elif ACTIVATION == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
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
