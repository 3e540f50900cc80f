"""Measuring configurations on the device and keeping the winners."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..api.router_spec import RouterSpec
from ..api.types import Routing
from ..torch.experts import PlainExperts
from .combine import plan_combine
from .experts import ExpertPlanner, shape_of, tma_possible
from .gemv import GemvConfig, plan_pair_down, plan_pair_gate_up
from .grouped_gemm import GemmConfig, plan_down, plan_gate_up
from .index import ExpertIndex
from .launch import Launch
from .router import plan_route
from .tuning import PathChoice, best_gemms, refine, row_tile

Measure = Callable[[Sequence[Launch]], float]
_PAIR_LIMIT = 256
_GEMV_VARIANTS = (
    (1, 1024, 2), (2, 1024, 2), (4, 1024, 4), (2, 2048, 4), (4, 512, 2), (8, 512, 4), (1, 512, 1), (4, 256, 1),
    (8, 256, 2), (16, 256, 4), (8, 128, 1), (16, 128, 2),
)  # fmt: skip


def measure_on_gpu(launches: Sequence[Launch], repetitions: int = 20) -> float:
    """Median seconds of running the launches one after the other, the L2 cache flushed before each repetition."""
    for launch in launches:
        launch.run()
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repetitions):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        begin.record()
        for launch in launches:
            launch.run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return sorted(times)[repetitions // 2]


def tune_experts(
    planner: ExpertPlanner,
    weights: PlainExperts,
    top_k: int,
    activation: str,
    token_counts: Sequence[int],
    ticket: torch.Tensor,
    measure: Measure = measure_on_gpu,
    candidates: int = 8,
) -> None:
    """Measure the best candidates of the cost model for random rows and keep the winners in ``planner.measured``.

    Arguments:
        weights: of a real layer, on the device.
        token_counts: powers of two; each is tuned on its own.
        candidates: how many tilings to try per product and row tile.

    Raises:
        RuntimeError: when no candidate of a product runs.
    """
    shape = shape_of(weights, top_k)
    for tokens in token_counts:
        x_TD = torch.randn(tokens, shape.hidden_size, dtype=weights.gate_EFD.dtype, device=weights.gate_EFD.device)
        logits_TE = torch.randn(tokens, shape.num_experts, device=x_TD.device)
        spec = RouterSpec(num_experts=shape.num_experts, top_k=top_k)
        out_TD = torch.empty_like(x_TD)
        guess = row_tile(tokens, shape.num_experts, top_k)
        times: dict[PathChoice, float] = {}
        for block_m in sorted({max(16, guess // 2), guess, min(128, guess * 2)}):
            routing, launches = plan_route(logits_TE, spec, block_m=block_m, ticket=ticket)
            for launch in launches:
                launch.run()
            seconds = _tune_gemms(planner, x_TD, weights, routing, activation, measure, candidates)
            seconds += measure([plan_combine(x_TD.new_empty(tokens * top_k, x_TD.shape[1]), x_TD, routing, out_TD)])
            times[PathChoice(pairs=False, block_m=block_m)] = seconds
        if tokens * top_k <= _PAIR_LIMIT:
            routing, launches = plan_route(logits_TE, spec, block_m=None, ticket=ticket)
            for launch in launches:
                launch.run()
            seconds = _tune_gemvs(planner, x_TD, weights, routing, activation, out_TD, measure)
            times[PathChoice(pairs=True, block_m=guess)] = seconds
        planner.measured.put(planner.key("path", tokens, shape), min(times, key=times.__getitem__))
    planner.forget()


def _tune_gemms(
    planner: ExpertPlanner,
    x_TD: torch.Tensor,
    weights: PlainExperts,
    routing: Routing,
    activation: str,
    measure: Measure,
    candidates: int,
) -> float:
    tokens, top_k = routing.expert_ids_TK.shape
    shape, index = shape_of(weights, top_k), routing.index
    assert isinstance(index, ExpertIndex), "the routing was planned with tables"
    tma = tma_possible(weights)
    first, second = planner.gemm_problems(tokens, shape, index.block_m)
    h_XF = x_TD.new_empty(tokens * top_k, shape.expert_size)
    y_XD = x_TD.new_empty(tokens * top_k, shape.hidden_size)

    def gate_up(config: GemmConfig) -> float:
        launch = plan_gate_up(
            x_TD, weights.gate_EFD, weights.up_EFD, weights.gate_bias_EF, weights.up_bias_EF,
            routing.weights_TK, h_XF, index, activation, routing.weight_on_input, config,
        )  # fmt: skip
        return measure([launch])

    def down(config: GemmConfig) -> float:
        launch = plan_down(
            h_XF, weights.down_EDF, weights.down_bias_ED, routing.weights_TK, y_XD, index, routing.weight_on_input,
            config,
        )  # fmt: skip
        return measure([launch])

    total = 0.0
    for part, problem, run in (("gate_up", first, gate_up), ("down", second, down)):
        config, seconds = refine(best_gemms(problem, planner.device, tma, candidates), run)
        planner.measured.put(planner.key(part, tokens, shape, index.block_m, tma), config)
        total += seconds
    return total


def _tune_gemvs(
    planner: ExpertPlanner,
    x_TD: torch.Tensor,
    weights: PlainExperts,
    routing: Routing,
    activation: str,
    out_TD: torch.Tensor,
    measure: Measure,
) -> float:
    tokens, top_k = routing.expert_ids_TK.shape
    shape = shape_of(weights, top_k)
    h_XF = x_TD.new_zeros(tokens * top_k, shape.expert_size)

    def gate_up(config: GemvConfig) -> float:
        launch = plan_pair_gate_up(
            x_TD, weights.gate_EFD, weights.up_EFD, weights.gate_bias_EF, weights.up_bias_EF, routing, h_XF, activation,
            config,
        )  # fmt: skip
        return measure([launch])

    def down(config: GemvConfig) -> float:
        return measure([plan_pair_down(x_TD, h_XF, weights.down_EDF, weights.down_bias_ED, routing, out_TD, config)])

    total = 0.0
    defaults = planner.gemvs(tokens, shape)
    for part, default, run in zip(("pair_gate_up", "pair_down"), defaults, (gate_up, down), strict=True):
        variants = [GemvConfig(block_n=n, block_k=k, num_warps=w) for n, k, w in _GEMV_VARIANTS]
        config, seconds = refine([default, *variants], run)
        planner.measured.put(planner.key(part, tokens, shape), config)
        total += seconds
    return total
