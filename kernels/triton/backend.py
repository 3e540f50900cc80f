"""The GPU backend: Triton kernels for routing, experts, attention and norms; dense products stay with the vendor's.

Without a GPU it runs under ``TRITON_INTERPRET=1``, which is how its tests work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from triton import knobs

from ..api.quantized_weight import QuantizedWeight
from ..api.router_spec import RouterSpec
from ..api.types import AttentionBatch, ExitDecision, ExpertWeights, KVLayer, LinearWeights, ProbeWeights, Routing
from ..reference.quantized import all_on
from ..torch.backend import TorchBackend
from ..torch.experts import PlainExperts
from ..torch.quantized import QuantExperts, QuantLinear
from .attention import plan_attention
from .device import device_properties
from .exits import plan_exit_decide
from .experts import ACTIVATIONS, ExpertPlanner, plan_experts, shape_of
from .launch import Launch, require_contiguous
from .norm import plan_rms_norm, plan_rope_and_write
from .quantized import plan_quant_experts, plan_quant_linear, settled
from .router import plan_route
from .tuning import ExpertShape, TuningCache, best_attention

_HALF = (torch.bfloat16, torch.float16)
_MAX_STREAMS = 256


@dataclass(frozen=True, kw_only=True)
class WarmUpShape:
    """What a layer will be called with: enough to compile its kernels before the first request.

    Arguments:
        kv_dtype: what keys and values are kept in; None: the model's own.
        router, expert_size, activation: None, 0 and "" for a layer without a mixture.
        always_on: experts in front of the routed ones that every row uses.
        norm_widths: further widths of RMS norms, those of queries and keys.
        probes: (inner width, whether it has a second layer, previous, router_entropy) of the probes behind the layer.
        max_tokens: most rows of a step. max_context: longest context in tokens.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    max_tokens: int
    max_context: int
    max_sequences: int
    router: RouterSpec | None = None
    expert_size: int = 0
    activation: str = ""
    always_on: int = 0
    norm_widths: tuple[int, ...] = ()
    probes: tuple[tuple[int, bool, bool, bool], ...] = ()
    window: int | None = None
    kv_dtype: torch.dtype | None = None


