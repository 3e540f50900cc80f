"""Experts for a handful of tokens: a grid over (token, expert) pairs, no tables, no tensor cores.

Two launches read every chosen expert's weights once, in long rows: gate and up together, then down with the weighted
sum over a token's experts in float32, in the order of the slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .tiles import gated_activation, load_weight_tile


@dataclass(frozen=True, kw_only=True)
class GemvConfig:
    """Tiling of one matrix-vector kernel: outputs and depth of a tile."""

    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 1


@triton.jit
def pair_gate_up_kernel(
    x_ptr, gate, up, gate_bias_ptr, up_bias_ptr, ids_ptr, weights_ptr, used_counts_ptr, h_ptr,
    hidden_size, expert_size, gate_stride_e, gate_stride_n, up_stride_e, up_stride_n,
    K: tl.constexpr, ACTIVATION: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """``h[slot] = act(gate_e x) * (up_e x)`` for the used slots."""
    slot = tl.program_id(0)
    row = slot // K
    if used_counts_ptr is not None and slot - row * K >= tl.load(used_counts_ptr + row):
        return
    expert = tl.load(ids_ptr + slot)
    n0 = tl.program_id(1) * BLOCK_N
    gate_NK = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    up_NK = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for k0 in range(0, hidden_size, BLOCK_K):
        k_K = k0 + tl.arange(0, BLOCK_K)
        x_K = tl.load(x_ptr + row * hidden_size + k_K, mask=k_K < hidden_size, other=0.0).to(tl.float32)
        gate_tile = load_weight_tile(
            gate, expert, n0, k0, expert_size, hidden_size, gate_stride_e, gate_stride_n,
            False, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, "evict_first",
        )  # fmt: skip
        up_tile = load_weight_tile(
            up, expert, n0, k0, expert_size, hidden_size, up_stride_e, up_stride_n,
            False, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, "evict_first",
        )  # fmt: skip
        gate_NK += gate_tile.to(tl.float32) * x_K[None, :]
        up_NK += up_tile.to(tl.float32) * x_K[None, :]
    gate_N, up_N = tl.sum(gate_NK, axis=1), tl.sum(up_NK, axis=1)
    n_N = n0 + tl.arange(0, BLOCK_N)
    ok_N = n_N < expert_size
    if WEIGHT_ON_INPUT:
        weight = tl.load(weights_ptr + slot)
        gate_N, up_N = gate_N * weight, up_N * weight
    if gate_bias_ptr is not None:
        gate_N += tl.load(gate_bias_ptr + expert * expert_size + n_N, mask=ok_N, other=0.0).to(tl.float32)
    if up_bias_ptr is not None:
        up_N += tl.load(up_bias_ptr + expert * expert_size + n_N, mask=ok_N, other=0.0).to(tl.float32)
    h_N = gated_activation(gate_N, up_N, ACTIVATION)
    tl.store(h_ptr + slot * expert_size + n_N, h_N.to(h_ptr.dtype.element_ty), mask=ok_N)


@triton.jit
def _down_term(
    h_ptr, down, slot, expert, weight, n0, k0, rows, down_stride_e, down_stride_n,
    F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Weighted products of one tile. With ``rows`` 0 nothing is read, neither of the expert nor of its h."""
    k_K = k0 + tl.arange(0, BLOCK_K)
    h_K = tl.load(h_ptr + slot * F + k_K, mask=(k_K < F) & (rows > 0), other=0.0).to(tl.float32)
    tile = load_weight_tile(
        down, expert, n0, k0, rows, F, down_stride_e, down_stride_n,
        False, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, "evict_first",
    )  # fmt: skip
    return tile.to(tl.float32) * (weight * h_K)[None, :]


@triton.jit
def pair_down_kernel(
    h_ptr, down, down_bias_ptr, ids_ptr, weights_ptr, used_counts_ptr, identity_ptr, x_ptr, out_ptr,
    hidden_size, down_stride_e, down_stride_n,
    K: tl.constexpr, F: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """``out[row] = sum_k weight_k (down_e h[slot] + bias_e) + identity * x[row]``."""
    row = tl.program_id(0)
    n0 = tl.program_id(1) * BLOCK_N
    n_N = n0 + tl.arange(0, BLOCK_N)
    ok_N = n_N < hidden_size
    acc_NK = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    bias_N = tl.zeros((BLOCK_N,), dtype=tl.float32)
    # Unrolled over the experts (and over the depth where that is short), so that their weights are fetched together
    # instead of one memory latency after another.
    for k in tl.static_range(K):
        slot = row * K + k
        rows = hidden_size
        if used_counts_ptr is not None:
            rows = tl.where(k < tl.load(used_counts_ptr + row), hidden_size, 0)
        ok_k_N = n_N < rows
        expert = tl.load(ids_ptr + slot)
        weight = 1.0
        if not WEIGHT_ON_INPUT:
            weight = tl.load(weights_ptr + slot, mask=rows > 0, other=0.0)
        if down_bias_ptr is not None:
            bias_at_N = down_bias_ptr + expert * hidden_size + n_N
            bias_N += weight * tl.load(bias_at_N, mask=ok_k_N, other=0.0).to(tl.float32)
        if UNROLL:
            for k0 in tl.static_range(0, F, BLOCK_K):
                acc_NK += _down_term(
                    h_ptr, down, slot, expert, weight, n0, k0, rows, down_stride_e, down_stride_n,
                    F, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K,
                )  # fmt: skip
        else:
            for k0 in tl.range(0, F, BLOCK_K, loop_unroll_factor=4):
                acc_NK += _down_term(
                    h_ptr, down, slot, expert, weight, n0, k0, rows, down_stride_e, down_stride_n,
                    F, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K,
                )  # fmt: skip
    out_N = tl.sum(acc_NK, axis=1) + bias_N
    if identity_ptr is not None:
        x_N = tl.load(x_ptr + row * hidden_size + n_N, mask=ok_N, other=0.0).to(tl.float32)
        out_N += tl.load(identity_ptr + row) * x_N
    tl.store(out_ptr + row * hidden_size + n_N, out_N.to(out_ptr.dtype.element_ty), mask=ok_N)
