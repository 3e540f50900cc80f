"""Measuring variants and their configurations on the device, and keeping the winners."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..api.router_spec import RouterSpec
from ..torch.experts import PlainExperts
from .experts import ExpertProblem, ExpertsCall
from .launch import Launch
from .router import RouteCall
from .tuning import refine
from .variants import Choice, OpVariant, Planner, Ranked, variants

Measure = Callable[[Sequence[Launch]], float]


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
    planner: Planner,
    weights: PlainExperts,
    top_k: int,
    activation: str,
    token_counts: Sequence[int],
    ticket: torch.Tensor,
    measure: Measure = measure_on_gpu,
    candidates: int = 8,
) -> None:
    """Measure every variant's best candidates for random rows and keep the winner in ``planner.measured``.

    Arguments:
        weights: of a real layer, on the device.
        token_counts: powers of two; each is tuned on its own.
        candidates: how many tilings to try per product and row tile.

    Raises:
        RuntimeError: when no candidate of a product runs.
    """
    one = ExpertProblem.of(weights, activation, weights.gate_EFD.dtype)
    spec = RouterSpec(num_experts=one.num_experts, top_k=top_k)
    for tokens in token_counts:
        problem = one.of_rows(tokens, top_k)
        x_TD = torch.randn(tokens, one.hidden_size, dtype=one.dtype, device=weights.gate_EFD.device)
        logits_TE = torch.randn(tokens, one.num_experts, device=x_TD.device)
        best, least = None, math.inf
        for variant in variants(ExpertsCall):
            if variant.refuses(problem, planner.device) is not None:
                continue
            for ranked in variant.tilings(problem, planner.device, candidates):
                rows = variant.table_rows({part: configs[0] for part, configs in ranked.items()})
                routing, launches = planner.plan(RouteCall(logits_TE, spec, rows, ticket))
                for launch in launches:
                    launch.run()
                call = ExpertsCall(x_TD, weights, routing, activation, ticket)
                choice, seconds = tune_call(variant, call, ranked, planner, measure)
                if seconds < least:
                    best, least = choice, seconds
        if best is not None:
            planner.keep(ExpertsCall, problem, best)


def tune_call(
    variant: OpVariant, call: ExpertsCall, ranked: Ranked, planner: Planner, measure: Measure
) -> tuple[Choice, float]:
    """The fastest configuration of each tuned kernel, and the seconds of all launches together."""
    tilings = {part: configs[0] for part, configs in ranked.items()}

    def seconds_of(part: str, config: Any) -> float:
        planned = variant.plan(call, {**tilings, part: config}, planner.device)[1]
        return measure([launch for launch in planned if launch.part == part])

    total = 0.0
    for part, configs in ranked.items():
        tilings[part], seconds = refine(configs, lambda config, part=part: seconds_of(part, config))
        total += seconds
    rest = [launch for launch in variant.plan(call, tilings, planner.device)[1] if launch.part not in ranked]
    return Choice(variant, tilings), total + (measure(rest) if rest else 0.0)
