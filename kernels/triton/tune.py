"""Measuring variants and their configurations on the device, and keeping the winners."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..api.router_spec import RouterSpec
from ..torch.experts import PlainExperts
from ..torch.quantized import QuantExperts, QuantLinear
from .experts import ExpertsCall
from .launch import Launch
from .quantized_layers import LinearCall, QuantExpertsCall
from .router import RouteCall
from .tuning import refine
from .variants import Call, Choice, OpVariant, Planner, Ranked, variants

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
    weights: PlainExperts | QuantExperts,
    top_k: int,
    activation: str,
    token_counts: Sequence[int],
    ticket: torch.Tensor,
    measure: Measure = measure_on_gpu,
    candidates: int = 8,
    dtype: torch.dtype | None = None,
) -> None:
    """Measure every variant's best candidates for random rows and keep the winner in ``planner.measured``.

    Arguments:
        weights: of a real layer, on the device.
        token_counts: powers of two; each is tuned on its own.
        candidates: how many tilings to try per product and row tile.
        dtype: of the rows; None: that of the weights, which must be floating then.

    Raises:
        RuntimeError: when no candidate of a product runs.
    """
    num_experts, _, hidden_size = weights.gate_EFD.shape
    if dtype is None:
        assert isinstance(weights, PlainExperts), "quantised weights do not say which rows they meet"
        dtype = weights.gate_EFD.dtype
    spec = RouterSpec(num_experts=num_experts, top_k=top_k)
    for tokens in token_counts:
        x_TD = torch.randn(tokens, hidden_size, device=ticket.device).to(dtype)
        logits_TE = torch.randn(tokens, num_experts, device=ticket.device)

        def call_of(rows: int | None, x_TD: torch.Tensor = x_TD, logits_TE: torch.Tensor = logits_TE) -> Call:
            routing, launches = planner.plan(RouteCall(logits_TE, spec, rows, ticket))
            for launch in launches:
                launch.run()
            if isinstance(weights, QuantExperts):
                return QuantExpertsCall.of(x_TD, weights, routing, activation, ticket)
            return ExpertsCall(x_TD, weights, routing, activation, ticket)

        _tune(planner, call_of, measure, candidates)


def tune_linear(
    planner: Planner,
    linear: QuantLinear,
    row_counts: Sequence[int],
    dtype: torch.dtype,
    measure: Measure = measure_on_gpu,
    candidates: int = 8,
) -> None:
    """As :func:`tune_experts`, for a product with a quantised weight that is on the device, and rows of ``dtype``."""
    for rows in row_counts:
        x_TI = torch.randn(rows, linear.weight.in_features, device=linear.weight.data.device).to(dtype)
        call = LinearCall.of(x_TI, linear, dtype)
        _tune(planner, lambda _, call=call: call, measure, candidates)


def _tune(planner: Planner, call_of: Callable[[int | None], Call], measure: Measure, candidates: int) -> None:
    """Keep the fastest variant and tilings of a call.

    Arguments:
        call_of: the call, with tables for tiles of so many rows; None: without.
    """
    some = call_of(None)
    operation, problem, best, least = type(some), some.problem(), None, math.inf
    for variant in variants(operation):
        if variant.refuses(problem, planner.device) is not None:
            continue
        for ranked in variant.tilings(problem, planner.device, candidates):
            rows = variant.table_rows({part: configs[0] for part, configs in ranked.items()})
            choice, seconds = tune_call(variant, call_of(rows), ranked, planner, measure)
            if seconds < least:
                best, least = choice, seconds
    if best is not None:
        planner.keep(operation, problem, best)


def tune_call(
    variant: OpVariant, call: Call, ranked: Ranked, planner: Planner, measure: Measure
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
