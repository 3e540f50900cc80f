"""A whole mixture as a list of launches: which path, which configurations, which buffers.

Every choice depends on the power of two above the number of tokens, so that a warm-up can compile all of them.
"""

from __future__ import annotations

import torch

from ..api.types import Routing
from ..torch.experts import PlainExperts
from .combine import plan_combine
from .device import DeviceProperties
from .gemv import GemvConfig, plan_pair_down, plan_pair_gate_up
from .grouped_gemm import GemmConfig, describable, plan_down, plan_gate_up
from .index import ExpertIndex, plan_index
from .launch import Launch
from .tuning import (
    ExpertShape,
    GemmProblem,
    PathChoice,
    TuningCache,
    best_gemms,
    best_gemv,
    experts_hit,
    prefers_pairs,
    row_tile,
    token_bucket,
)

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


class ExpertPlanner:
    """Chooses configurations for a device: measured ones where the cache has them, else the cost model's."""

    def __init__(self, device: DeviceProperties, measured: TuningCache) -> None:
        self.device = device
        self.measured = measured
        self._chosen: dict[tuple, object] = {}

    def path(self, num_tokens: int, shape: ExpertShape) -> PathChoice:
        """Whether so many tokens take the matrix-vector path, which needs no tables, or else the rows per tile."""
        tokens = token_bucket(num_tokens)
        key = ("path", tokens, shape)
        if key not in self._chosen:
            self._chosen[key] = self.measured.get(self.key("path", tokens, shape), PathChoice) or PathChoice(
                pairs=prefers_pairs(tokens, shape, self.device),
                block_m=row_tile(tokens, shape.num_experts, shape.top_k),
            )
        return self._chosen[key]  # type: ignore[return-value]

    def gemm_problems(self, num_tokens: int, shape: ExpertShape, block_m: int) -> tuple[GemmProblem, GemmProblem]:
        """The two products of a layer as the cost model sees them."""
        tokens = token_bucket(num_tokens)
        slots, hit = tokens * shape.top_k, experts_hit(tokens, shape.num_experts, shape.top_k)
        d, f, size = shape.hidden_size, shape.expert_size, int(shape.weight_bytes)
        return (
            GemmProblem(slots=slots, hit=hit, n=f, k=d, matrices=2, block_m=block_m, element_bytes=size),
            GemmProblem(slots=slots, hit=hit, n=d, k=f, matrices=1, block_m=block_m, element_bytes=size),
        )

    def key(self, part: str, num_tokens: int, shape: ExpertShape, *more: object) -> str:
        """Name of a measurement in the cache."""
        numbers = (shape.num_experts, shape.top_k, shape.hidden_size, shape.expert_size, shape.weight_bytes)
        return "/".join(str(v) for v in (part, token_bucket(num_tokens), *numbers, *more))

    def gemms(
        self, num_tokens: int, shape: ExpertShape, block_m: int, tma_possible: bool
    ) -> tuple[GemmConfig, GemmConfig]:
        """Configurations of gate-and-up and of down."""
        key = ("gemms", token_bucket(num_tokens), shape, block_m, tma_possible)
        if key not in self._chosen:
            pair = []
            problems = self.gemm_problems(num_tokens, shape, block_m)
            for part, problem in zip(("gate_up", "down"), problems, strict=True):
                found = self.measured.get(self.key(part, num_tokens, shape, block_m, tma_possible), GemmConfig)
                pair.append(found or best_gemms(problem, self.device, tma_possible)[0])
            self._chosen[key] = tuple(pair)
        return self._chosen[key]  # type: ignore[return-value]

    def gemvs(self, num_tokens: int, shape: ExpertShape) -> tuple[GemvConfig, GemvConfig]:
        """Configurations of the matrix-vector path."""
        tokens = token_bucket(num_tokens)
        key = ("gemvs", tokens, shape)
        if key not in self._chosen:
            d, f = shape.hidden_size, shape.expert_size
            defaults = (
                best_gemv(f, d, tokens * shape.top_k, 2, self.device),
                best_gemv(d, f, tokens, 1, self.device, together=shape.top_k),
            )
            pair = (
                self.measured.get(self.key(part, num_tokens, shape), GemvConfig) or default
                for part, default in zip(("pair_gate_up", "pair_down"), defaults, strict=True)
            )
            self._chosen[key] = tuple(pair)
        return self._chosen[key]  # type: ignore[return-value]

    def forget(self) -> None:
        """Look into the cache of measurements again."""
        self._chosen.clear()


