"""Sum of a token's expert outputs in float32, in the order of the slots: deterministic, no atomics."""

from __future__ import annotations

import torch

import triton
import triton.language as tl

from ..api.types import Routing
from .launch import Launch, cdiv, next_power_of_2


@triton.jit
def combine_kernel(
    y_ptr, used_counts_ptr, identity_ptr, x_ptr, out_ptr, hidden_size, K: tl.constexpr, BLOCK: tl.constexpr
):
    """``out[row] = sum_k y[row * K + k] + identity * x[row]`` over the used slots; y holds weighted outputs."""
    row = tl.program_id(0).to(tl.int64)
    n_N = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok_N = n_N < hidden_size
    used = K
    if used_counts_ptr is not None:
        used = tl.load(used_counts_ptr + row)
    acc_N = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(K):
        y_at_N = y_ptr + (row * K + k) * hidden_size + n_N
        acc_N += tl.load(y_at_N, mask=ok_N & (k < used), other=0.0, eviction_policy="evict_first").to(tl.float32)
    if identity_ptr is not None:
        x_N = tl.load(x_ptr + row * hidden_size + n_N, mask=ok_N, other=0.0).to(tl.float32)
        acc_N += tl.load(identity_ptr + row) * x_N
    tl.store(out_ptr + row * hidden_size + n_N, acc_N.to(out_ptr.dtype.element_ty), mask=ok_N)


def plan_combine(y_XD: torch.Tensor, x_TD: torch.Tensor, routing: Routing, out_TD: torch.Tensor) -> Launch:
    """Launch that writes every element of ``out_TD``; ``x_TD`` is read for zero experts only."""
    num_tokens, hidden_size = out_TD.shape
    block = min(1024, next_power_of_2(hidden_size))
    return Launch(
        kernel=combine_kernel,
        grid=(num_tokens, cdiv(hidden_size, block)),
        args={
            "y_ptr": y_XD,
            "used_counts_ptr": routing.counts_T,
            "identity_ptr": routing.identity_weights_T,
            "x_ptr": x_TD,
            "out_ptr": out_TD,
            "hidden_size": hidden_size,
        },
        constexprs={"K": routing.expert_ids_TK.shape[1], "BLOCK": block},
        num_warps=4,
    )