class TritonBackend(TorchBackend):
    """Operations of a decoder on a GPU.

    What no kernel covers (a dtype, an activation, a routing rule with a capacity) runs on torch's own operations, with
    one log line per reason.

    Raises:
        ValueError: when there is no GPU and Triton does not run in interpreter mode, or the GPU is too old.
    """

    name = "triton"
    scales_behind_page = True

    def __init__(self, device: torch.device | str, dtype: torch.dtype, measured: TuningCache | None = None) -> None:
        super().__init__(device, dtype)
        self.interpreted = knobs.runtime.interpret
        if self.device.type != "cuda" and not self.interpreted:
            raise ValueError(f"the triton backend needs a GPU (or TRITON_INTERPRET=1), not device {str(device)!r}")
        self.properties = device_properties(self.device)
        self.planner = ExpertPlanner(self.properties, measured or TuningCache(self.properties.name))
        # One counter per stream, 16 bytes apart. Made here: memory made while a graph is captured belongs to the graph.
        self._tickets = torch.zeros(_MAX_STREAMS, 4, dtype=torch.int32, device=self.device)
        self._streams: dict[int, int] = {}
        self._sizes: dict[int, ExpertShape] = {}

    def pack_experts(
        self,
        gate_EFD: torch.Tensor,
        up_EFD: torch.Tensor,
        down_EDF: torch.Tensor,
        activation: str,
        gate_bias_EF: torch.Tensor | None = None,
        up_bias_EF: torch.Tensor | None = None,
        down_bias_ED: torch.Tensor | None = None,
    ) -> ExpertWeights:
        weights = super().pack_experts(gate_EFD, up_EFD, down_EDF, activation, gate_bias_EF, up_bias_EF, down_bias_ED)
        self._sizes[weights.num_experts] = shape_of(weights.data, top_k=1)
        return weights

    def route(
        self,
        logits_TE: torch.Tensor,
        spec: RouterSpec,
        *,
        selection_bias_E: torch.Tensor | None = None,
        expert_scale_E: torch.Tensor | None = None,
        forced_ids_TK: torch.Tensor | None = None,
    ) -> Routing:
        if spec.drops:
            self._fall_back("routing with a capacity")
            return super().route(
                logits_TE,
                spec,
                selection_bias_E=selection_bias_E,
                expert_scale_E=expert_scale_E,
                forced_ids_TK=forced_ids_TK,
            )
        require_contiguous(
            logits_TE=logits_TE,
            selection_bias_E=selection_bias_E,
            expert_scale_E=expert_scale_E,
            forced_ids_TK=forced_ids_TK,
        )
        # Tables are built along the way if experts of this number are known to want them; otherwise with the experts.
        block_m, sizes = None, self._sizes.get(spec.num_real_experts)
        if sizes is not None:
            path = self.planner.path(logits_TE.shape[0], replace(sizes, top_k=spec.top_k))
            block_m = None if path.pairs else path.block_m
        routing, launches = plan_route(
            logits_TE,
            spec,
            block_m=block_m,
            ticket=self._ticket(),
            selection_bias_E=selection_bias_E,
            expert_scale_E=expert_scale_E,
            forced_ids_TK=forced_ids_TK,
        )
        self._run(launches)
        return routing

    def experts(self, x_TD: torch.Tensor, weights: ExpertWeights, routing: Routing) -> torch.Tensor:
        if isinstance(weights.data, QuantExperts):
            return self._quant_experts(x_TD, weights, routing)
        plain: PlainExperts = weights.data
        reason = self._unsupported_experts(x_TD, plain, weights.activation)
        if reason is not None:
            self._fall_back(reason)
            return super().experts(x_TD, weights, routing)
        require_contiguous(
            x_TD=x_TD,
            expert_ids_TK=routing.expert_ids_TK,
            weights_TK=routing.weights_TK,
            counts_T=routing.counts_T,
            identity_weights_T=routing.identity_weights_T,
        )
        out_TD = torch.empty_like(x_TD)
        if x_TD.shape[0]:
            self._run(plan_experts(x_TD, plain, routing, weights.activation, out_TD, self.planner, self._ticket()))
        return out_TD

    def _kept(self, weight: QuantizedWeight) -> QuantizedWeight:
        return settled(super()._kept(weight))

    def _quant_experts(self, x_TD: torch.Tensor, weights: ExpertWeights, routing: Routing) -> torch.Tensor:
        experts: QuantExperts = weights.data
        reason = self._unsupported_quant(experts.gate_EFD, experts.up_EFD, experts.down_EDF)
        if weights.activation not in ACTIVATIONS:
            reason = f"activation {weights.activation!r}"
        if experts.gate_EFD.format != experts.up_EFD.format:
            reason = "gate and up in different formats"
        if reason is not None:
            self._fall_back(reason)
            return super().experts(x_TD, weights, routing)
        out_TD = torch.empty_like(x_TD)
        if x_TD.shape[0]:
            x_TD = x_TD.contiguous()
            native_fp8 = self.properties.has_fp8
            self._run(
                plan_quant_experts(x_TD, experts, routing, weights.activation, out_TD, self._ticket(), native_fp8)
            )
        return out_TD

    def all_experts(self, x_TD: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
        if isinstance(weights.data, QuantExperts):
            return self._quant_experts(x_TD, weights, all_on(x_TD, weights.num_experts))
        return super().all_experts(x_TD, weights)

    def linear(self, x_TI: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
        return self._linear(x_TI, weights, x_TI.dtype)

    def logits_linear(self, x_TI: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
        return self._linear(x_TI, weights, torch.float32)

    def _linear(self, x_TI: torch.Tensor, weights: LinearWeights, dtype: torch.dtype) -> torch.Tensor:
        if not isinstance(weights.data, QuantLinear):
            run = super().linear if dtype == x_TI.dtype else super().logits_linear
            return run(x_TI, weights)
        reason = self._unsupported_quant(weights.data.weight)
        if reason is not None:
            self._fall_back(reason)
            return weights.data.run(x_TI).to(dtype)
        if x_TI.stride(-1) != 1:
            x_TI = x_TI.contiguous()
        out_TO = torch.empty(x_TI.shape[0], weights.out_features, dtype=dtype, device=x_TI.device)
        if x_TI.shape[0]:
            self._run(plan_quant_linear(x_TI, weights.data, out_TO, self.properties.has_fp8))
        return out_TO

    def _unsupported_quant(self, *weights: QuantizedWeight) -> str | None:
        if unknown := [weight.format.name for weight in weights if weight.format.triton is None]:
            return f"{unknown[0]} weights"
        if self.dtype not in _HALF and not self.interpreted:
            return f"quantised weights in {self.dtype}"
        return None

    def rms_norm(self, x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        out_TD = torch.empty(x_TD.shape, dtype=weight_D.dtype, device=x_TD.device)
        self._run([plan_rms_norm(x_TD, weight_D, eps, out_TD)])
        return out_TD

    def add_rms_norm(
        self, x_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, scale: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        require_contiguous(residual_TD=residual_TD)
        out_TD, sum_TD = torch.empty_like(residual_TD, dtype=weight_D.dtype), torch.empty_like(residual_TD)
        self._run([plan_rms_norm(x_TD, weight_D, eps, out_TD, residual_TD, sum_TD, scale)])
        return out_TD, sum_TD

    def rope_and_write(
        self,
        q_THC: torch.Tensor,
        k_TGC: torch.Tensor,
        v_TGC: torch.Tensor,
        cos_sin_LC: torch.Tensor,
        batch: AttentionBatch,
        layer: KVLayer,
    ) -> torch.Tensor:
        out_THC = torch.empty(q_THC.shape, dtype=q_THC.dtype, device=q_THC.device)
        self._run([plan_rope_and_write(q_THC, k_TGC, v_TGC, cos_sin_LC, batch, layer, out_THC)])
        return out_THC

    def attention(
        self,
        q_THC: torch.Tensor,
        layer: KVLayer,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor:
        if q_THC.dtype not in _HALF and not self.interpreted:
            self._fall_back(f"attention in {q_THC.dtype}")
            return super().attention(q_THC, layer, batch, scale=scale, window=window)
        num_heads, head_dim = q_THC.shape[1:]
        num_kv_heads = layer.keys_BGPC.shape[1]
        config = best_attention(
            batch.max_query_len,
            batch.max_context_len,
            batch.num_sequences * num_kv_heads,
            num_heads // num_kv_heads,
            head_dim,
            self.properties,
            narrow=layer.keys_BGPC.itemsize == 1,
        )
        out_THC = torch.empty(q_THC.shape, dtype=q_THC.dtype, device=q_THC.device)
        native_fp8 = self.properties.has_fp8
        self._run(
            plan_attention(
                q_THC, layer, batch, out_THC, scale=scale, window=window, config=config, native_fp8=native_fp8
            )
        )
        return out_THC

    def exit_decide(
        self,
        x_TD: torch.Tensor,
        probe: ProbeWeights,
        thresholds_T: torch.Tensor,
        previous_TD: torch.Tensor | None = None,
        router_entropy_T: torch.Tensor | None = None,
    ) -> ExitDecision:
        require_contiguous(x_TD=x_TD, thresholds_T=thresholds_T, previous_TD=previous_TD)
        logits_T, order_T, staying, launch = plan_exit_decide(
            x_TD, probe, thresholds_T, previous_TD, router_entropy_T, self._ticket()
        )
        self._run([launch])
        found = torch.cat((order_T, staying.long())).cpu().numpy()  # the only wait for the device at an exit
        return ExitDecision(logits_T=logits_T, order_T=order_T, num_staying=int(found[-1]), host_order_T=found[:-1])

    def warm_up(self, shapes: Sequence[WarmUpShape], progress: bool = True) -> int:
        """Compile every kernel that layers of these shapes will need, so that no request waits for a compiler.

        Returns: how many launches were prepared. Without a GPU there is nothing to compile.
        """
        from .warmup import planned_launches

        launches = planned_launches(shapes, self.dtype, self.planner)
        if self.interpreted:
            return len(launches)
        bar: Iterable[Launch] = launches
        if progress:
            from tqdm import tqdm

            bar = tqdm(launches, desc="compiling kernels", unit="kernel")
        with self._on_device():
            for launch in bar:
                launch.warm()
        return len(launches)

    def _unsupported_experts(self, x_TD: torch.Tensor, plain: PlainExperts, activation: str) -> str | None:
        if activation not in ACTIVATIONS:
            return f"activation {activation!r}"
        if plain.gate_EFD.dtype != x_TD.dtype:
            return f"{x_TD.dtype} rows with {plain.gate_EFD.dtype} weights"
        if x_TD.dtype not in _HALF and not self.interpreted:
            return f"experts in {x_TD.dtype}"
        if any(t.stride(-1) != 1 for t in (plain.gate_EFD, plain.up_EFD, plain.down_EDF)):
            return "expert weights with strided rows"
        return None

    def _ticket(self) -> torch.Tensor:
        """A counter of the current stream; launches of one stream use it one after the other."""
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        number = self._streams.setdefault(stream, len(self._streams))
        assert number < _MAX_STREAMS, f"more than {_MAX_STREAMS} streams use one backend"
        return self._tickets[number, :1]

    def _on_device(self) -> contextlib.AbstractContextManager:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _run(self, launches: Iterable[Launch]) -> None:
        with self._on_device():
            for launch in launches:
                launch.run()
