"""The two grouped GEMMs of a mixture of experts, without padding copies.

GEMM 1 gathers its rows through the index table, multiplies them with the gate and the up matrix of their expert in one
pass and applies the activation in its epilogue; its output is in expert order. GEMM 2 reads that in order, applies the
router weight and writes each row to its slot. One kernel serves decode and prefill: a grid as large as the number of
tiles runs every tile in a program of its own, a smaller grid makes the programs persistent.

With few rows per tile the operands swap places (weights as the left operand), because a tensor core instruction wants
64 or more rows on its left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .index import ExpertIndex
from .launch import Launch, cdiv
from .tiles import dot, gated_activation, load_weight_tile, tile_coordinates


@dataclass(frozen=True, kw_only=True)
class TileConfig:
    """Tiling of a product.

    Arguments:
        block_m, block_n, block_k: rows, outputs and depth of a tile.
        swap: weights are the left operand.
        tma: weights, and rows that are not gathered, come through tensor descriptors.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool = False
    tma: bool = False


@dataclass(frozen=True, kw_only=True)
class GemmConfig(TileConfig):
    """Tiling of one grouped GEMM.

    Arguments:
        programs: size of the grid; 0 gives every tile its own program.
        group_m: row tiles that share a pass over the columns.
    """

    programs: int = 0
    group_m: int = 8


