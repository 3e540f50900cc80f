"""A mixture of experts as launches: over (token, expert) pairs for few rows, over tiles of rows for many.

Every choice depends on the power of two above the number of tokens, so that a warm-up can compile all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ..api.types import Routing
from ..reference.operations import CLAMPED_SWIGLU
from ..torch.experts import PlainExperts
from .combine import combine_kernel, plan_combine
from .device import DeviceProperties
from .gemv import GemvConfig, pair_down_kernel, pair_gate_up_kernel
from .grouped_gemm import GemmConfig, describable, down_kernel, gate_up_kernel, grouped_launch, operand
from .index import index_kernels, index_tables, usable_index
from .launch import Launch, cdiv, next_power_of_2, require_contiguous
from .shapes import Steps, WarmUpShape, meta
from .tuning import GemmProblem, best_gemms, best_gemv, experts_hit, row_tile
from .variants import Call, NoKernelError, OpVariant, Planned, Planner, Ranked, Tilings, has_tensor_cores, register

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", CLAMPED_SWIGLU)
_LAUNCH = 2.0e-6  # seconds that one more launch costs inside a graph
_MOST_PAIRS = 256
_MOST_UNROLLED = 32
_GEMVS = (
    (1, 1024, 2), (2, 1024, 2), (4, 1024, 4), (2, 2048, 4), (4, 512, 2), (8, 512, 4), (1, 512, 1), (4, 256, 1),
    (8, 256, 2), (16, 256, 4), (8, 128, 1), (16, 128, 2),
)  # fmt: skip


class ExpertProblem(NamedTuple):
    """Sizes of a mixture; ``tokens`` is a power of two.

    Arguments:
        tma: the weights, and rows as wide as theirs, can be addressed by tensor descriptors.
        strided: the rows of a weight are not contiguous.
    """

    tokens: int
    num_experts: int
    top_k: int
    hidden_size: int
    expert_size: int
    activation: str = "silu"
    dtype: torch.dtype = torch.bfloat16
    weight_dtype: torch.dtype = torch.bfloat16
    tma: bool = True
    strided: bool = False

    @classmethod
    def of(cls, weights: PlainExperts, activation: str, dtype: torch.dtype) -> ExpertProblem:
        """The problem of one token and one expert per token."""
        num_experts, expert_size, hidden_size = weights.gate_EFD.shape
        tma = expert_size * weights.gate_EFD.element_size() % 16 == 0 and all(describable(t) for t in weights.weights)
        strided = any(t.stride(-1) != 1 for t in weights.weights)
        sizes = (1, num_experts, 1, hidden_size, expert_size)
        return cls(*sizes, activation, dtype, weights.gate_EFD.dtype, tma, strided)

    def of_rows(self, num_tokens: int, top_k: int) -> ExpertProblem:
        """The same mixture for other rows."""
        return self._replace(tokens=next_power_of_2(num_tokens), top_k=top_k)

    @property
    def hit(self) -> float:
        """Expected number of experts that any row chooses."""
        return experts_hit(self.tokens, self.num_experts, self.top_k)

    def read_seconds(self, experts: float, device: DeviceProperties) -> float:
        """Time to read the weights of so many experts at the full bandwidth."""
        size = self.hidden_size * self.expert_size * self.weight_dtype.itemsize
        return 3 * experts * size / device.bandwidth

    def products(self, block_m: int) -> tuple[GemmProblem, GemmProblem]:
        """Gate-and-up and down as the cost model sees them."""
        d, f, size = self.hidden_size, self.expert_size, self.weight_dtype.itemsize
        first = GemmProblem(
            slots=self.tokens * self.top_k, hit=self.hit, n=f, k=d, matrices=2, block_m=block_m, element_bytes=size,
            weight_bytes=size,
        )  # fmt: skip
        return first, replace(first, n=d, k=f, matrices=1)


@dataclass(frozen=True)
class ExpertsCall(Call[torch.Tensor]):
    """The weighted sum of each row's experts, (T, D).

    Arguments:
        ticket: as in :func:`index.plan_index`.
    """

    operation = "experts"

    x_TD: torch.Tensor
    weights: PlainExperts
    routing: Routing
    activation: str
    ticket: torch.Tensor

    def problem(self) -> ExpertProblem:
        one = ExpertProblem.of(self.weights, self.activation, self.x_TD.dtype)
        return one.of_rows(*self.routing.expert_ids_TK.shape)

    @classmethod
    def of_layer(cls, layer: WarmUpShape, steps: Steps, dtype: torch.dtype, planner: Planner) -> Iterator[ExpertsCall]:
        if layer.router is None:
            return
        weights, spec = layer_experts(layer, dtype), layer.router
        top_k, ticket = spec.top_k + layer.always_on, meta(1, dtype=torch.int32)
        zero_experts = bool(spec.zero_experts) and not layer.always_on
        for tokens in steps.tokens:
            ids_TK, counts_T = meta(tokens, top_k, dtype=torch.int32), meta(tokens, dtype=torch.int32)
            rows = routed_rows(layer, tokens, dtype, planner)
            routing = Routing(
                expert_ids_TK=ids_TK,
                weights_TK=meta(tokens, top_k),
                counts_T=counts_T if zero_experts else None,
                identity_weights_T=meta(tokens) if zero_experts else None,
                weight_on_input=spec.weight_on_input and not layer.always_on,
            )
            if rows is not None:
                index = index_tables(ids_TK, routing.counts_T, spec.num_real_experts, rows, ticket).index
                routing = replace(routing, index=index)
            # An expert budget replaces the counts of a routing, which then needs tables of its own.
            fewer = replace(routing, counts_T=torch.empty_like(counts_T))
            x_TD = meta(tokens, layer.hidden_size, dtype=dtype)
            for case in (routing, fewer):
                yield cls(x_TD, weights, case, layer.activation, ticket)


def layer_experts(layer: WarmUpShape, dtype: torch.dtype) -> PlainExperts:
    """Weights of a layer without storage."""
    assert layer.router is not None, "the layer has no mixture"
    e, f, d = layer.router.num_real_experts + layer.always_on, layer.expert_size, layer.hidden_size
    biases = [meta(e, n, dtype=dtype) for n in (f, f, d)] if layer.biased else (None, None, None)
    return PlainExperts(meta(e, f, d, dtype=dtype), meta(e, f, d, dtype=dtype), meta(e, d, f, dtype=dtype), *biases)


def table_rows(planner: Planner, problem: tuple, call: type[Call[Any]] = ExpertsCall) -> int | None:
    """Rows per tile of the tables that routing should build along the way; None: the experts will read none."""
    try:
        return planner.choice(call, problem).table_rows
    except NoKernelError:
        return None


def routed_rows(layer: WarmUpShape, tokens: int, dtype: torch.dtype, planner: Planner) -> int | None:
    """:func:`table_rows` of a layer whose routing goes to its experts as it is."""
    if layer.router is None or layer.always_on:
        return None
    one = ExpertProblem.of(layer_experts(layer, dtype), layer.activation, dtype)
    return table_rows(planner, one.of_rows(tokens, layer.router.top_k))


class PlainVariant(OpVariant[ExpertsCall, ExpertProblem]):
    """What variants for weights of floating-point numbers have in common."""

    call = ExpertsCall

    def refuses(self, problem: ExpertProblem, device: DeviceProperties) -> str | None:
        if problem.activation not in ACTIVATIONS:
            return f"activation {problem.activation!r}"
        if problem.weight_dtype != problem.dtype:
            return f"{problem.dtype} rows with {problem.weight_dtype} weights"
        if not has_tensor_cores(problem.dtype):
            return f"experts in {problem.dtype}"
        return "expert weights with strided rows" if problem.strided else None

    def outputs(self, call: ExpertsCall) -> torch.Tensor:
        """The result, for rows that kernels can walk."""
        routing = call.routing
        require_contiguous(
            x_TD=call.x_TD,
            expert_ids_TK=routing.expert_ids_TK,
            weights_TK=routing.weights_TK,
            counts_T=routing.counts_T,
            identity_weights_T=routing.identity_weights_T,
        )
        return torch.empty_like(call.x_TD)


@register
class Tiles(PlainVariant):
    """Tables if the routing brings none, two grouped GEMMs, the combining sum: reads every chosen expert once."""

    name = "tiles"
    kernels = (gate_up_kernel, down_kernel, combine_kernel, *index_kernels)
    products = (gate_up_kernel, down_kernel)

    def seconds(self, problem: ExpertProblem, device: DeviceProperties) -> float:
        return problem.read_seconds(problem.hit, device) / 0.80 + 2 * _LAUNCH

    def tilings(self, problem: ExpertProblem, device: DeviceProperties, count: int) -> list[Ranked]:
        guess = row_tile(problem.tokens, problem.num_experts, problem.top_k)
        rows = dict.fromkeys((guess, max(16, guess // 2), min(128, guess * 2)) if count > 1 else (guess,))
        found = []
        for block_m in rows:
            first, second = (best_gemms(p, device, problem.tma, count) for p in problem.products(block_m))
            found.append({"gate_up": first, "down": second})
        return found

    def table_rows(self, tilings: Tilings) -> int:
        return tilings["gate_up"].block_m

    def plan(self, call: ExpertsCall, tilings: Tilings, device: DeviceProperties) -> Planned[torch.Tensor]:
        x_TD, weights, routing = call.x_TD, call.weights, call.routing
        first, second = tilings["gate_up"], tilings["down"]
        out_TD = self.outputs(call)
        num_experts, expert_size, hidden_size = weights.gate_EFD.shape
        slots = routing.expert_ids_TK.numel()
        h_XF, y_XD = x_TD.new_empty(slots, expert_size), x_TD.new_empty(slots, hidden_size)
        index, launches = usable_index(routing, num_experts, first.block_m, call.ticket)
        block = [1, first.block_n, first.block_k]
        gate_up_args = {
            **_gate_up_arguments(call, h_XF),
            "gate": operand(weights.gate_EFD, first, block),
            "up": operand(weights.up_EFD, first, block),
            "stride_x": x_TD.stride(0),
        }
        down_args = {
            **_down_arguments(call),
            "h": operand(h_XF, second, [second.block_m, second.block_k]),
            "down": operand(weights.down_EDF, second, [1, second.block_n, second.block_k]),
            "y_ptr": y_XD,
            "expert_size": expert_size,
        }
        gate_up_constexprs = _gate_up_constexprs(call, first)
        down_constexprs = _tiling(routing, second, hidden_size, expert_size)
        launches += [
            grouped_launch(gate_up_kernel, first, index, expert_size, gate_up_args, gate_up_constexprs),
            grouped_launch(down_kernel, second, index, hidden_size, down_args, down_constexprs),
            plan_combine(y_XD, x_TD, routing, out_TD),
        ]
        return out_TD, launches


@register
class Pairs(PlainVariant):
    """Two matrix-vector launches without tables: reads weights once per (token, expert) pair, in long rows."""

    name = "pairs"
    kernels = (pair_gate_up_kernel, pair_down_kernel)

    def refuses(self, problem: ExpertProblem, device: DeviceProperties) -> str | None:
        if problem.tokens * problem.top_k > _MOST_PAIRS:
            return f"more than {_MOST_PAIRS} pairs"
        return super().refuses(problem, device)

    def seconds(self, problem: ExpertProblem, device: DeviceProperties) -> float:
        if problem.tokens > 16:
            return math.inf
        return problem.read_seconds(problem.tokens * problem.top_k, device) / 0.90

    def tilings(self, problem: ExpertProblem, device: DeviceProperties, count: int) -> list[Ranked]:
        tokens, top_k, d, f = problem.tokens, problem.top_k, problem.hidden_size, problem.expert_size
        first = best_gemv(f, d, tokens * top_k, 2, device)
        second = best_gemv(d, f, tokens, 1, device, together=top_k)
        more = [GemvConfig(block_n=n, block_k=k, num_warps=w) for n, k, w in _GEMVS] if count > 1 else []
        return [{"pair_gate_up": [first, *more], "pair_down": [second, *more]}]

    def plan(self, call: ExpertsCall, tilings: Tilings, device: DeviceProperties) -> Planned[torch.Tensor]:
        x_TD, weights, routing = call.x_TD, call.weights, call.routing
        first, second = tilings["pair_gate_up"], tilings["pair_down"]
        out_TD = self.outputs(call)
        _, expert_size, hidden_size = weights.gate_EFD.shape
        slots, top_k = routing.expert_ids_TK.numel(), routing.expert_ids_TK.shape[1]
        h_XF = x_TD.new_empty(slots, expert_size)
        chosen = {"ids_ptr": routing.expert_ids_TK, "used_counts_ptr": routing.counts_T}
        gate_up = Launch(
            kernel=pair_gate_up_kernel,
            grid=(slots, cdiv(expert_size, first.block_n)),
            args={**_gate_up_arguments(call, h_XF), **chosen},
            constexprs=_gate_up_constexprs(call, first),
            num_warps=first.num_warps,
            num_stages=first.num_stages,
        )
        tiling = _tiling(routing, second, hidden_size, expert_size)
        down = Launch(
            kernel=pair_down_kernel,
            grid=(x_TD.shape[0], cdiv(hidden_size, second.block_n)),
            args={
                **_down_arguments(call),
                **chosen,
                "h_ptr": h_XF,
                "identity_ptr": routing.identity_weights_T,
                "x_ptr": x_TD,
                "out_ptr": out_TD,
            },
            constexprs={
                **tiling,
                "K": top_k,
                "F": expert_size,
                "UNROLL": top_k * cdiv(expert_size, second.block_k) <= _MOST_UNROLLED,
                "EVEN_N": tiling["EVEN_N"] and routing.counts_T is None,
            },
            num_warps=second.num_warps,
            num_stages=second.num_stages,
        )
        return out_TD, [gate_up, down]


def _gate_up_arguments(call: ExpertsCall, h_XF: torch.Tensor) -> dict[str, Any]:
    """Of both kernels that fill ``h_XF``: slots in expert order or as they are; unused ones stay as they are."""
    weights = call.weights
    _, expert_size, hidden_size = weights.gate_EFD.shape
    return {
        "x_ptr": call.x_TD,
        "gate": weights.gate_EFD,
        "up": weights.up_EFD,
        "gate_bias_ptr": weights.gate_bias_EF,
        "up_bias_ptr": weights.up_bias_EF,
        "weights_ptr": call.routing.weights_TK,
        "h_ptr": h_XF,
        "hidden_size": hidden_size,
        "expert_size": expert_size,
        "gate_stride_e": weights.gate_EFD.stride(0),
        "gate_stride_n": weights.gate_EFD.stride(1),
        "up_stride_e": weights.up_EFD.stride(0),
        "up_stride_n": weights.up_EFD.stride(1),
    }


def _gate_up_constexprs(call: ExpertsCall, config: GemmConfig | GemvConfig) -> dict[str, Any]:
    _, expert_size, hidden_size = call.weights.gate_EFD.shape
    tiling = _tiling(call.routing, config, expert_size, hidden_size)
    return {**tiling, "K": call.routing.expert_ids_TK.shape[1], "ACTIVATION": call.activation}


def _down_arguments(call: ExpertsCall) -> dict[str, Any]:
    down_EDF = call.weights.down_EDF
    return {
        "down": down_EDF,
        "down_bias_ptr": call.weights.down_bias_ED,
        "weights_ptr": call.routing.weights_TK,
        "hidden_size": down_EDF.shape[1],
        "down_stride_e": down_EDF.stride(0),
        "down_stride_n": down_EDF.stride(1),
    }


def _tiling(routing: Routing, config: GemmConfig | GemvConfig, n_size: int, k_size: int) -> dict[str, Any]:
    return {
        "WEIGHT_ON_INPUT": routing.weight_on_input,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "EVEN_N": n_size % config.block_n == 0,
        "EVEN_K": k_size % config.block_k == 0,
    }
