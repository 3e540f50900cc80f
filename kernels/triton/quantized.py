"""Products with quantised weights on a GPU, for dense layers and for experts alike: one kernel.

Rows as they are meet weights that are widened where they are loaded. Rows that were rounded to 8 bits meet codes: int8
in integer tensor cores with int32 sums, e4m3 in those of its own where there are any, else in float16, which holds it.

Where few tiles would leave a device idle, the depth is split: programs sum parts of it, and a second kernel adds these
in their order, so that results do not depend on timing.

Shape suffixes are explained in ``types.py``; N outputs, K inputs of a product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .grouped_gemm import TileConfig, describable
from .index import ExpertIndex
from .launch import Launch, cdiv
from .rounding import RoundedRows
from .stored_weight import StoredWeight
from .tiles import (
    dot,
    fp4_to_float16,
    fp8_to_float16,
    gated_activation,
    load_quant_scales,
    load_quant_tile,
    tile_coordinates,
)

_TABLES = ("sorted_ptr", "starts_ptr", "tile_expert_ptr", "tile_row_ptr", "num_tiles_ptr")
_GROUP_M = 8
_SUMMED = 64  # outputs of a tile of the kernel that adds parts


@dataclass(frozen=True, kw_only=True)
class QuantConfig(TileConfig):
    """Tiling of a product with quantised weights.

    Arguments:
        tma: codes, and rows in the order that they are read in, come through tensor descriptors where they can.
        splits: parts of the depth, each summed by programs of its own.
    """

    splits: int = 1


@triton.jit
def over_rows(v_M, SWAP: tl.constexpr):
    """What belongs to rows, beside a tile of results."""
    return v_M[None, :] if SWAP else v_M[:, None]


@triton.jit
def over_outputs(v_N, SWAP: tl.constexpr):
    """What belongs to outputs, beside a tile of results."""
    return v_N[:, None] if SWAP else v_N[None, :]


@triton.jit
def product(x_MK, w_NK, acc, SWAP: tl.constexpr):
    """``acc + x · w``, (M, N), or (N, M) with SWAP."""
    return dot(w_NK, tl.trans(x_MK), acc) if SWAP else dot(x_MK, tl.trans(w_NK), acc)


@triton.jit
def multiply_tile(
    x_MK, x_scale_M, acc, codes, scales, offsets, outer_scales, outer_offsets, expert, n0, k0, n_size, k_size,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, OUTER_GROUP: tl.constexpr, ROWS: tl.constexpr, NATIVE_FP8: tl.constexpr,
    SWAP: tl.constexpr, TMA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``acc + x · weights`` for one step along K; scales of whole outputs (GROUP 0) are left to the end.

    Arguments:
        x_scale_M: what the step's share of the rows is scaled by; None for rows as they are (ROWS ``none``).
    """
    middle: tl.constexpr = 8 if FORMAT == "int4" else 16 if FORMAT == "int5" else 32  # pyright: ignore[reportAssignmentType]
    zero: tl.constexpr = middle if offsets is None else 0  # pyright: ignore[reportAssignmentType]
    w_NK = load_quant_tile(codes, expert, n0, k0, n_size, k_size, zero, FORMAT, TMA, BLOCK_N, BLOCK_K)
    if ROWS == "none":
        wide_NK = fp8_to_float16(w_NK) if FORMAT == "fp8" else fp4_to_float16(w_NK) if FORMAT == "mxfp4" else w_NK
        wide_NK = wide_NK.to(tl.float32).to(x_MK.dtype)
        if GROUP == 0:
            return product(x_MK, wide_NK, acc, SWAP)
        step = product(x_MK, wide_NK, tl.zeros_like(acc), SWAP)
        row_M = tl.sum(x_MK.to(tl.float32), 1)
    elif ROWS == "int8":
        if SWAP:
            sums = tl.dot(w_NK, tl.trans(x_MK), out_dtype=tl.int32)
        else:
            sums = tl.dot(x_MK, tl.trans(w_NK), out_dtype=tl.int32)
        step = sums.to(tl.float32) * over_rows(x_scale_M, SWAP)
        row_M = tl.sum(x_MK.to(tl.int32), 1).to(tl.float32) * x_scale_M
    else:
        if NATIVE_FP8:
            a_MK, b_NK = x_MK.to(tl.float8e4nv, bitcast=True), w_NK.to(tl.float8e4nv, bitcast=True)
        else:
            a_MK, b_NK = fp8_to_float16(x_MK), fp8_to_float16(w_NK)
        step = product(a_MK, b_NK, tl.zeros_like(acc), SWAP) * over_rows(x_scale_M, SWAP)
        row_M = x_scale_M
    if GROUP == 0:
        return acc + step
    tl.static_assert(GROUP % BLOCK_K == 0)
    scale_N = load_quant_scales(scales, outer_scales, expert, n0, k0, n_size, k_size, GROUP, OUTER_GROUP, BLOCK_N)
    acc += step * over_outputs(scale_N, SWAP)
    if offsets is not None:
        offset_N = load_quant_scales(
            offsets, outer_offsets, expert, n0, k0, n_size, k_size, GROUP, OUTER_GROUP, BLOCK_N
        )
        acc += over_rows(row_M, SWAP) * over_outputs(offset_N, SWAP)
    return acc