@triton.jit
def gate_up_kernel(
    x_ptr, gate, up, gate_bias_ptr, up_bias_ptr, weights_ptr, h_ptr,
    sorted_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr, num_tiles_ptr,
    hidden_size, expert_size, stride_x, gate_stride_e, gate_stride_n, up_stride_e, up_stride_n,
    K: tl.constexpr, ACTIVATION: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """GEMM 1: ``h[i] = act(gate_e x) * (up_e x)`` for the i-th slot in expert order."""
    row_tiles = tl.load(num_tiles_ptr)
    column_tiles = tl.cdiv(expert_size, BLOCK_N)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = tile_coordinates(tile, row_tiles, column_tiles, GROUP_M)  # pyright: ignore[reportGeneralTypeIssues]
        expert = tl.load(tile_expert_ptr + row_tile)
        first = tl.load(tile_row_ptr + row_tile)
        last = tl.load(starts_ptr + expert + 1)
        i_M = first + tl.arange(0, BLOCK_M)
        ok_M = i_M < last
        slot_M = tl.load(sorted_ptr + i_M, mask=ok_M, other=0)
        x_at_MK = x_ptr + (slot_M // K).to(tl.int64)[:, None] * stride_x + tl.arange(0, BLOCK_K)[None, :]
        n0 = column_tile * BLOCK_N

        gate_acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)
        up_acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k0 in tl.range(0, hidden_size, BLOCK_K):
            if EVEN_K:
                x_MK = tl.load(x_at_MK + k0, mask=ok_M[:, None], other=0.0)
            else:
                ok_K = k0 + tl.arange(0, BLOCK_K) < hidden_size
                x_MK = tl.load(x_at_MK + k0, mask=ok_M[:, None] & ok_K[None, :], other=0.0)
            gate_NK = load_weight_tile(
                gate, expert, n0, k0, expert_size, hidden_size, gate_stride_e, gate_stride_n,
                TMA, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, EVICT,
            )  # fmt: skip
            up_NK = load_weight_tile(
                up, expert, n0, k0, expert_size, hidden_size, up_stride_e, up_stride_n,
                TMA, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, EVICT,
            )  # fmt: skip
            if SWAP:
                gate_acc = dot(gate_NK, tl.trans(x_MK), gate_acc)
                up_acc = dot(up_NK, tl.trans(x_MK), up_acc)
            else:
                gate_acc = dot(x_MK, tl.trans(gate_NK), gate_acc)
                up_acc = dot(x_MK, tl.trans(up_NK), up_acc)

        n_N = n0 + tl.arange(0, BLOCK_N)
        ok_N = n_N < expert_size
        if SWAP:
            gate_acc, up_acc = tl.trans(gate_acc), tl.trans(up_acc)
        if WEIGHT_ON_INPUT:
            weight_M = tl.load(weights_ptr + slot_M, mask=ok_M, other=0.0)
            gate_acc, up_acc = gate_acc * weight_M[:, None], up_acc * weight_M[:, None]
        if gate_bias_ptr is not None:
            gate_acc += tl.load(gate_bias_ptr + expert * expert_size + n_N, mask=ok_N, other=0.0).to(tl.float32)[
                None, :
            ]
        if up_bias_ptr is not None:
            up_acc += tl.load(up_bias_ptr + expert * expert_size + n_N, mask=ok_N, other=0.0).to(tl.float32)[None, :]
        h_MN = gated_activation(gate_acc, up_acc, ACTIVATION)
        h_at_MN = h_ptr + i_M.to(tl.int64)[:, None] * expert_size + n_N[None, :]
        tl.store(h_at_MN, h_MN.to(h_ptr.dtype.element_ty), mask=ok_M[:, None] & ok_N[None, :])


@triton.jit
def down_kernel(
    h, down, down_bias_ptr, weights_ptr, y_ptr,
    sorted_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr, num_tiles_ptr,
    hidden_size, expert_size, down_stride_e, down_stride_n,
    WEIGHT_ON_INPUT: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """GEMM 2: ``y[slot] = weight[slot] * (down_e h[i] + bias_e)`` for the i-th slot in expert order."""
    row_tiles = tl.load(num_tiles_ptr)
    column_tiles = tl.cdiv(hidden_size, BLOCK_N)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = tile_coordinates(tile, row_tiles, column_tiles, GROUP_M)  # pyright: ignore[reportGeneralTypeIssues]
        expert = tl.load(tile_expert_ptr + row_tile)
        first = tl.load(tile_row_ptr + row_tile)
        last = tl.load(starts_ptr + expert + 1)
        i_M = first + tl.arange(0, BLOCK_M)
        ok_M = i_M < last
        n0 = column_tile * BLOCK_N
        acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k0 in tl.range(0, expert_size, BLOCK_K):
            if TMA:
                # Rows of the next expert come along and are never stored.
                h_MK = h.load([first, k0])
            else:
                k_K = k0 + tl.arange(0, BLOCK_K)
                h_at_MK = h + i_M.to(tl.int64)[:, None] * expert_size + k_K[None, :]
                if EVEN_K:
                    h_MK = tl.load(h_at_MK, mask=ok_M[:, None], other=0.0)
                else:
                    h_MK = tl.load(h_at_MK, mask=ok_M[:, None] & (k_K < expert_size)[None, :], other=0.0)
            down_NK = load_weight_tile(
                down, expert, n0, k0, hidden_size, expert_size, down_stride_e, down_stride_n,
                TMA, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, EVICT,
            )  # fmt: skip
            acc = dot(down_NK, tl.trans(h_MK), acc) if SWAP else dot(h_MK, tl.trans(down_NK), acc)
        if SWAP:
            acc = tl.trans(acc)
        n_N = n0 + tl.arange(0, BLOCK_N)
        ok_N = n_N < hidden_size
        if down_bias_ptr is not None:
            acc += tl.load(down_bias_ptr + expert * hidden_size + n_N, mask=ok_N, other=0.0).to(tl.float32)[None, :]
        slot_M = tl.load(sorted_ptr + i_M, mask=ok_M, other=0)
        if not WEIGHT_ON_INPUT:
            acc *= tl.load(weights_ptr + slot_M, mask=ok_M, other=0.0)[:, None]
        y_at_MN = y_ptr + slot_M.to(tl.int64)[:, None] * hidden_size + n_N[None, :]
        tl.store(y_at_MN, acc.to(y_ptr.dtype.element_ty), mask=ok_M[:, None] & ok_N[None, :])


def describable(tensor: torch.Tensor) -> bool:
    """Whether the copy engine can address a tensor: contiguous rows, everything else in steps of 16 bytes."""
    size = tensor.element_size()
    steps = all(stride * size % 16 == 0 and stride > 0 for stride in tensor.stride()[:-1])
    return tensor.stride(-1) == 1 and steps and tensor.data_ptr() % 16 == 0


def operand(tensor: torch.Tensor, config: GemmConfig, block: list[int]) -> torch.Tensor | TensorDescriptor:
    """A tensor as a kernel takes it that reads ``block`` of it at once."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block) if config.tma else tensor


def grouped_launch(
    kernel: Any, config: GemmConfig, index: ExpertIndex, n_size: int, args: dict[str, Any], constexprs: dict[str, Any]
) -> Launch:
    """Launch of a grouped GEMM with ``n_size`` outputs over the tiles of an index.

    Arguments:
        args, constexprs: what neither the index nor the tiling of rows says.
    """
    assert config.block_m == index.block_m, f"tables have tiles of {index.block_m} rows, not {config.block_m}"
    tiles = index.max_tiles * cdiv(n_size, config.block_n)
    return Launch(
        kernel=kernel,
        grid=(min(tiles, config.programs) if config.programs else tiles,),
        args={**args, **index.arguments},
        constexprs={
            **constexprs,
            "SWAP": config.swap,
            "TMA": config.tma,
            "BLOCK_M": config.block_m,
            "GROUP_M": config.group_m,
            # Few rows per tile means that every weight is read once: nothing is gained by keeping it.
            "EVICT": "evict_first" if config.block_m < 64 else "",
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
