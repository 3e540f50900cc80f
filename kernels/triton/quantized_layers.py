"""Layers with quantised weights as operations: dense ones, and mixtures of experts over tiles of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..api.formats import ActivationScheme
from ..api.types import Routing
from ..torch.quantized import QuantExperts, QuantLinear
from .combine import combine_kernel, plan_combine
from .device import DeviceProperties
from .experts import ACTIVATIONS
from .index import index_kernels, usable_index
from .launch import cdiv, next_power_of_2
from .quant_tilings import QuantGemm, quant_tilings, row_tile
from .quantized import plan_quant, quant_kernels
from .rounding import plan_rows, round_rows_kernel
from .stored_weight import StoredWeight, WeightKind, store_weight
from .tuning import experts_hit
from .variants import Call, OpVariant, Planned, Ranked, Tilings, has_tensor_cores, register


class LinearProblem(NamedTuple):
    """A product; ``rows`` is a power of two."""

    rows: int
    out_features: int
    in_features: int
    kind: WeightKind
    scheme: ActivationScheme
    dtype: torch.dtype


@dataclass(frozen=True)
class LinearCall(Call[torch.Tensor]):
    """The product with a quantised weight, in ``dtype``, (T, O)."""

    operation = "quantised linear"

    x_TI: torch.Tensor
    weight: StoredWeight
    bias_O: torch.Tensor | None
    scheme: ActivationScheme
    dtype: torch.dtype

    @classmethod
    def of(cls, x_TI: torch.Tensor, linear: QuantLinear, dtype: torch.dtype) -> LinearCall:
        return cls(x_TI, store_weight(linear.weight), linear.bias_O, linear.scheme, dtype)

    def problem(self) -> LinearProblem:
        rows, weight = next_power_of_2(self.x_TI.shape[0]), self.weight
        return LinearProblem(rows, weight.outputs, weight.inputs, weight.kind, self.scheme, self.x_TI.dtype)


@register
class QuantProduct(OpVariant[LinearCall, LinearProblem]):
    """Rounds the rows where the scheme asks for it, then multiplies."""

    call, name = LinearCall, "tiles"
    kernels, products = (*quant_kernels, round_rows_kernel), quant_kernels[:1]

    def refuses(self, problem: LinearProblem, device: DeviceProperties) -> str | None:
        return None if has_tensor_cores(problem.dtype) else f"quantised weights in {problem.dtype}"

    def tilings(self, problem: LinearProblem, device: DeviceProperties, count: int) -> list[Ranked]:
        guess = row_tile(problem.rows)
        gemm = QuantGemm(
            slots=problem.rows,
            hit=1,
            n=problem.out_features,
            k=problem.in_features,
            matrices=1,
            block_m=guess,
            element_bytes=1 if problem.scheme.kind != "none" else problem.dtype.itemsize,
            weight_bytes=problem.kind.bytes,
            kind=problem.kind,
            scheme=problem.scheme,
        )
        rows = dict.fromkeys((guess, 32, 128) if count > 1 and problem.rows > 16 else (guess,))
        return [{"linear": quant_tilings(replace(gemm, block_m=block_m), device, count)} for block_m in rows]

    def plan(self, call: LinearCall, tilings: Tilings, device: DeviceProperties) -> Planned[torch.Tensor]:
        x_TI, weight = call.x_TI, call.weight
        out_TO = torch.empty(x_TI.shape[0], weight.outputs, dtype=call.dtype, device=x_TI.device)
        x, launches = plan_rows(x_TI, call.scheme)
        config = tilings["linear"]
        launches += plan_quant(x, weight, call.bias_O, out_TO, config, "linear", native_fp8=device.has_fp8)
        return out_TO, launches


class QuantProblem(NamedTuple):
    """Sizes of a mixture; ``tokens`` is a power of two, ``kinds`` are those of gate, up and down."""

    tokens: int
    num_experts: int
    top_k: int
    hidden_size: int
    expert_size: int
    activation: str
    dtype: torch.dtype
    kinds: tuple[WeightKind, ...]
    scheme: ActivationScheme

    @classmethod
    def of(cls, experts: QuantExperts, activation: str, dtype: torch.dtype) -> QuantProblem:
        """The problem of one token and one expert per token.

        Raises:
            NoKernelError: for a format without a kernel.
        """
        kinds = tuple(store_weight(weight).kind for weight in experts.weights)
        num_experts, expert_size, hidden_size = experts.gate_EFD.shape
        return cls(1, num_experts, 1, hidden_size, expert_size, activation, dtype, kinds, experts.scheme)

    def of_rows(self, num_tokens: int, top_k: int) -> QuantProblem:
        """The same mixture for other rows."""
        return self._replace(tokens=next_power_of_2(num_tokens), top_k=top_k)

    def products(self, block_m: int) -> tuple[QuantGemm, QuantGemm]:
        """Gate-and-up and down as the tilings' rule and the cost model see them."""
        (gate, _, down), d, f = self.kinds, self.hidden_size, self.expert_size
        first = QuantGemm(
            slots=self.tokens * self.top_k,
            hit=experts_hit(self.tokens, self.num_experts, self.top_k),
            n=f,
            k=d,
            matrices=2,
            block_m=block_m,
            element_bytes=1 if self.scheme.kind != "none" else self.dtype.itemsize,
            weight_bytes=gate.bytes,
            kind=gate,
            scheme=self.scheme,
        )
        return first, replace(first, n=d, k=f, matrices=1, kind=down, weight_bytes=down.bytes)


