"""The backend made of torch's own operations: works on every device, and is what the others fall back to."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from ..api.formats import UNQUANTIZED, ActivationScheme
from ..api.kv_codes import KV_DTYPES
from ..api.quantized_weight import QuantizedWeight
from ..api.router_spec import RouterSpec
from ..api.sources import sources_hash
from ..api.stack import NotStacked, Stack, StackBlock, StackExit, StackShape
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
from ..reference import budget as budget_reference
from ..reference import exits as exit_reference
from ..reference import operations as reference
from .attention import run_attention
from .expert_room import ExpertRoom
from .experts import PlainExperts, run_experts
from .latents import LatentOperations
from .quantized import QuantExperts, QuantLinear, QuantOperations, check_experts
from .split import SplitExperts, SplitLinear, join_linear
from .states import StateOperations

log = logging.getLogger(__name__)


class TorchBackend(QuantOperations, LatentOperations, StateOperations, ExpertRoom):
    """Operations of a decoder on plain tensors.

    A faster backend subclasses this one and replaces what it does better; whatever it leaves alone keeps working.
    Weights go through ``pack_*`` once, while loading, and come back as handles that only the same backend understands.
    """

    name = "torch"
    copies_weights = False  # whether packing always copies, so that the source may change or vanish afterwards
    kv_formats = tuple(KV_DTYPES)  # of keys and values that it reads and writes
    scales_behind_page = False  # see :class:`KVLayer`

    def __init__(self, device: torch.device | str, dtype: torch.dtype) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self._said: set[str] = set()
        self.formats: set[str] = set()  # packed for kernels of its own, and other parts of :meth:`numerics`

    def numerics(self, processor: str, coded_cache: bool) -> str:
        """What the operations compute, as text that changes when their results may have changed.

        Sources and versions alone say less than outputs do: the same source may compute something else elsewhere.

        Arguments:
            processor: the host's, by name.
            coded_cache: whether keys and values are codes.
        """
        return f"by sources only: {sources_hash(*self._source_folders())}, torch {torch.__version__}"

    def _source_folders(self) -> tuple[str, ...]:
        return "kernels/api", "kernels/reference", "kernels/torch"

    def _fall_back(self, reason: str) -> None:
        """Say once per reason that torch's own operations take over from this backend's."""
        if reason not in self._said:
            self._said.add(reason)
            log.warning("the %s backend has no kernel for %s: torch's own operations run it", self.name, reason)

    def pack_linear(
        self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> LinearWeights:
        """Take a linear layer's weight into this backend's layout. The source may be a memory-mapped view.

        ``dtype``: of the weight and of the rows that it meets, this backend's or float32; None is this backend's.
        """
        dtype = dtype or self.dtype
        data = weight_OI.to(self.device, dtype), None if bias_O is None else bias_O.to(self.device, dtype)
        return LinearWeights.of(weight_OI.shape, dtype, data, *data)

    def pack_quantized_linear(
        self, weight_OI: QuantizedWeight, bias_O: torch.Tensor | None = None, scheme: ActivationScheme = UNQUANTIZED
    ) -> LinearWeights:
        """As :meth:`pack_linear`, for a quantised weight; ``scheme`` says how the layer's input is rounded.

        Raises:
            ValueError: when rows that are rounded like this do not meet weights of this format.
        """
        scheme.check(weight_OI.format, weight_OI.group)
        data = QuantLinear(self._kept(weight_OI), self._moved(bias_O), scheme)
        return LinearWeights.of(weight_OI.shape, self.dtype, data, data.weight, data.bias_O)

    def _kept(self, weight: QuantizedWeight) -> QuantizedWeight:
        """A quantised weight as this backend keeps it."""
        return weight.to(self.device)

    def _moved(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(self.device, self.dtype)

    def logits(
        self, x_TD: torch.Tensor, norm_D: torch.Tensor, eps: float, weights: LinearWeights, divisor: float
    ) -> torch.Tensor:
        """Final norm, :meth:`logits_linear`, and the division by ``divisor``: float32, (T, V).

        Arguments:
            x_TD: the residual stream, float32.
        """
        logits_TV = self.logits_linear(self.rms_norm(x_TD, norm_D, eps), weights)
        return logits_TV if divisor == 1.0 else logits_TV.div_(divisor)

    def cap_logits(self, logits_TV: torch.Tensor, cap: float) -> torch.Tensor:
        """``cap · tanh(logits / cap)``, in place."""
        return logits_TV.div_(cap).tanh_().mul_(cap)

    def embed(self, weights: LinearWeights, ids_T: torch.Tensor, scale: float) -> torch.Tensor:
        """:meth:`weight_rows` times ``scale``, float32: embeddings of a model whose head is tied to them."""
        rows_TD = self.weight_rows(weights, ids_T).float()
        return rows_TD if scale == 1.0 else rows_TD * scale

    def weight_rows(self, weights: LinearWeights, ids_T: torch.Tensor) -> torch.Tensor:
        """Rows of a weight as they were packed, (T, I): the embedding of a model whose LM head is tied to it."""
        if isinstance(weights.data, QuantLinear):
            return weights.data.rows(ids_T).to(self.dtype)
        return F.embedding(ids_T, weights.data[0])

    def linear_tail(self, weights: LinearWeights, start: int) -> LinearWeights:
        """The layer that computes the outputs from ``start`` on; it shares the weights' memory where it can."""
        if isinstance(weights.data, SplitLinear):
            return weights.data.tail(start, self.linear_tail)
        if isinstance(weights.data, QuantLinear):
            return replace(weights, out_features=weights.out_features - start, data=weights.data.tail(start), nbytes=0)
        weight_OI, bias_O = weights.data
        data = weight_OI[start:], None if bias_O is None else bias_O[start:]
        return replace(weights, out_features=weights.out_features - start, data=data, nbytes=0)

    def linear(self, x_TI: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
        """``x @ weight.T + bias``, (T, O)."""
        if isinstance(weights.data, SplitLinear):
            return weights.data.run(x_TI)
        if isinstance(weights.data, QuantLinear):
            return weights.data.run(x_TI).to(x_TI.dtype)
        return F.linear(x_TI, *weights.data)

    def logits_linear(self, x_TI: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
        """The same in float32: rounding logits to 16 bits would make different logits equal."""
        if isinstance(weights.data, QuantLinear):
            return weights.data.run(x_TI)
        weight_OI, bias_O = weights.data
        if x_TI.is_cuda:  # the product has float32 sums already; only its output must not be rounded
            logits_TO = torch.mm(x_TI, weight_OI.T, out_dtype=torch.float32)
            return logits_TO if bias_O is None else logits_TO + bias_O
        return F.linear(x_TI, weight_OI, bias_O).float()

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
        """Take the experts of a layer (a dense FFN is one expert) into this backend's layout.

        ``down_EDF`` may be a strided view of one dense (D, E*F) matrix, so that all experts together are one dense FFN.
        """
        gate, up, down = (t.to(self.device, self.dtype) for t in (gate_EFD, up_EFD, down_EDF))
        gate_bias, up_bias, down_bias = (self._moved(t) for t in (gate_bias_EF, up_bias_EF, down_bias_ED))
        return self._pack_experts(PlainExperts(gate, up, down, gate_bias, up_bias, down_bias), activation)

    def _pack_experts(self, experts: PlainExperts, activation: str) -> ExpertWeights:
        """Experts on this device, in this dtype, in this backend's layout."""
        return ExpertWeights.of(experts.gate_EFD.shape, activation, self.dtype, experts, *vars(experts).values())

    def pack_quantized_experts(
        self,
        gate_EFD: QuantizedWeight,
        up_EFD: QuantizedWeight,
        down_EDF: QuantizedWeight,
        activation: str,
        gate_bias_EF: torch.Tensor | None = None,
        up_bias_EF: torch.Tensor | None = None,
        down_bias_ED: torch.Tensor | None = None,
        scheme: ActivationScheme = UNQUANTIZED,
    ) -> ExpertWeights:
        """As :meth:`pack_experts`, for quantised weights; see :meth:`pack_quantized_linear`."""
        check_experts(gate_EFD, up_EFD, down_EDF)
        for weight in (gate_EFD, up_EFD, down_EDF):
            scheme.check(weight.format, weight.group)
        gate_bias, up_bias, down_bias = (self._moved(t) for t in (gate_bias_EF, up_bias_EF, down_bias_ED))
        experts = QuantExperts(gate_EFD, up_EFD, down_EDF, gate_bias, up_bias, down_bias, scheme)
        return self._pack_quantized_experts(experts, activation)

    def _pack_quantized_experts(self, experts: QuantExperts, activation: str) -> ExpertWeights:
        """Quantised experts, whose biases are on this device already, in this backend's layout."""
        gate_EFD, up_EFD, down_EDF = (self._kept(weight) for weight in experts.weights)
        data = replace(experts, gate_EFD=gate_EFD, up_EFD=up_EFD, down_EDF=down_EDF)
        return ExpertWeights.of(gate_EFD.shape, activation, self.dtype, data, *data.weights, *data.biases)

    def join_linear(self, *parts: LinearWeights) -> LinearWeights:
        """Packed layers with the same inputs as one, in whichever formats they are."""
        return join_linear(parts, self.linear)

    def join_experts(
        self,
        gate: Sequence[LinearWeights],
        up: Sequence[LinearWeights],
        down: Sequence[LinearWeights],
        activation: str,
    ) -> ExpertWeights:
        """Experts of packed projections, one for each expert, in whichever formats they are; gates may be missing."""
        self._fall_back("experts whose projections are in different formats" if gate else "experts without gates")
        return ExpertWeights(
            num_experts=len(down),
            hidden_size=up[0].in_features,
            expert_size=up[0].out_features,
            activation=activation,
            dtype=self.dtype,
            data=SplitExperts(tuple(gate), tuple(up), tuple(down), activation, self.linear),
            nbytes=sum(part.nbytes for part in (*gate, *up, *down)),
        )

    def experts(self, x_TD: torch.Tensor, weights: ExpertWeights, routing: Routing) -> torch.Tensor:
        """The weighted sum of each row's experts, (T, D). See :func:`reference.experts`."""
        if isinstance(weights.data, SplitExperts):
            return weights.data.run(x_TD, routing)
        if isinstance(weights.data, QuantExperts):
            return weights.data.run(x_TD, routing, weights.activation).to(x_TD.dtype)
        return run_experts(x_TD, weights.data, routing, weights.activation)

    def all_experts(self, x_TD: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
        """Every expert with weight 1, run as one dense FFN over the same storage, (T, D)."""
        if isinstance(weights.data, SplitExperts):
            return weights.data.run(x_TD, None)
        if isinstance(weights.data, QuantExperts):
            return weights.data.run_all(x_TD, weights.activation).to(x_TD.dtype)
        w: PlainExperts = weights.data
        gate = F.linear(x_TD, w.gate_EFD.flatten(0, 1), None if w.gate_bias_EF is None else w.gate_bias_EF.flatten())
        up = F.linear(x_TD, w.up_EFD.flatten(0, 1), None if w.up_bias_EF is None else w.up_bias_EF.flatten())
        down_DX = w.down_EDF.permute(1, 0, 2).flatten(1)
        bias_D = None if w.down_bias_ED is None else w.down_bias_ED.sum(0)
        return F.linear(reference.activate(gate, up, weights.activation), down_DX, bias_D)

    def route(
        self,
        logits_TE: torch.Tensor,
        spec: RouterSpec,
        *,
        selection_bias_E: torch.Tensor | None = None,
        expert_scale_E: torch.Tensor | None = None,
        forced_ids_TK: torch.Tensor | None = None,
    ) -> Routing:
        """Experts and weights of every row. See :func:`router_reference.route`."""
        return reference.route(
            logits_TE,
            spec,
            selection_bias_E=selection_bias_E,
            expert_scale_E=expert_scale_E,
            forced_ids_TK=forced_ids_TK,
            scores_TE=self._scores(logits_TE, spec),
        )

    def _scores(self, logits_TE: torch.Tensor, spec: RouterSpec) -> torch.Tensor | None:
        """What a rule makes of the logits, (T, E), float32, where a backend knows better than torch; else None."""
        return None

    def limit_experts(
        self, routing: Routing, scale_E: torch.Tensor | None, keep_T: torch.Tensor, cap_T: torch.Tensor
    ) -> Routing:
        """Fewer experts for rows on a budget. See :func:`budget_reference.limit_experts`."""
        return budget_reference.limit_experts(routing, scale_E, keep_T, cap_T)

    def rms_norm(self, x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        """Root-mean-square norm over the last dimension, in the weight's dtype."""
        return reference.rms_norm(x_TD, weight_D, eps)

    def rounded_rms_norm(self, x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        """:meth:`rms_norm` in this backend's dtype; with a float32 weight it rounds once, at its end."""
        wide_TD = x_TD.float() if weight_D.dtype == torch.float32 else x_TD
        return self.rms_norm(wide_TD, weight_D, eps).to(self.dtype)

    def layer_norm(
        self, x_TD: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        """Layer norm over the last dimension in float32, in this backend's dtype; weight and bias are float32."""
        return F.layer_norm(x_TD.float(), weight_D.shape, weight_D, bias_D, eps).to(self.dtype)

    def add_rms_norm(
        self, x_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, scale: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``residual + scale * x``, normed and as it is: returns (normed, sum). The residual may be overwritten.

        The residual may be wider than x: the sum has its dtype, the norm that of the weight.
        """
        x_TD = x_TD.to(residual_TD.dtype)
        residual_TD = residual_TD + (x_TD if scale == 1.0 else x_TD * scale)
        return self.rms_norm(residual_TD, weight_D, eps), residual_TD

    def rope_and_write(
        self,
        q_THC: torch.Tensor,
        k_TGC: torch.Tensor,
        v_TGC: torch.Tensor,
        cos_sin_LC: torch.Tensor,
        batch: AttentionBatch,
        layer: KVLayer,
    ) -> torch.Tensor:
        """Rotate queries and keys, write keys and values to the cache, return the rotated queries."""
        k_TGC = reference.rope(k_TGC, cos_sin_LC, batch.positions_T)
        reference.write_kv(k_TGC, v_TGC, layer, batch.slots_T)
        return reference.rope(q_THC, cos_sin_LC, batch.positions_T)

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
        """Causal attention over the paged cache, (T, H, C). See :func:`reference.paged_attention`."""
        options = {"scale": scale, "window": window, "sinks_H": sinks_H, "lse_TH": lse_TH, "softcap": softcap}
        return run_attention(q_THC, layer, batch, **options)

    def exit_decide(
        self,
        x_TD: torch.Tensor,
        probe: ProbeWeights,
        thresholds_T: torch.Tensor,
        previous_TD: torch.Tensor | None = None,
        router_entropy_T: torch.Tensor | None = None,
    ) -> ExitDecision:
        """Sort rows into those that continue and those that exit. See :func:`exit_reference.exit_decide`."""
        return exit_reference.exit_decide(x_TD, probe, thresholds_T, previous_TD, router_entropy_T)

    def router_entropy(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        """Mean entropy of some layers' routers, (T,). See :func:`exit_reference.router_entropy`."""
        return exit_reference.router_entropy(logits)

    def read_by(self, projection: KVProjection, x_TD: torch.Tensor, eps: float) -> torch.Tensor:
        """What a projection to keys and values reads of the residual stream."""
        if projection.norm_D is None:
            return x_TD.to(self.dtype)
        if projection.centred:
            return self.layer_norm(x_TD, projection.norm_D, projection.norm_bias_D, eps)
        return self.rounded_rms_norm(x_TD, projection.norm_D, eps)

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
        """KV propagation: write the keys and values of layers that exiting rows skip, from the state at the exit.

        Arguments:
            x_TD: residual stream at the exit; of the batch only positions and slots are read.
            projections, layers: of the layers that the rows skip, in the same order.
            clip: keys and values are clipped to ± this value: behind a key norm over the full width, in front of one
                per head.
        """
        for projection, layer in zip(projections, layers, strict=True):
            k_TX, v_TX = self.linear(self.read_by(projection, x_TD, norm_eps), projection.kv).chunk(2, -1)
            head_dim, k_norm = cos_sin_LC.shape[-1], projection.k_norm
            if k_norm is not None and k_norm.shape[0] != head_dim:
                k_TX = self.rounded_rms_norm(k_TX.contiguous(), k_norm, norm_eps)
            if clip is not None:
                k_TX, v_TX = k_TX.clamp(-clip, clip), v_TX.clamp(-clip, clip)
            k_TGC, v_TGC = (part.unflatten(-1, (-1, head_dim)) for part in (k_TX, v_TX))
            if k_norm is not None and k_norm.shape[0] == head_dim:
                rows = k_TGC.reshape(-1, head_dim).contiguous()
                k_TGC = self.rounded_rms_norm(rows, k_norm, norm_eps).view(k_TGC.shape)
            # The operation rotates queries too; keys are passed in their place, and the result is not used.
            self.rope_and_write(k_TGC, k_TGC, v_TGC, cos_sin_LC, batch, layer)

    def make_stack(
        self, shape: StackShape, layers: Sequence[Sequence[StackBlock]], exits: Sequence[StackExit]
    ) -> Stack:
        """Layers, as lists of blocks, and exits that run at once; NotStacked says why they cannot."""
        raise NotStacked(f"the {self.name} backend has no stack")
