"""The backend made of our own C++ kernels (``kernels/cpu``): packed weights, fused experts, paged attention.

A row's result is bitwise the same whatever other rows are computed with it, and however a prompt is cut into chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..api.router_spec import SCORES, RouterSpec
from ..api.stack import Stack, StackBlock, StackExit, StackShape
from ..api.types import (
    AttentionBatch,
    ExitDecision,
    ExpertWeights,
    KVLayer,
    KVProjection,
    LinearWeights,
    ProbeWeights,
    Routing,
)
from ..reference.router import check_route_arguments
from ..torch.experts import PlainExperts
from ..torch.split import SplitLinear
from . import build as cpu_build
from .fingerprint import fingerprint
from .latents import CpuLatentOperations
from .layout import BLOCK, join_gate_up_bias
from .quantized import CpuLinear
from .stack import CpuStack
from .stack_checks import check_stack, stack_parts
from .states import CpuStateOperations
from .vectors import CODED_CACHE


@dataclass(frozen=True)
class _Experts:
    isa: int
    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    down_bias_sum: torch.Tensor | None
    shape: tuple[int, int, int, int, int]  # experts, hidden, width, dense down, activation

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> _Experts:
        """As :meth:`PlainExperts.map`; the sum of the down projections' biases is of the experts that were there."""
        if self.shape[3]:
            raise ValueError("experts that are slices of one dense matrix stay together")
        gate_up, down = (change(part.view(self.shape[0], -1)) for part in (self.gate_up, self.down))
        first, second = (None if bias is None else change(bias) for bias in (self.gate_up_bias, self.down_bias))
        shape = (len(gate_up), *self.shape[1:])
        return _Experts(self.isa, gate_up.flatten(), down.flatten(), first, second, self.down_bias_sum, shape)

    def run(self, x_TD: torch.Tensor, routing: Routing | None) -> torch.Tensor:
        """As :meth:`CpuQuantExperts.run`."""
        ops, arguments = torch.ops.dynamoe_cpu, (self.isa, x_TD, self.gate_up, self.down, self.gate_up_bias)
        if routing is None:
            return ops.all_experts.default(*arguments, self.down_bias_sum, self.shape)
        routed = (routing.expert_ids_TK, routing.weights_TK, routing.counts_T)
        return ops.experts.default(*arguments, self.down_bias, self.shape, *routed)