@triton.jit
def rows_of_tile(
    row_tile, num_rows, sorted_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr, num_tiles_ptr, BLOCK_M: tl.constexpr
):
    """Expert and first row of a tile, then of each row: its number, whether there is one, its slot."""
    if num_tiles_ptr is None:
        expert = row_tile * 0
        first = row_tile * BLOCK_M
        last = num_rows
    else:
        expert = tl.load(tile_expert_ptr + row_tile)
        first = tl.load(tile_row_ptr + row_tile)
        last = tl.load(starts_ptr + expert + 1)
    i_M = first + tl.arange(0, BLOCK_M)
    ok_M = i_M < last
    slot_M = i_M
    if num_tiles_ptr is not None:
        slot_M = tl.load(sorted_ptr + i_M, mask=ok_M, other=0)
    return expert, first, i_M, ok_M, slot_M


@triton.jit
def write_tile(
    acc, up_acc, expert, n0, i_M, ok_M, slot_M, out_ptr, scales_ptr, up_scales_ptr, bias_ptr, up_bias_ptr, weights_ptr,
    n_size, k_size,
    GATED: tl.constexpr, GATHER: tl.constexpr, GROUP: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All that follows the sums: scales of whole outputs, the slots' weights, biases, the activation."""
    if GROUP == 0:
        acc *= load_quant_scales(scales_ptr, None, expert, n0, 0, n_size, k_size, 0, 0, BLOCK_N)[None, :]
        if GATED:
            up_acc *= load_quant_scales(up_scales_ptr, None, expert, n0, 0, n_size, k_size, 0, 0, BLOCK_N)[None, :]
    n_N = n0 + tl.arange(0, BLOCK_N)
    ok_N = n_N < n_size
    if GATED and weights_ptr is not None:
        weight_M = tl.load(weights_ptr + slot_M, mask=ok_M, other=0.0)
        acc, up_acc = acc * weight_M[:, None], up_acc * weight_M[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + expert * n_size + n_N, mask=ok_N, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if up_bias_ptr is not None:
            up_acc += tl.load(up_bias_ptr + expert * n_size + n_N, mask=ok_N, other=0.0).to(tl.float32)[None, :]
        acc = gated_activation(acc, up_acc, ACTIVATION)
    elif weights_ptr is not None:
        acc *= tl.load(weights_ptr + slot_M, mask=ok_M, other=0.0)[:, None]
    out_M = i_M if GATHER else slot_M
    out_at_MN = out_ptr + out_M.to(tl.int64)[:, None] * n_size + n_N[None, :]
    tl.store(out_at_MN, acc.to(out_ptr.dtype.element_ty), mask=ok_M[:, None] & ok_N[None, :])


@triton.jit
def _parts_of(part_ptr, number, i_M, n_N, num_rows, n_size):
    """Where the sums of some rows and outputs lie among all of the number-th part and matrix."""
    row_M = number.to(tl.int64) * num_rows + i_M
    return part_ptr + row_M[:, None] * n_size + n_N[None, :]


@triton.jit(do_not_specialize=["num_rows"])
def quant_gemm_kernel(
    x, x_scales_ptr, codes, scales_ptr, offsets_ptr, outer_scales_ptr, outer_offsets_ptr, bias_ptr,
    up_codes, up_scales_ptr, up_offsets_ptr, up_outer_scales_ptr, up_outer_offsets_ptr, up_bias_ptr,
    weights_ptr, out_ptr, part_ptr, sorted_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr, num_tiles_ptr,
    num_rows, n_size, k_size, stride_x,
    K: tl.constexpr, GATHER: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, OUTER_GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, ROW_GROUP: tl.constexpr, NATIVE_FP8: tl.constexpr,
    SWAP: tl.constexpr, TMA: tl.constexpr, ROWS_TMA: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """``out = x · weights + bias`` for the rows of one expert per tile; with ``up`` ``act(gate) * up`` of two products.

    Without tables there is one expert and rows are where they are. With them GATHER reads the row of each slot and
    writes in expert order; otherwise rows come in expert order and go to their slots. ``weights_ptr``, if given, are
    the slots' weights on the result (in front of the activation where there is one). ROWS says what rows were rounded
    to; each ROW_GROUP inputs of them then have a scale. With ``part_ptr``, (SPLITS, 1 or 2, X, N), the sums over each
    part of the depth are written there, in the order of the rows, and all else is left to :func:`quant_sum_kernel`.
    """
    column_tiles = tl.cdiv(n_size, BLOCK_N)
    row_tiles = tl.cdiv(num_rows, BLOCK_M) if num_tiles_ptr is None else tl.load(num_tiles_ptr)
    tile = tl.program_id(0)
    if tile >= row_tiles * column_tiles:
        return
    row_tile, column_tile = tile_coordinates(tile, row_tiles, column_tiles, GROUP_M)  # pyright: ignore[reportGeneralTypeIssues]
    expert, first, i_M, ok_M, slot_M = rows_of_tile(  # pyright: ignore[reportGeneralTypeIssues]
        row_tile, num_rows, sorted_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr, num_tiles_ptr, BLOCK_M
    )
    in_M = slot_M // K if GATHER else i_M
    n0 = column_tile * BLOCK_N
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    up_acc = tl.zeros_like(acc)
    begin = 0
    end = k_size
    if SPLITS > 1:
        depth = tl.cdiv(tl.cdiv(k_size, BLOCK_K), SPLITS) * BLOCK_K
        begin = tl.program_id(1) * depth
        end = tl.minimum(begin + depth, k_size)
    for k0 in tl.range(begin, end, BLOCK_K):
        if ROWS_TMA:
            x_MK = x.load([first, k0])  # rows of the next expert come along and are never stored
        else:
            k_K = k0 + tl.arange(0, BLOCK_K)
            x_at_MK = x + in_M.to(tl.int64)[:, None] * stride_x + k_K[None, :]
            x_MK = tl.load(x_at_MK, mask=ok_M[:, None] & (k_K < k_size)[None, :], other=0)
        x_scale_M = None
        if ROWS != "none":
            tl.static_assert(ROW_GROUP % BLOCK_K == 0)
            x_scale_at_M = x_scales_ptr + in_M.to(tl.int64) * tl.cdiv(k_size, ROW_GROUP) + k0 // ROW_GROUP
            x_scale_M = tl.load(x_scale_at_M, mask=ok_M, other=0.0)
        acc = multiply_tile(
            x_MK, x_scale_M, acc, codes, scales_ptr, offsets_ptr, outer_scales_ptr, outer_offsets_ptr,
            expert, n0, k0, n_size, k_size, FORMAT, GROUP, OUTER_GROUP, ROWS, NATIVE_FP8, SWAP, TMA, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if up_codes is not None:
            up_acc = multiply_tile(
                x_MK, x_scale_M, up_acc, up_codes, up_scales_ptr, up_offsets_ptr, up_outer_scales_ptr,
                up_outer_offsets_ptr, expert, n0, k0, n_size, k_size,
                FORMAT, GROUP, OUTER_GROUP, ROWS, NATIVE_FP8, SWAP, TMA, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    if SWAP:
        acc, up_acc = tl.trans(acc), tl.trans(up_acc)
    if part_ptr is None:
        write_tile(
            acc, up_acc, expert, n0, i_M, ok_M, slot_M, out_ptr, scales_ptr, up_scales_ptr, bias_ptr, up_bias_ptr,
            weights_ptr, n_size, k_size, up_codes is not None, GATHER, GROUP, ACTIVATION, BLOCK_N,
        )  # fmt: skip
    else:
        n_N = n0 + tl.arange(0, BLOCK_N)
        ok_MN = ok_M[:, None] & (n_N < n_size)[None, :]
        split = tl.program_id(1)
        if up_codes is None:
            tl.store(_parts_of(part_ptr, split, i_M, n_N, num_rows, n_size), acc, mask=ok_MN)
        else:
            tl.store(_parts_of(part_ptr, 2 * split, i_M, n_N, num_rows, n_size), acc, mask=ok_MN)
            tl.store(_parts_of(part_ptr, 2 * split + 1, i_M, n_N, num_rows, n_size), up_acc, mask=ok_MN)


@triton.jit(do_not_specialize=["num_rows"])
def quant_sum_kernel(
    part_ptr, scales_ptr, up_scales_ptr, bias_ptr, up_bias_ptr, weights_ptr, out_ptr,
    sorted_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr, num_tiles_ptr, num_rows, n_size, k_size,
    GATED: tl.constexpr, GATHER: tl.constexpr, GROUP: tl.constexpr, ACTIVATION: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the parts that :func:`quant_gemm_kernel` left, the first first, and finishes what they are parts of."""
    column_tiles = tl.cdiv(n_size, BLOCK_N)
    row_tiles = tl.cdiv(num_rows, BLOCK_M) if num_tiles_ptr is None else tl.load(num_tiles_ptr)
    tile = tl.program_id(0)
    if tile >= row_tiles * column_tiles:
        return
    expert, _, i_M, ok_M, slot_M = rows_of_tile(  # pyright: ignore[reportGeneralTypeIssues]
        tile // column_tiles, num_rows, sorted_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr, num_tiles_ptr, BLOCK_M
    )
    n0 = tile % column_tiles * BLOCK_N
    n_N = n0 + tl.arange(0, BLOCK_N)
    ok_MN = ok_M[:, None] & (n_N < n_size)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    number = tile * 0
    for _ in tl.range(0, SPLITS):
        acc += tl.load(_parts_of(part_ptr, number, i_M, n_N, num_rows, n_size), mask=ok_MN, other=0.0)
        number += 1
        if GATED:
            up_acc += tl.load(_parts_of(part_ptr, number, i_M, n_N, num_rows, n_size), mask=ok_MN, other=0.0)
            number += 1
    write_tile(
        acc, up_acc, expert, n0, i_M, ok_M, slot_M, out_ptr, scales_ptr, up_scales_ptr, bias_ptr, up_bias_ptr,
        weights_ptr, n_size, k_size, GATED, GATHER, GROUP, ACTIVATION, BLOCK_N,
    )  # fmt: skip


quant_kernels = (quant_gemm_kernel, quant_sum_kernel)


def plan_quant(
    x: torch.Tensor | RoundedRows,
    weight: StoredWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: QuantConfig,
    role: str,
    *,
    up: StoredWeight | None = None,
    up_bias: torch.Tensor | None = None,
    weights_TK: torch.Tensor | None = None,
    index: ExpertIndex | None = None,
    top_k: int = 1,
    gather: bool = False,
    activation: str = "silu",
    native_fp8: bool = False,
) -> list[Launch]:
    """The launch of a product, and where its depth is split that of the sum; see :func:`quant_gemm_kernel`. Rows of
    ``x`` must be contiguous, ``out`` as a whole.

    Arguments:
        role: what the configuration is called among a variant's tilings.
        native_fp8: whether the device multiplies e4m3.
    """
    rounded = x if isinstance(x, RoundedRows) else None
    rows = x.codes if isinstance(x, RoundedRows) else x
    if index is None:
        tiles = cdiv(rows.shape[0], config.block_m)
        tables: dict[str, Any] = dict.fromkeys(_TABLES)
    else:
        assert config.block_m == index.block_m, f"tables have tiles of {index.block_m} rows, not {config.block_m}"
        tiles = index.max_tiles
        tables = index.arguments
    num_rows, gated = rows.shape[0] * (top_k if gather else 1), up is not None
    part = None
    if config.splits > 1:
        part = out.new_empty(config.splits, 1 + gated, num_rows, weight.outputs, dtype=torch.float32)
    tma = config.tma and all(w.kind.tma(w.inputs) and describable(w.codes) for w in (weight, up) if w is not None)
    rows_tma = config.tma and not gather and describable(rows)
    finish = {
        "scales_ptr": weight.scales,
        "up_scales_ptr": None if up is None else up.scales,
        "bias_ptr": bias,
        "up_bias_ptr": up_bias,
        "weights_ptr": weights_TK,
        "out_ptr": out,
        "part_ptr": part,
        **tables,
        "num_rows": num_rows,
        "n_size": weight.outputs,
        "k_size": weight.inputs,
    }
    shared = {
        "GATHER": gather,
        "GROUP": weight.group,
        "ACTIVATION": activation,
        "SPLITS": config.splits,
        "BLOCK_M": config.block_m,
    }
    launches = [
        Launch(
            kernel=quant_gemm_kernel,
            grid=(tiles * cdiv(weight.outputs, config.block_n), config.splits),
            args={
                **finish,
                "x": TensorDescriptor.from_tensor(rows, [config.block_m, config.block_k]) if rows_tma else rows,
                "x_scales_ptr": None if rounded is None else rounded.scales,
                "codes": weight.operand(config, tma),
                "offsets_ptr": weight.offsets,
                "outer_scales_ptr": weight.outer_scales,
                "outer_offsets_ptr": weight.outer_offsets,
                "up_codes": None if up is None else up.operand(config, tma),
                "up_offsets_ptr": None if up is None else up.offsets,
                "up_outer_scales_ptr": None if up is None else up.outer_scales,
                "up_outer_offsets_ptr": None if up is None else up.outer_offsets,
                "stride_x": rows.stride(0),
            },
            constexprs={
                **shared,
                "K": top_k,
                "FORMAT": weight.format,
                "OUTER_GROUP": weight.outer_group,
                "ROWS": "none" if rounded is None else rounded.kind,
                "ROW_GROUP": 0 if rounded is None else rounded.group,
                "NATIVE_FP8": native_fp8 and rounded is not None and rounded.kind == "fp8",
                "SWAP": config.swap,
                "TMA": tma,
                "ROWS_TMA": rows_tma,
                "BLOCK_N": config.block_n,
                "BLOCK_K": config.block_k,
                "GROUP_M": _GROUP_M,
            },
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            role=role,
        )
    ]
    if part is not None:
        grid = (tiles * cdiv(weight.outputs, _SUMMED),)
        constexprs = {**shared, "GATED": gated, "BLOCK_N": _SUMMED}
        launches.append(Launch(kernel=quant_sum_kernel, grid=grid, args=finish, constexprs=constexprs, role=role))
    return launches
