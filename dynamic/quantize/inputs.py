"""Runs calibration text through one layer and records the inputs of its linear parts.

Shape suffixes as in ``kernels/api/types.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from ...exits.segments import Segment
from ...kernels.api.types import ExpertWeights, LinearWeights, Routing
from ...kernels.reference import operations as reference
from ...kernels.torch.backend import TorchBackend
from ..model.decoder import Decoder
from ..model.layer_weights import LayerWeights
from ..model.prompt_pass import fresh_cache
from ..model.spec import ModelSpec
from .layer import FFNTensors, plain

_STEP_ROWS = 1024  # tokens that run at once
_WHOLE = Segment(index=0, layers=range(1))


class OneLayer:
    """A decoder of a single layer, for the residual stream of whole windows.

    Arguments:
        spec: of the whole model.
        number: which of its layers this is.
    """

    def __init__(self, spec: ModelSpec, number: int, weights: LayerWeights, backend: TorchBackend) -> None:
        nothing = torch.empty(0, dtype=backend.dtype, device=backend.device)
        no_head = LinearWeights(out_features=0, in_features=spec.hidden_size, dtype=backend.dtype, data=None)
        self._decoder = Decoder(
            replace(spec, layers=(spec.layers[number],)),
            backend,
            embedding_VD=nothing,
            layers=[weights],
            final_norm_D=nothing,
            lm_head=no_head,
        )

    def run(self, stream_NLD: torch.Tensor) -> torch.Tensor:
        """The residual stream after the layer, float32, from that before it: N windows of L tokens."""
        length = stream_NLD.shape[1]
        out = []
        for part_NLD in stream_NLD.split(max(1, _STEP_ROWS // length)):
            kv, batch = fresh_cache(self._decoder, [length] * len(part_NLD))
            x_TD = part_NLD.flatten(0, 1).to(self._decoder.device, copy=True)
            out.append(self._decoder.run_segment(_WHOLE, x_TD, kv, batch).cpu().view(part_NLD.shape))
        return torch.cat(out)

    def watch(self, stream_NLD: torch.Tensor) -> tuple[torch.Tensor, LayerInputs]:
        """As :meth:`run`, and the inputs of the layer's linear parts."""
        plain_backend = self._decoder.backend
        recorder = _RecordingBackend(plain_backend, self._decoder.layers[0])
        stack, self._decoder.stack = self._decoder.stack, None  # operation by operation, so that they can be recorded
        self._decoder.backend = cast(TorchBackend, recorder)
        try:
            after_NLD = self.run(stream_NLD)
        finally:
            self._decoder.backend, self._decoder.stack = plain_backend, stack
        return after_NLD, recorder.inputs()


@dataclass(frozen=True, kw_only=True)
class LayerInputs:
    """Inputs of a layer's linear parts for T tokens of calibration text; on the CPU.

    Arguments:
        attention_TD: the projections of queries, keys and values.
        o_TX: the output projection.
        ffn_TD: router, experts, shared expert.
        routing: which experts every token used; None: all of them.
    """

    attention_TD: torch.Tensor
    o_TX: torch.Tensor
    ffn_TD: torch.Tensor
    routing: Routing | None

    def expert_rows(self, expert: int) -> torch.Tensor:
        """The rows of ``ffn_TD`` that one expert read."""
        routing = self.routing
        if routing is None:
            return self.ffn_TD
        chosen_TK = routing.expert_ids_TK == expert
        if routing.counts_T is not None:
            chosen_TK &= torch.arange(chosen_TK.shape[1]) < routing.counts_T[:, None]
        rows, slots = chosen_TK.nonzero(as_tuple=True)
        x_TD = self.ffn_TD[rows]
        return x_TD * routing.weights_TK[rows, slots, None] if routing.weight_on_input else x_TD


def neurons(x_TD: torch.Tensor, ffn: FFNTensors, expert: int, activation: str) -> torch.Tensor:
    """Inputs of an expert's down projection for these rows, (T, F), float32."""
    gate_F, up_F = (ffn.biases[0][expert], ffn.biases[1][expert]) if ffn.biases else (None, None)
    gate_TF = torch.nn.functional.linear(x_TD, plain(ffn.gate_EFD)[expert], gate_F)
    up_TF = torch.nn.functional.linear(x_TD, plain(ffn.up_EFD)[expert], up_F)
    return reference.activate(gate_TF, up_TF, activation)


class _RecordingBackend:
    """A backend that records the inputs of a layer's linear parts."""

    def __init__(self, backend: TorchBackend, layer: LayerWeights) -> None:
        self._backend, self._layer = backend, layer
        self._rows: dict[str, list[torch.Tensor]] = {"attention_TD": [], "o_TX": [], "ffn_TD": []}
        self._routings: list[Routing] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def linear(self, x_TI: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
        attention: Any = self._layer.attention
        self._record("attention_TD", x_TI, weights is attention.qkv)
        self._record("o_TX", x_TI, weights is attention.o)
        return self._backend.linear(x_TI, weights)

    def experts(self, x_TD: torch.Tensor, weights: ExpertWeights, routing: Routing) -> torch.Tensor:
        self._record("ffn_TD", x_TD, weights is self._layer.ffn)
        if weights is self._layer.ffn:
            self._routings.append(routing)
        return self._backend.experts(x_TD, weights, routing)

    def all_experts(self, x_TD: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
        self._record("ffn_TD", x_TD, weights is self._layer.ffn)
        return self._backend.all_experts(x_TD, weights)

    def _record(self, name: str, rows: torch.Tensor, wanted: bool) -> None:
        if wanted:
            self._rows[name].append(rows.float().cpu().clone())

    def inputs(self) -> LayerInputs:
        """All recorded inputs."""
        rows = {name: torch.cat(parts) for name, parts in self._rows.items()}
        return LayerInputs(**rows, routing=_joined(self._routings))


def _joined(routings: Sequence[Routing]) -> Routing | None:
    if not routings:
        return None
    counts = [routing.counts_T for routing in routings if routing.counts_T is not None]
    return Routing(
        expert_ids_TK=torch.cat([routing.expert_ids_TK.cpu() for routing in routings]),
        weights_TK=torch.cat([routing.weights_TK.cpu() for routing in routings]),
        counts_T=torch.cat(counts).cpu() if counts else None,
        weight_on_input=routings[0].weight_on_input,
    )