class CpuBackend(CpuStateOperations, CpuLatentOperations):
    """Operations of a decoder on a CPU, float32 or bfloat16.

    Arguments:
        device: must be a CPU.
        dtype: torch.float32 or torch.bfloat16, of weights and activations.
        isa: instruction set, one of ``build.isas()``; ``auto`` takes the best this processor has.

    Raises:
        ValueError: for a device, dtype or instruction set it cannot serve.
        BuildError: the C++ kernels could not be built (see :mod:`cpu_build`).
    """

    name = "cpu"
    copies_weights = True
    kv_formats = ("auto", "int8")

    def __init__(self, device: torch.device | str, dtype: torch.dtype, isa: str = "auto") -> None:
        super().__init__(device, dtype)
        if self.device.type != "cpu":
            raise ValueError(f"the cpu backend cannot run on device {self.device}")
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"the cpu backend runs float32 and bfloat16, not {dtype}")
        cpu_build.load()
        names = cpu_build.isas()
        if isa not in ("auto", *names):
            raise ValueError(f"unknown instruction set {isa!r}; known: auto, {', '.join(names)}")
        self._ops = torch.ops.dynamoe_cpu
        self._isa: int = self._ops.find_isa(isa)
        if self._isa < 0:
            raise ValueError(f"this processor has no {isa}")
        self.isa = names[self._isa]

    def numerics(self, processor: str, coded_cache: bool) -> str:
        parts = {*self.formats, *([CODED_CACHE] if coded_cache else [])}
        return f"outputs {fingerprint(self, self.isa, parts, processor)}"

    def pack_linear(
        self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> LinearWeights:
        dtype = dtype or self.dtype
        packed = self._ops.pack_linear(self._isa, self._source(weight_OI, dtype))
        data = CpuLinear(self._isa, packed, self._padded(bias_O), weight_OI.shape[0])
        return LinearWeights.of(weight_OI.shape, dtype, data, packed, data.bias)

    def linear_tail(self, weights: LinearWeights, start: int) -> LinearWeights:
        if isinstance(weights.data, SplitLinear):
            return super().linear_tail(weights, start)
        data: CpuLinear = weights.data
        if start % BLOCK and not data.layout:  # the outputs begin inside a block
            rows = self.weight_rows(weights, torch.arange(start, data.outputs))
            return self.pack_linear(rows, None if data.bias is None else data.bias[start : data.outputs])
        return replace(weights, out_features=data.outputs - start, data=data.tail(start), nbytes=0)

    def linear(self, x_TI: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
        return weights.data.run(x_TI)

    def logits_linear(self, x_TI: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
        return weights.data.run(x_TI, float_out=True)

    def logits(
        self, x_TD: torch.Tensor, norm_D: torch.Tensor, eps: float, weights: LinearWeights, divisor: float
    ) -> torch.Tensor:
        data: CpuLinear = weights.data
        assert not data.skip, "an LM head is no tail of a layer"
        return self._ops.logits.default(
            self._isa, x_TD, norm_D, eps, data.packed, data.bias, data.layout, data.outputs, divisor
        )

    def embed(self, weights: LinearWeights, ids_T: torch.Tensor, scale: float) -> torch.Tensor:
        data: CpuLinear = weights.data
        ids_T = ids_T + data.skip if data.skip else ids_T
        shape = (data.outputs + data.skip, weights.in_features)
        return self._ops.embed.default(self._isa, data.packed, data.layout, ids_T, *shape, self.dtype, scale)

    def weight_rows(self, weights: LinearWeights, ids_T: torch.Tensor) -> torch.Tensor:
        return self.embed(weights, ids_T, 1.0).to(self.dtype)

    def _pack_experts(self, experts: PlainExperts, activation: str) -> ExpertWeights:
        number = self._activation(activation)
        num_experts, expert_size, hidden_size = experts.gate_EFD.shape
        # Slices of one dense matrix are most often used all together, and are laid out for that.
        dense_down = num_experts > 1 and experts.down_EDF.stride(0) < experts.down_EDF.stride(1)
        sources = [self._source(t) for t in (experts.gate_EFD, experts.up_EFD, experts.down_EDF)]
        gate_up, down = self._ops.pack_experts(self._isa, *sources, dense_down)
        biases = join_gate_up_bias(experts.gate_bias_EF, experts.up_bias_EF), self._padded(experts.down_bias_ED)
        down_bias_sum = None if biases[1] is None else biases[1].sum(0)
        shape = (num_experts, hidden_size, expert_size, int(dense_down), number)
        data = _Experts(self._isa, gate_up, down, *biases, down_bias_sum, shape)
        return ExpertWeights.of(experts.gate_EFD.shape, activation, self.dtype, data, gate_up, down, *biases)

    def experts(self, x_TD: torch.Tensor, weights: ExpertWeights, routing: Routing) -> torch.Tensor:
        if routing.weight_on_input or routing.identity_weights_T is not None:
            return self._unusual_experts(x_TD, weights, routing)
        return weights.data.run(x_TD, routing)

    def all_experts(self, x_TD: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
        return weights.data.run(x_TD, None)

    def _unusual_experts(self, x_TD: torch.Tensor, weights: ExpertWeights, routing: Routing) -> torch.Tensor:
        """Weights on the input, and rows that join the sum themselves, in terms of the plain operation."""
        num_rows, top_k = routing.expert_ids_TK.shape
        plain = replace(routing, weight_on_input=False, identity_weights_T=None)
        if routing.weight_on_input:
            # Every slot becomes a row of its own, for its input is its own.
            scaled_XD = (x_TD[:, None] * routing.weights_TK[..., None]).to(x_TD.dtype).flatten(0, 1)
            counts_X = None if routing.counts_T is None else routing.used_TK.flatten().int()
            ids_X1 = routing.expert_ids_TK.reshape(-1, 1)
            slots = Routing(expert_ids_TK=ids_X1, weights_TK=torch.ones(len(ids_X1), 1), counts_T=counts_X)
            out_TD = self.experts(scaled_XD, weights, slots).float().view(num_rows, top_k, -1).sum(1)
        else:
            out_TD = self.experts(x_TD, weights, plain).float()
        if routing.identity_weights_T is not None:
            out_TD = out_TD + routing.identity_weights_T[:, None] * x_TD.float()
        return out_TD.to(x_TD.dtype)

    def route(self, logits_TE: torch.Tensor, spec: RouterSpec, **inputs: torch.Tensor | None) -> Routing:
        if not spec.is_regular:
            self._fall_back("this routing rule")
            return super().route(logits_TE, spec, **inputs)
        check_route_arguments(logits_TE, spec, **inputs)
        ids_TK, weights_TK = self._ops.route.default(
            self._isa,
            logits_TE,
            spec.top_k,
            SCORES.index(spec.score),
            spec.softmax_after_topk,
            spec.renormalize,
            spec.scale,
            inputs.get("selection_bias_E"),
            inputs.get("expert_scale_E"),
            spec.num_groups,
            spec.top_groups,
            spec.group_score == "top2_sum",
            spec.norm_floor,
            spec.norm_epsilon,
        )
        return Routing(expert_ids_TK=ids_TK, weights_TK=weights_TK, weight_on_input=spec.weight_on_input)

    def _scores(self, logits_TE: torch.Tensor, spec: RouterSpec) -> torch.Tensor | None:
        # torch's own functions may differ with the number of rows.
        if spec.score == "sparsemixer" or spec.softmax_after_topk or not logits_TE.numel():
            return None
        every = self.route(
            logits_TE, RouterSpec(num_experts=spec.num_experts, top_k=spec.num_experts, score=spec.score)
        )
        return torch.empty_like(every.weights_TK).scatter_(1, every.expert_ids_TK.long(), every.weights_TK)

    def limit_experts(
        self, routing: Routing, scale_E: torch.Tensor | None, keep_T: torch.Tensor, cap_T: torch.Tensor
    ) -> Routing:
        ids_TK, weights_TK, counts_T = self._ops.limit_experts.default(
            self._isa, routing.expert_ids_TK, routing.weights_TK, routing.counts_T, scale_E, keep_T, cap_T
        )
        return replace(routing, expert_ids_TK=ids_TK, weights_TK=weights_TK, counts_T=counts_T)

    def rms_norm(self, x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        return self._ops.rms_norm.default(self._isa, x_TD, weight_D, eps)

    def add_rms_norm(
        self, x_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, scale: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._ops.add_rms_norm.default(self._isa, x_TD, residual_TD, weight_D, eps, scale), residual_TD

    def rope_and_write(
        self,
        q_THC: torch.Tensor,
        k_TGC: torch.Tensor,
        v_TGC: torch.Tensor,
        cos_sin_LC: torch.Tensor,
        batch: AttentionBatch,
        layer: KVLayer,
    ) -> torch.Tensor:
        return self._ops.rope_and_write.default(
            self._isa,
            q_THC,
            k_TGC,
            v_TGC,
            cos_sin_LC,
            batch.positions_T,
            batch.slots_T,
            layer.keys_BGPC,
            layer.values_BGPC,
        )

    def attention(
        self,
        q_THC: torch.Tensor,
        layer: KVLayer,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None = None,
        sinks_H: torch.Tensor | None = None,
        lse_TH: torch.Tensor | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        return self._ops.attention.default(
            self._isa,
            q_THC,
            layer.keys_BGPC,
            layer.values_BGPC,
            batch.query_start_S1,
            batch.context_len_S,
            batch.block_table_SM,
            scale,
            window or 0,
            sinks_H,
            lse_TH,
            softcap or 0.0,
        )

    def exit_decide(
        self,
        x_TD: torch.Tensor,
        probe: ProbeWeights,
        thresholds_T: torch.Tensor,
        previous_TD: torch.Tensor | None = None,
        router_entropy_T: torch.Tensor | None = None,
    ) -> ExitDecision:
        logits_T, order_T, num_staying = self._ops.exit_decide.default(
            self._isa,
            x_TD,
            previous_TD if probe.previous else None,
            router_entropy_T if probe.router_entropy else None,
            probe.weight_JX,
            probe.bias_J,
            probe.out_J,
            probe.out_bias,
            thresholds_T,
        )
        return ExitDecision(logits_T=logits_T, order_T=order_T, num_staying=num_staying)

    def router_entropy(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        return self._ops.router_entropy.default(self._isa, logits)

    def project_kv(
        self,
        x_TD: torch.Tensor,
        projections: Sequence[KVProjection],
        layers: Sequence[KVLayer],
        cos_sin_LC: torch.Tensor,
        batch: AttentionBatch,
        *,
        norm_eps: float,
        clip: float | None = None,
    ) -> None:
        linears: list[CpuLinear] = [p.kv.data for p in projections]
        norms = [norm for p in projections for norm in (p.norm_D, p.k_norm)]
        wide = any(norm is not None and norm.dtype != self.dtype for norm in norms)
        plain = not wide and all(p.norm_D is not None and not p.centred for p in projections)
        if not plain or any(isinstance(linear, SplitLinear) or linear.layout for linear in linears):
            return super().project_kv(x_TD, projections, layers, cos_sin_LC, batch, norm_eps=norm_eps, clip=clip)
        self._ops.project_kv.default(
            self._isa,
            x_TD,
            [p.norm_D for p in projections if p.norm_D is not None],
            [linear.packed for linear in linears],
            [linear.bias for linear in linears if linear.bias is not None],
            [p.k_norm for p in projections if p.k_norm is not None],
            [layer.keys_BGPC for layer in layers],
            [layer.values_BGPC for layer in layers],
            cos_sin_LC,
            batch.positions_T,
            batch.slots_T,
            norm_eps,
            clip or 0.0,
        )

    def make_stack(
        self, shape: StackShape, layers: Sequence[Sequence[StackBlock]], exits: Sequence[StackExit]
    ) -> Stack:
        check_stack(layers, exits, self.dtype)
        self.formats |= stack_parts(layers, self.dtype)
        return CpuStack(self._isa, self.dtype, shape, layers, exits)

    @property
    def isa_number(self) -> int:
        """How the kernels call the instruction set."""
        return self._isa

    def _source(self, weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight in this dtype, or in this backend's; its rows must be contiguous."""
        weight = weight.to(self.device, dtype or self.dtype)
        return weight if weight.stride(-1) == 1 or weight.shape[-1] == 1 else weight.contiguous()