@dataclass(frozen=True)
class QuantExpertsCall(Call[torch.Tensor]):
    """As :class:`ExpertsCall`, with quantised weights."""

    operation = "quantised experts"

    x_TD: torch.Tensor
    gate: StoredWeight
    up: StoredWeight
    down: StoredWeight
    biases: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
    scheme: ActivationScheme
    routing: Routing
    activation: str
    ticket: torch.Tensor

    @classmethod
    def of(
        cls, x_TD: torch.Tensor, experts: QuantExperts, routing: Routing, activation: str, ticket: torch.Tensor
    ) -> QuantExpertsCall:
        gate, up, down = (store_weight(weight) for weight in experts.weights)
        return cls(x_TD, gate, up, down, experts.biases, experts.scheme, routing, activation, ticket)

    def problem(self) -> QuantProblem:
        tokens, top_k = self.routing.expert_ids_TK.shape
        return QuantProblem(
            tokens=next_power_of_2(tokens),
            num_experts=self.gate.codes.shape[0],
            top_k=top_k,
            hidden_size=self.gate.inputs,
            expert_size=self.gate.outputs,
            activation=self.activation,
            dtype=self.x_TD.dtype,
            kinds=tuple(weight.kind for weight in (self.gate, self.up, self.down)),
            scheme=self.scheme,
        )


@register
class QuantTiles(OpVariant[QuantExpertsCall, QuantProblem]):
    """Tables if the routing brings none, two grouped products, the combining sum.

    What enters the down projection is rounded from the model's dtype, where the oracle keeps float32 so far.
    """

    call, name = QuantExpertsCall, "tiles"
    kernels = (*quant_kernels, round_rows_kernel, combine_kernel, *index_kernels)
    products = quant_kernels[:1]

    def refuses(self, problem: QuantProblem, device: DeviceProperties) -> str | None:
        if not has_tensor_cores(problem.dtype):
            return f"quantised weights in {problem.dtype}"
        if problem.activation not in ACTIVATIONS:
            return f"activation {problem.activation!r}"
        return "gate and up in different formats" if problem.kinds[0] != problem.kinds[1] else None

    def tilings(self, problem: QuantProblem, device: DeviceProperties, count: int) -> list[Ranked]:
        guess = row_tile(cdiv(problem.tokens * problem.top_k, problem.num_experts))
        rows = dict.fromkeys((guess, 32, 128) if count > 1 and problem.tokens > 16 else (guess,))
        return [
            {
                part: quant_tilings(gemm, device, count)
                for part, gemm in zip(("gate_up", "down"), problem.products(block_m), strict=True)
            }
            for block_m in rows
        ]

    def table_rows(self, tilings: Tilings) -> int:
        return tilings["gate_up"].block_m

    def plan(self, call: QuantExpertsCall, tilings: Tilings, device: DeviceProperties) -> Planned[torch.Tensor]:
        x_TD, routing = call.x_TD, call.routing
        first, second = tilings["gate_up"], tilings["down"]
        gate_bias_EF, up_bias_EF, down_bias_ED = call.biases
        top_k, slots, on_input = routing.expert_ids_TK.shape[1], routing.expert_ids_TK.numel(), routing.weight_on_input
        index, launches = usable_index(routing, call.gate.codes.shape[0], first.block_m, call.ticket)
        out_TD = torch.empty_like(x_TD)
        h_XF, y_XD = x_TD.new_empty(slots, call.gate.outputs), x_TD.new_empty(slots, call.down.outputs)
        x, rounding = plan_rows(x_TD, call.scheme)
        h, hidden_rounding = plan_rows(h_XF, call.scheme)
        gate_up = plan_quant(
            x,
            call.gate,
            gate_bias_EF,
            h_XF,
            first,
            "gate_up",
            up=call.up,
            up_bias=up_bias_EF,
            weights_TK=routing.weights_TK if on_input else None,
            index=index,
            top_k=top_k,
            gather=True,
            activation=call.activation,
            native_fp8=device.has_fp8,
        )
        down = plan_quant(
            h,
            call.down,
            down_bias_ED,
            y_XD,
            second,
            "down",
            weights_TK=None if on_input else routing.weights_TK,
            index=index,
            native_fp8=device.has_fp8,
        )
        launches += [*rounding, *gate_up, *hidden_rounding, *down, plan_combine(y_XD, x_TD, routing, out_TD)]
        return out_TD, launches
