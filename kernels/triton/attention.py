"""Paged attention: grouped queries, causal, with an optional sliding window; one kernel for decode and prefill.

The rows of a program are BLOCK_Q positions times query heads of one key/value head, so that keys are read once per
group, or per BLOCK_H heads of it. When there are too few programs to fill the device (decode), the context is split
among several, and a second kernel merges their parts by their log-sum-exp.

Shape suffixes: M rows of a program, L positions of the context; the rest as in ``types.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .kv import load_kv_tile
from .tiles import dot


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Tiling: positions of queries and of the context per tile, parts that the context is split into, and how many
    heads of a group share a program at most."""

    block_q: int
    block_l: int
    splits: int
    num_warps: int
    num_stages: int
    block_h: int = 1 << 30


@triton.jit(do_not_specialize=["num_rows", "window", "table_stride"])
def attention_kernel(
    q_ptr, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, rest_ptr,
    out_ptr, part_ptr, part_max_ptr, part_sum_ptr, sinks_ptr, lse_ptr,
    cache_index_ptr, query_start_ptr, context_len_ptr, block_table_ptr,
    log2_scale, log2_cap, window, num_rows,
    q_stride_t, q_stride_h, stride_b, stride_g, stride_p, scale_b, scale_g, scale_p,
    rest_b, rest_g, rest_p, table_stride,
    G: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr,
    REST: tl.constexpr, REST_PAD: tl.constexpr, REST_AT: tl.constexpr, SCALE_AT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, SPLITS: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, SHARED: tl.constexpr, FORMAT: tl.constexpr, NATIVE_FP8: tl.constexpr,
    SINKS: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """HEADS is query heads per key/value head. With SPLITS > 1 unnormalised parts go to ``part_*``, else to ``out``.

    Keys have REST channels beside the C that values have, REST_AT behind where a token's begin, which are never codes;
    with SHARED those C are the values. Scales are SCALE_AT behind where a token's begin. Where scores are CAPPED,
    ``log2_scale`` makes them twice what the hyperbolic tangent is taken of, in units of log 2.

    With int8 the scale of a key multiplies its scores, and that of a value its probabilities: one product per query
    instead of one per channel.
    """
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    TILES: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H  # type: ignore[assignment]
    sequence = tl.program_id(1) // (G * TILES)
    tile = tl.program_id(1) % (G * TILES)
    group = tile // TILES
    first_row = tl.load(query_start_ptr + sequence)
    query_len = tl.load(query_start_ptr + sequence + 1) - first_row
    q0 = tl.program_id(0) * BLOCK_Q
    if q0 >= query_len:
        return
    m = tl.arange(0, BLOCK_M)
    q_M = q0 + m // BLOCK_H
    in_group_M = tile % TILES * BLOCK_H + m % BLOCK_H
    head_M = group * HEADS + in_group_M
    ok_M = (m < BLOCK_Q * BLOCK_H) & (q_M < query_len) & (in_group_M < HEADS)
    row_M = first_row + q_M
    # Loaded, not worked out from the lengths: that would be done again in the loop, and registers would spill.
    index_M = tl.load(cache_index_ptr + row_M, mask=ok_M, other=0).to(tl.int32)
    c = tl.arange(0, C_PAD)
    ok_C = c < C
    q_at_MC = q_ptr + row_M.to(tl.int64)[:, None] * q_stride_t + head_M[:, None] * q_stride_h + c[None, :]
    q_MC = tl.load(q_at_MC, mask=ok_M[:, None] & ok_C[None, :], other=0.0)
    if REST:
        r = tl.arange(0, REST_PAD)
        ok_R = r < REST
        q_at_MR = q_ptr + row_M.to(tl.int64)[:, None] * q_stride_t + head_M[:, None] * q_stride_h + C + r[None, :]
        q_MR = tl.load(q_at_MR, mask=ok_M[:, None] & ok_R[None, :], other=0.0)

    end = tl.minimum(tl.load(context_len_ptr + sequence), tl.max(index_M, axis=0) + 1)
    begin = 0
    if WINDOW:
        first = tl.maximum(0, tl.min(tl.where(ok_M, index_M, 2147483647), axis=0) - window + 1)
        begin = first // BLOCK_L * BLOCK_L
    if SPLITS > 1:
        per_split = tl.cdiv(tl.cdiv(end - begin, BLOCK_L), SPLITS) * BLOCK_L
        begin += tl.program_id(2) * per_split
        end = tl.minimum(end, begin + per_split)

    max_M = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    sum_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc_MC = tl.zeros((BLOCK_M, C_PAD), dtype=tl.float32)
    for l0 in tl.range(begin, end, BLOCK_L):
        l_L = l0 + tl.arange(0, BLOCK_L)
        ok_L = l_L < end
        if WINDOW:  # pages behind it may be anybody's
            ok_L = ok_L & (l_L >= first)
        page_L = tl.load(block_table_ptr + sequence * table_stride + l_L // PAGE, mask=ok_L, other=0).to(tl.int64)
        inside_L = l_L % PAGE
        at_L1 = (page_L * stride_b + group * stride_g + inside_L * stride_p)[:, None]
        k_LC = load_kv_tile(keys_ptr, at_L1 + c[None, :], ok_L, ok_C, dtype, FORMAT, NATIVE_FP8)
        v_LC = k_LC if SHARED else load_kv_tile(values_ptr, at_L1 + c[None, :], ok_L, ok_C, dtype, FORMAT, NATIVE_FP8)
        scores_ML = dot(q_MC, tl.trans(k_LC), tl.zeros((BLOCK_M, BLOCK_L), dtype=tl.float32))
        if FORMAT == "int8":
            scale_at_L = page_L * scale_b + group * scale_g + inside_L * scale_p + SCALE_AT
            scores_ML *= tl.load(key_scales_ptr + scale_at_L, mask=ok_L, other=0.0).to(tl.float32)[None, :]
        if REST:
            rest_at_L1 = (page_L * rest_b + group * rest_g + inside_L * rest_p + REST_AT)[:, None]
            k_LR = tl.load(rest_ptr + rest_at_L1 + r[None, :], mask=ok_L[:, None] & ok_R[None, :], other=0.0)
            scores_ML = dot(q_MR, tl.trans(k_LR.to(dtype)), scores_ML)
        scores_ML *= log2_scale
        if CAPPED:
            scores_ML = log2_cap - 2.0 * log2_cap / (1.0 + tl.exp2(scores_ML))
        seen_ML = ok_L[None, :] & (l_L[None, :] <= index_M[:, None])
        if WINDOW:
            seen_ML = seen_ML & (index_M[:, None] - l_L[None, :] < window)
        scores_ML = tl.where(seen_ML, scores_ML, float("-inf"))
        new_max_M = tl.maximum(max_M, tl.max(scores_ML, axis=1))
        # A row that has seen nothing yet has no maximum to subtract.
        shift_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M)
        probs_ML = tl.exp2(scores_ML - shift_M[:, None])
        decay_M = tl.exp2(max_M - shift_M)
        sum_M = sum_M * decay_M + tl.sum(probs_ML, axis=1)
        if FORMAT == "int8":
            v_scale_L = tl.load(value_scales_ptr + scale_at_L, mask=ok_L, other=0.0).to(tl.float32)
            if dtype == tl.float16:  # whose range would not hold the products of small scales and probabilities
                v_LC = (v_LC.to(tl.float32) * v_scale_L[:, None]).to(dtype)
            else:
                probs_ML *= v_scale_L[None, :]
        acc_MC = dot(probs_ML.to(v_LC.dtype), v_LC, acc_MC * decay_M[:, None])
        max_M = new_max_M

    ok_MC = ok_M[:, None] & ok_C[None, :]
    if SPLITS > 1:
        item_M = (tl.program_id(2).to(tl.int64) * num_rows + row_M) * (G * HEADS) + head_M
        tl.store(part_max_ptr + item_M, max_M, mask=ok_M)
        tl.store(part_sum_ptr + item_M, sum_M, mask=ok_M)
        tl.store(part_ptr + item_M[:, None] * C + c[None, :], acc_MC, mask=ok_MC)
    else:
        if SINKS:
            sink_M = tl.load(sinks_ptr + head_M, mask=ok_M, other=0.0) * 1.4426950408889634
            new_max_M = tl.maximum(max_M, sink_M)
            decay_M = tl.exp2(max_M - new_max_M)
            sum_M = sum_M * decay_M + tl.exp2(sink_M - new_max_M)
            acc_MC *= decay_M[:, None]
            max_M = new_max_M
        if LSE:
            lse_M = (max_M + tl.log2(sum_M)) * 0.6931471805599453
            tl.store(lse_ptr + row_M.to(tl.int64) * (G * HEADS) + head_M, lse_M, mask=ok_M)
        out_MC = acc_MC / tl.where(sum_M == 0.0, 1.0, sum_M)[:, None]
        out_at_MC = out_ptr + (row_M.to(tl.int64) * (G * HEADS) + head_M)[:, None] * C + c[None, :]
        tl.store(out_at_MC, out_MC.to(out_ptr.dtype.element_ty), mask=ok_MC)


@triton.jit(do_not_specialize=["num_items"])
def merge_kernel(
    part_ptr, part_max_ptr, part_sum_ptr, out_ptr, sinks_ptr, lse_ptr, num_items,
    HEADS: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr, SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr,
    SINKS: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """One (row, head): ``sum_s 2^(max_s - max) part_s / sum_s 2^(max_s - max) sum_s``; HEADS is all query heads."""
    item = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SPLITS_PAD)
    ok_S = s < SPLITS
    max_S = tl.load(part_max_ptr + s * num_items + item, mask=ok_S, other=float("-inf"))
    sum_S = tl.load(part_sum_ptr + s * num_items + item, mask=ok_S, other=0.0)
    top = tl.max(max_S, axis=0)
    if SINKS:
        sink = tl.load(sinks_ptr + item % HEADS) * 1.4426950408889634
        top = tl.maximum(top, sink)
    factor_S = tl.exp2(max_S - top)
    c = tl.arange(0, C_PAD)
    ok_C = c < C
    part_SC = tl.load(
        part_ptr + (s * num_items + item)[:, None] * C + c[None, :], mask=ok_S[:, None] & ok_C[None, :], other=0.0
    )
    total = tl.sum(factor_S * sum_S, axis=0)
    if SINKS:
        total += tl.exp2(sink - top)
    if LSE:
        tl.store(lse_ptr + item, (top + tl.log2(total)) * 0.6931471805599453)
    out_C = tl.sum(factor_S[:, None] * part_SC, axis=0) / total
    tl.store(out_ptr + item * C + c, out_C.to(out_ptr.dtype.element_ty), mask=ok_C)
