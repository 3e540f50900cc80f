"""Routing on the GPU: scores, groups, top-k and weights, and the tables that grouped GEMMs walk, in one launch.

Rows are routed in chunks, one program each. The tables are those of ``triton_index.py``; above ``SINGLE_LAUNCH_TOKENS``
rows they take two more launches.

Shape suffixes: R rows of a chunk, L lanes (experts laid out as padded groups), E real experts, K choices; the rest as
in ``types.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

import triton
import triton.language as tl

from ..api.router_spec import RouterSpec
from ..api.types import Routing
from ..reference.router import check_route_arguments
from .device import DeviceProperties
from .experts import routed_rows
from .index import finish_index, index_kernels, index_tables, rank_and_count
from .launch import Launch, next_power_of_2, require_contiguous
from .shapes import Steps, WarmUpShape, meta
from .variants import Call, OpVariant, Planned, Planner, Tilings, register

_LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _log1p(z):
    u = 1.0 + z
    return tl.where(u == 1.0, z, tl.log(u) * (z / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _scores(logits_RL, valid_L, SCORE: tl.constexpr, SOFTMAX_AFTER: tl.constexpr):
    if SCORE == "softmax" and not SOFTMAX_AFTER:
        logits_RL = tl.where(valid_L[None, :], logits_RL, float("-inf"))
        exp_RL = tl.exp(logits_RL - tl.max(logits_RL, axis=1)[:, None])
        scores_RL = exp_RL / tl.sum(exp_RL, axis=1)[:, None]
    elif SCORE == "sigmoid":
        scores_RL = 1.0 / (1.0 + tl.exp(-logits_RL))
    elif SCORE == "sqrt_softplus":
        softplus_RL = tl.maximum(logits_RL, 0.0) + _log1p(tl.exp(-tl.abs(logits_RL)))
        scores_RL = tl.sqrt(softplus_RL)
    else:
        scores_RL = logits_RL
    return scores_RL


@triton.jit
def _allowed_groups(
    choice_RL, GROUPS: tl.constexpr, TOP: tl.constexpr, TOP2: tl.constexpr, ROWS: tl.constexpr,
    GROUPS_PAD: tl.constexpr, SIZE_PAD: tl.constexpr,
):  # fmt: skip
    """Blank the lanes outside the best TOP groups of each row."""
    choice_RGS = tl.reshape(choice_RL, (ROWS, GROUPS_PAD, SIZE_PAD))
    worth_RG, first_RG = tl.max(choice_RGS, axis=2, return_indices=True)  # pyright: ignore[reportGeneralTypeIssues]
    if TOP2:
        inside = tl.arange(0, SIZE_PAD)[None, None, :]
        others_RGS = tl.where(inside == first_RG[:, :, None], float("-inf"), choice_RGS)
        worth_RG += tl.max(others_RGS, axis=2)
    group = tl.arange(0, GROUPS_PAD)[None, :]
    left_RG = tl.where(group < GROUPS, tl.maximum(worth_RG, _LOWEST), float("-inf"))
    allowed_RG = tl.zeros((ROWS, GROUPS_PAD), dtype=tl.int32)
    for _ in range(TOP):
        best_R = tl.argmax(left_RG, axis=1)
        hit_RG = group == best_R[:, None]
        allowed_RG += hit_RG.to(tl.int32)
        left_RG = tl.where(hit_RG, float("-inf"), left_RG)
    keep_RGS = tl.broadcast_to(allowed_RG[:, :, None], (ROWS, GROUPS_PAD, SIZE_PAD))
    keep_RL = tl.reshape(keep_RGS, (ROWS, GROUPS_PAD * SIZE_PAD))
    return tl.where(keep_RL > 0, choice_RL, float("-inf"))


@triton.jit(do_not_specialize=["num_tokens"])
def route_kernel(
    logits_ptr, selection_bias_ptr, expert_scale_ptr, forced_ptr, ids_ptr, weights_ptr, used_counts_ptr, identity_ptr,
    ranks_ptr, counts_ptr, starts_ptr, sorted_ptr, tile_expert_ptr, tile_row_ptr, num_tiles_ptr, ticket_ptr,
    num_tokens, scale, norm_epsilon, norm_floor, jitter,
    GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr,
    K: tl.constexpr, SCORE: tl.constexpr, SOFTMAX_AFTER: tl.constexpr, RENORMALIZE: tl.constexpr,
    NORM_P: tl.constexpr, ZERO_EXPERTS: tl.constexpr, ROWS: tl.constexpr, GROUPS_PAD: tl.constexpr,
    SIZE_PAD: tl.constexpr, K_PAD: tl.constexpr, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr,
    SLOTS: tl.constexpr, INDEX: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """Route ROWS rows. See :class:`RouterSpec` for the rules, in the order of its fields."""
    chunk = tl.program_id(0)
    rows_R = chunk * ROWS + tl.arange(0, ROWS)
    rows_ok_R = rows_R < num_tokens
    lane_L = tl.arange(0, GROUPS_PAD * SIZE_PAD)
    expert_L = (lane_L // SIZE_PAD) * GROUP_SIZE + lane_L % SIZE_PAD
    valid_L = (lane_L // SIZE_PAD < GROUPS) & (lane_L % SIZE_PAD < GROUP_SIZE)
    NUM_EXPERTS: tl.constexpr = GROUPS * GROUP_SIZE
    at_RL = logits_ptr + rows_R[:, None] * NUM_EXPERTS + expert_L[None, :]
    logits_RL = tl.load(at_RL, mask=rows_ok_R[:, None] & valid_L[None, :], other=0.0).to(tl.float32)
    scores_RL = _scores(logits_RL, valid_L, SCORE, SOFTMAX_AFTER)

    choice_RL = scores_RL
    if selection_bias_ptr is not None:
        choice_RL += tl.load(selection_bias_ptr + expert_L, mask=valid_L, other=0.0).to(tl.float32)[None, :]
    # A legitimate -inf or NaN stays above the lanes that are padding or already taken: K distinct experts always come.
    choice_RL = tl.where(choice_RL > _LOWEST, choice_RL, _LOWEST)
    choice_RL = tl.where(valid_L[None, :], choice_RL, float("-inf"))
    if TOP_GROUPS < GROUPS:
        choice_RL = _allowed_groups(choice_RL, GROUPS, TOP_GROUPS, TOP2, ROWS, GROUPS_PAD, SIZE_PAD)

    slot_K = tl.arange(0, K_PAD)[None, :]
    ids_RK = tl.zeros((ROWS, K_PAD), dtype=tl.int32)
    weights_RK = tl.zeros((ROWS, K_PAD), dtype=tl.float32)
    for k in range(K):
        if forced_ptr is not None:
            id_R = tl.load(forced_ptr + rows_R * K + k, mask=rows_ok_R, other=0).to(tl.int32)
            hit_RL = expert_L[None, :] == id_R[:, None]
            weight_R = tl.sum(tl.where(hit_RL, scores_RL, 0.0), axis=1)
        else:
            best_R, lane_R = tl.max(choice_RL, axis=1, return_indices=True)
            hit_RL = lane_L[None, :] == lane_R[:, None]
            id_R = tl.sum(tl.where(hit_RL, expert_L[None, :], 0), axis=1)
            if SCORE == "sparsemixer":
                factor_RL = tl.maximum(tl.abs(logits_RL), best_R[:, None])
                far_RL = (best_R[:, None] - logits_RL) / factor_RL > 2 * jitter
                near_RL = (choice_RL > float("-inf")) & ~far_RL
                weight_R = 1.0 / tl.sum(tl.where(near_RL, tl.exp(choice_RL - best_R[:, None]), 0.0), axis=1)
            else:
                weight_R = tl.sum(tl.where(hit_RL, scores_RL, 0.0), axis=1)
            choice_RL = tl.where(hit_RL, float("-inf"), choice_RL)
        ids_RK = tl.where(slot_K == k, id_R[:, None], ids_RK)
        weights_RK = tl.where(slot_K == k, weight_R[:, None], weights_RK)

    chosen_K = slot_K < K
    if SOFTMAX_AFTER:
        raw_RK = tl.where(chosen_K, weights_RK, float("-inf"))
        exp_RK = tl.exp(raw_RK - tl.max(raw_RK, axis=1)[:, None])
        weights_RK = exp_RK / tl.sum(exp_RK, axis=1)[:, None]
    if SCORE == "constant":
        weights_RK = tl.where(chosen_K, 1.0, 0.0)
    if RENORMALIZE:
        size_RK = tl.abs(weights_RK)
        if NORM_P == 1:
            norm_R = tl.sum(size_RK, axis=1)
        elif NORM_P == 2:
            norm_R = tl.sqrt(tl.sum(size_RK * size_RK, axis=1))
        else:
            power_RK = tl.where(size_RK > 0.0, tl.exp(NORM_P * tl.log(tl.where(size_RK > 0.0, size_RK, 1.0))), 0.0)
            norm_R = tl.exp(tl.log(tl.sum(power_RK, axis=1)) / NORM_P)
        weights_RK = weights_RK / (tl.maximum(norm_R, norm_floor) + norm_epsilon)[:, None]
    weights_RK = weights_RK * scale
    if expert_scale_ptr is not None:
        weights_RK *= tl.load(expert_scale_ptr + ids_RK).to(tl.float32)

    used_RK = tl.broadcast_to(chosen_K, (ROWS, K_PAD))
    place_RK = tl.broadcast_to(slot_K, (ROWS, K_PAD))
    if ZERO_EXPERTS > 0:
        real_RK = (ids_RK < NUM_EXPERTS - ZERO_EXPERTS) & chosen_K
        zero_RK = (ids_RK >= NUM_EXPERTS - ZERO_EXPERTS) & chosen_K
        tl.store(identity_ptr + rows_R, tl.sum(tl.where(zero_RK, weights_RK, 0.0), axis=1), mask=rows_ok_R)
        count_R = tl.sum(real_RK.to(tl.int32), axis=1)
        tl.store(used_counts_ptr + rows_R, count_R, mask=rows_ok_R)
        before_RK = tl.cumsum(real_RK.to(tl.int32), axis=1) - real_RK.to(tl.int32)
        place_RK = tl.where(real_RK, before_RK, count_R[:, None] + slot_K - before_RK)
        ids_RK = tl.where(real_RK, ids_RK, 0)
        weights_RK = tl.where(real_RK, weights_RK, 0.0)
        used_RK = real_RK
    slot_RK = rows_R[:, None] * K + place_RK
    stored_RK = rows_ok_R[:, None] & chosen_K
    tl.store(ids_ptr + slot_RK, ids_RK, mask=stored_RK)
    tl.store(weights_ptr + slot_RK, weights_RK, mask=stored_RK)
    if INDEX:
        E: tl.constexpr = NUM_EXPERTS - ZERO_EXPERTS
        rank_and_count(
            ids_RK, used_RK, rows_R, rows_ok_R, slot_RK, ranks_ptr, counts_ptr, chunk, E, E_PAD, K, K_PAD, ROWS
        )
        if FINISH:
            finish_index(
                ids_ptr, used_counts_ptr, ranks_ptr, counts_ptr, starts_ptr, sorted_ptr, tile_expert_ptr,
                tile_row_ptr, num_tiles_ptr, ticket_ptr, num_tokens,
                E, E_PAD, K, ROWS, BLOCK_M, CHUNKS, SLOTS, ZERO_EXPERTS > 0,
            )  # fmt: skip


class RouteProblem(NamedTuple):
    """A rule and its rows; ``rows`` is a power of two, ``block_m`` rows per tile of the tables."""

    rows: int
    spec: RouterSpec
    block_m: int | None


@dataclass(frozen=True)
class RouteCall(Call[Routing]):
    """Experts and weights of every row, and tables: one launch up to 1,024 rows, three beyond.

    Planning raises ValueError as :func:`router_reference.route` does, and where a tensor is not contiguous.

    Arguments:
        logits_TE: any float dtype.
        block_m: rows per tile of the tables; None builds no tables (the pair path needs none).
        ticket: as in :func:`plan_index`.
    """

    operation = "route"

    logits_TE: torch.Tensor
    spec: RouterSpec
    block_m: int | None
    ticket: torch.Tensor
    selection_bias_E: torch.Tensor | None = None
    expert_scale_E: torch.Tensor | None = None
    forced_ids_TK: torch.Tensor | None = None

    def problem(self) -> RouteProblem:
        return RouteProblem(next_power_of_2(self.logits_TE.shape[0]), self.spec, self.block_m)

    @classmethod
    def of_layer(cls, layer: WarmUpShape, steps: Steps, dtype: torch.dtype, planner: Planner) -> Iterator[RouteCall]:
        spec = layer.router
        if spec is None:
            return
        per_expert, ticket = meta(spec.num_experts), meta(1, dtype=torch.int32)
        for tokens in steps.tokens:
            yield cls(
                meta(tokens, spec.num_experts, dtype=torch.float32 if spec.float32_logits else dtype),
                spec,
                routed_rows(layer, tokens, dtype, planner),
                ticket,
                per_expert if spec.selection_bias else None,
                per_expert if spec.expert_scale else None,
                meta(tokens, spec.top_k, dtype=torch.int64) if spec.forced_experts else None,
            )


@register
class FusedRoute(OpVariant[RouteCall, RouteProblem]):
    """Scores, choice, weights and tables in one launch."""

    call, name, kernels = RouteCall, "fused", (route_kernel, *index_kernels)

    def refuses(self, problem: RouteProblem, device: DeviceProperties) -> str | None:
        return "routing with a capacity" if problem.spec.drops else None

    def plan(self, call: RouteCall, tilings: Tilings, device: DeviceProperties) -> Planned[Routing]:
        logits_TE, spec, block_m = call.logits_TE, call.spec, call.block_m
        given = (call.selection_bias_E, call.expert_scale_E, call.forced_ids_TK)
        require_contiguous(
            logits_TE=logits_TE, selection_bias_E=given[0], expert_scale_E=given[1], forced_ids_TK=given[2]
        )
        check_route_arguments(logits_TE, spec, *given)
        num_tokens, top_k = logits_TE.shape[0], spec.top_k
        ids_TK = logits_TE.new_empty(num_tokens, top_k, dtype=torch.int32)
        weights_TK = logits_TE.new_empty(num_tokens, top_k, dtype=torch.float32)
        counts_T = identity_T = None
        if spec.zero_experts:
            counts_T = logits_TE.new_empty(num_tokens, dtype=torch.int32)
            identity_T = logits_TE.new_empty(num_tokens, dtype=torch.float32)
        tables = index_tables(ids_TK, counts_T, spec.num_real_experts, block_m or 16, call.ticket)
        groups, size = (spec.num_groups, spec.group_size) if spec.grouped else (1, spec.num_experts)
        groups_pad, size_pad = next_power_of_2(groups), next_power_of_2(size)
        first = Launch(
            kernel=route_kernel,
            grid=(tables.num_chunks,),
            args={
                **tables.args,
                "logits_ptr": logits_TE,
                "selection_bias_ptr": call.selection_bias_E,
                "expert_scale_ptr": call.expert_scale_E,
                "forced_ptr": call.forced_ids_TK,
                "weights_ptr": weights_TK,
                "identity_ptr": identity_T,
                "scale": float(spec.scale),
                "norm_epsilon": float(spec.norm_epsilon),
                "norm_floor": float(spec.norm_floor),
                "jitter": float(spec.jitter),
            },
            constexprs={
                **{name: value for name, value in tables.constexprs.items() if name != "E"},
                "GROUPS": groups,
                "GROUP_SIZE": size,
                "TOP_GROUPS": spec.top_groups if spec.grouped else 1,
                "TOP2": spec.group_score == "top2_sum",
                "SCORE": spec.score,
                "SOFTMAX_AFTER": spec.softmax_after_topk,
                "RENORMALIZE": spec.renormalize,
                "NORM_P": float(spec.norm_p),
                "ZERO_EXPERTS": spec.zero_experts,
                "GROUPS_PAD": groups_pad,
                "SIZE_PAD": size_pad,
                "INDEX": block_m is not None,
                "FINISH": block_m is not None and tables.single,
            },
            num_warps=4 if groups_pad * size_pad <= 128 else 8,  # wide rows would not fit the registers of four
        )
        routing = Routing(
            expert_ids_TK=ids_TK,
            weights_TK=weights_TK,
            counts_T=counts_T,
            identity_weights_T=identity_T,
            weight_on_input=spec.weight_on_input,
            index=None if block_m is None else tables.index,
        )
        return routing, [first, *(tables.following() if block_m is not None else ())]