def shape_of(weights: PlainExperts, top_k: int) -> ExpertShape:
    """The shape that configurations are looked up by."""
    num_experts, expert_size, hidden_size = weights.gate_EFD.shape
    size = weights.gate_EFD.element_size()
    return ExpertShape(
        num_experts=num_experts, top_k=top_k, hidden_size=hidden_size, expert_size=expert_size, weight_bytes=size
    )


def tma_possible(weights: PlainExperts) -> bool:
    """Whether the weights, and rows as wide as theirs, can be addressed by tensor descriptors."""
    rows_aligned = weights.gate_EFD.shape[1] * weights.gate_EFD.element_size() % 16 == 0
    return rows_aligned and all(describable(t) for t in (weights.gate_EFD, weights.up_EFD, weights.down_EDF))


def plan_experts(
    x_TD: torch.Tensor,
    weights: PlainExperts,
    routing: Routing,
    activation: str,
    out_TD: torch.Tensor,
    planner: ExpertPlanner,
    ticket: torch.Tensor,
) -> list[Launch]:
    """The launches of a mixture; together they write every element of ``out_TD``.

    Few tokens: two launches. More: tables if the routing brings none, two grouped GEMMs, the combining sum.
    """
    num_tokens, top_k = routing.expert_ids_TK.shape
    shape = shape_of(weights, top_k)
    h_XF = x_TD.new_empty(num_tokens * top_k, shape.expert_size)
    if planner.path(num_tokens, shape).pairs:
        first, second = planner.gemvs(num_tokens, shape)
        return [
            plan_pair_gate_up(
                x_TD,
                weights.gate_EFD,
                weights.up_EFD,
                weights.gate_bias_EF,
                weights.up_bias_EF,
                routing,
                h_XF,
                activation,
                first,
            ),
            plan_pair_down(x_TD, h_XF, weights.down_EDF, weights.down_bias_ED, routing, out_TD, second),
        ]
    index, launches = usable_index(routing, shape, planner, ticket)
    first, second = planner.gemms(num_tokens, shape, index.block_m, tma_possible(weights))
    y_XD = x_TD.new_empty(num_tokens * top_k, shape.hidden_size)
    gate_up = plan_gate_up(
        x_TD,
        weights.gate_EFD,
        weights.up_EFD,
        weights.gate_bias_EF,
        weights.up_bias_EF,
        routing.weights_TK,
        h_XF,
        index,
        activation,
        routing.weight_on_input,
        first,
    )
    down = plan_down(
        h_XF,
        weights.down_EDF,
        weights.down_bias_ED,
        routing.weights_TK,
        y_XD,
        index,
        routing.weight_on_input,
        second,
    )
    return [*launches, gate_up, down, plan_combine(y_XD, x_TD, routing, out_TD)]


def usable_index(
    routing: Routing, shape: ExpertShape, planner: ExpertPlanner, ticket: torch.Tensor
) -> tuple[ExpertIndex, list[Launch]]:
    """The routing's own tables, or new ones when it has none or its tensors were replaced since."""
    index = routing.index
    if isinstance(index, ExpertIndex) and index.matches(routing, shape.num_experts):
        return index, []
    path = planner.path(routing.expert_ids_TK.shape[0], shape)
    return plan_index(routing, shape.num_experts, path.block_m, ticket)
