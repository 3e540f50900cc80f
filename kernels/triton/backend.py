"""The GPU backend: Triton kernels for routing, experts, attention and norms; dense products stay with the vendor's.

Without a GPU it runs under ``TRITON_INTERPRET=1``, which is how its tests work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

import triton

from ..api.quantized_weight import QuantizedWeight
from ..api.router_spec import RouterSpec
from ..api.types import AttentionBatch, ExitDecision, ExpertWeights, KVLayer, LinearWeights, ProbeWeights, Routing
from ..reference.quantized import all_on
from ..torch.backend import TorchBackend
from ..torch.experts import PlainExperts
from ..torch.quantized import QuantExperts, QuantLinear
from ..torch.split import SplitExperts
from .device import device_properties
from .exits import ExitCall
from .experts import ExpertProblem, ExpertsCall, table_rows
from .launch import Launch
from .norm import NormCall, RopeCall
from .paged_attention import AttentionCall
from .quantized_layers import LinearCall, QuantExpertsCall, QuantProblem
from .router import RouteCall
from .shapes import WarmUpShape
from .states import ConvolutionCall, RecurrenceCall, ScanCall
from .stored_weight import kernel_form
from .tuning import TuningCache
from .variants import Call, NoKernelError, Planner, ResultT, interpreted
from .warmup import planned_launches

_MAX_STREAMS = 256


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
        if self.device.type != "cuda" and not interpreted():
            raise ValueError(f"the triton backend needs a GPU (or TRITON_INTERPRET=1), not device {str(device)!r}")
        properties = device_properties(self.device)
        self.planner = Planner(properties, measured or TuningCache(properties.name))
        # One counter per stream, 16 bytes apart. Made here: memory made while a graph is captured belongs to the graph.
        self._tickets = torch.zeros(_MAX_STREAMS, 4, dtype=torch.int32, device=self.device)
        self._streams: dict[int, int] = {}
        self._mixtures: dict[int, tuple[type[Call[Any]], ExpertProblem | QuantProblem]] = {}

    def numerics(self, processor: str, coded_cache: bool) -> str:
        tuned = self.planner.measured.digest()
        return f"{super().numerics(processor, coded_cache)}, triton {triton.__version__}, tuned {tuned}"

    def _source_folders(self) -> tuple[str, ...]:
        return *super()._source_folders(), "kernels/triton"

    def _pack_experts(self, experts: PlainExperts, activation: str) -> ExpertWeights:
        # Kernels read along rows.
        strided = {name: t for name, t in vars(experts).items() if t is not None and t.stride(-1) != 1}
        experts = replace(experts, **{name: t.contiguous() for name, t in strided.items()})
        self._mixtures[len(experts.gate_EFD)] = ExpertsCall, ExpertProblem.of(experts, activation, self.dtype)
        return super()._pack_experts(experts, activation)

    def _pack_quantized_experts(self, experts: QuantExperts, activation: str) -> ExpertWeights:
        packed = super()._pack_quantized_experts(experts, activation)
        with contextlib.suppress(NoKernelError):
            problem = QuantProblem.of(packed.data, activation, self.dtype)
            self._mixtures[problem.num_experts] = QuantExpertsCall, problem
        return packed

    def route(self, logits_TE: torch.Tensor, spec: RouterSpec, **inputs: torch.Tensor | None) -> Routing:
        # Tables are built along the way if experts of this number are known to want them; otherwise with the experts.
        mixture = self._mixtures.get(spec.num_real_experts)
        rows = None
        if mixture is not None:
            call, one = mixture
            rows = table_rows(self.planner, one.of_rows(logits_TE.shape[0], spec.top_k), call)
        try:
            return self._do(RouteCall(logits_TE, spec, rows, self._ticket(), **inputs))
        except NoKernelError as reason:
            self._fall_back(str(reason))
        return super().route(logits_TE, spec, **inputs)

    def experts(self, x_TD: torch.Tensor, weights: ExpertWeights, routing: Routing) -> torch.Tensor:
        if not x_TD.shape[0]:
            return torch.empty_like(x_TD)
        if isinstance(weights.data, SplitExperts):
            return super().experts(x_TD, weights, routing)
        try:
            given = (weights.data, routing, weights.activation, self._ticket())
            if isinstance(weights.data, QuantExperts):
                return self._do(QuantExpertsCall.of(x_TD.contiguous(), *given))
            return self._do(ExpertsCall(x_TD, *given))
        except NoKernelError as reason:
            self._fall_back(str(reason))
        return super().experts(x_TD, weights, routing)

    def _kept(self, weight: QuantizedWeight) -> QuantizedWeight:
        return kernel_form(super()._kept(weight))

    def all_experts(self, x_TD: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
        if isinstance(weights.data, QuantExperts):
            return self.experts(x_TD, weights, all_on(x_TD, weights.num_experts))
        return super().all_experts(x_TD, weights)

    def linear(self, x_TI: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
        if not isinstance(weights.data, QuantLinear):
            return super().linear(x_TI, weights)
        return self._quant_linear(x_TI, weights.data, x_TI.dtype)

    def logits_linear(self, x_TI: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
        if not isinstance(weights.data, QuantLinear):
            return super().logits_linear(x_TI, weights)
        return self._quant_linear(x_TI, weights.data, torch.float32)

    def _quant_linear(self, x_TI: torch.Tensor, linear: QuantLinear, dtype: torch.dtype) -> torch.Tensor:
        if x_TI.stride(-1) != 1:
            x_TI = x_TI.contiguous()
        try:
            return self._do(LinearCall.of(x_TI, linear, dtype))
        except NoKernelError as reason:
            self._fall_back(str(reason))
        return linear.run(x_TI).to(dtype)

    def rms_norm(self, x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        return self._do(NormCall(x_TD, weight_D, eps))[0]

    def add_rms_norm(
        self, x_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, scale: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out_TD, sum_TD = self._do(NormCall(x_TD, weight_D, eps, residual_TD, scale))
        assert sum_TD is not None
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
        return self._do(RopeCall(q_THC, k_TGC, v_TGC, cos_sin_LC, batch, layer))

    def attention(self, q_THC: torch.Tensor, layer: KVLayer, batch: AttentionBatch, **options: Any) -> torch.Tensor:
        try:
            return self._do(AttentionCall(q_THC, layer, batch, **options))
        except NoKernelError as reason:
            self._fall_back(str(reason))
        return super().attention(q_THC, layer, batch, **options)

    def latent_attention(
        self, q_THC: torch.Tensor, layer: KVLayer, batch: AttentionBatch, *, latent: int, **options: Any
    ) -> torch.Tensor:
        if not (layer.coded and latent % 2):  # else keys behind the codes would begin at odd bytes
            try:
                return self._do(AttentionCall(q_THC, layer, batch, latent=latent, **options))
            except NoKernelError as reason:
                self._fall_back(str(reason))
        return super().latent_attention(q_THC, layer, batch, latent=latent, **options)

    def short_convolution(
        self,
        x_TX: torch.Tensor,
        weight_WX: torch.Tensor,
        bias_X: torch.Tensor | None,
        tails_NWX: torch.Tensor,
        batch: AttentionBatch,
        activation: str = "none",
    ) -> torch.Tensor:
        return self._do(ConvolutionCall(x_TX, weight_WX, bias_X, tails_NWX, batch, activation))

    def recurrence(
        self,
        q_TGC: torch.Tensor,
        k_TGC: torch.Tensor,
        v_THV: torch.Tensor,
        decay_TH: torch.Tensor,
        step_TH: torch.Tensor,
        states_NHCV: torch.Tensor,
        batch: AttentionBatch,
        *,
        delta_rule: bool,
    ) -> torch.Tensor:
        inputs = q_TGC, k_TGC, v_THV, decay_TH.contiguous(), step_TH.contiguous()
        return self._do(RecurrenceCall(*inputs, states_NHCV, batch, delta_rule))

    def selective_scan(
        self,
        q_TC: torch.Tensor,
        k_TC: torch.Tensor,
        v_TX: torch.Tensor,
        step_TX: torch.Tensor,
        rate_CX: torch.Tensor,
        states_NCX: torch.Tensor,
        batch: AttentionBatch,
    ) -> torch.Tensor:
        return self._do(ScanCall(q_TC, k_TC, v_TX, step_TX, rate_CX, states_NCX, batch))

    def exit_decide(
        self,
        x_TD: torch.Tensor,
        probe: ProbeWeights,
        thresholds_T: torch.Tensor,
        previous_TD: torch.Tensor | None = None,
        router_entropy_T: torch.Tensor | None = None,
    ) -> ExitDecision:
        call = ExitCall(x_TD, probe, thresholds_T, previous_TD, router_entropy_T, self._ticket())
        logits_T, order_T, continuing = self._do(call)
        found = torch.cat((order_T, continuing.long())).cpu().numpy()  # the only wait for the device at an exit
        return ExitDecision(logits_T=logits_T, order_T=order_T, num_staying=int(found[-1]), host_order_T=found[:-1])

    def warm_up(self, shapes: Sequence[WarmUpShape], progress: bool = True) -> int:
        """Compile every kernel that layers of these shapes will need, so that no request waits for a compiler.

        Returns: how many launches were prepared. Without a GPU there is nothing to compile.
        """
        launches = planned_launches(shapes, self.dtype, self.planner)
        if interpreted():
            return len(launches)
        from tqdm import tqdm

        with self._on_device():
            for launch in tqdm(launches, desc="compiling kernels", unit="kernel", disable=not progress or None):
                launch.warm()
        return len(launches)

    def _ticket(self) -> torch.Tensor:
        """A counter of the current stream; launches of one stream use it one after the other."""
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        number = self._streams.setdefault(stream, len(self._streams))
        assert number < _MAX_STREAMS, f"more than {_MAX_STREAMS} streams use one backend"
        return self._tickets[number, :1]

    def _on_device(self) -> contextlib.AbstractContextManager:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _do(self, call: Call[ResultT]) -> ResultT:
        result, launches = self.planner.plan(call)
        self._run(launches)
        return result

    def _run(self, launches: Iterable[Launch]) -> None:
        with self._on_device():
            for launch in launches:
                launch.run()
