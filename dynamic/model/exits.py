"""The exits of a decoder, as its backend keeps them: the exit head's adapter, probe, propagation of keys and values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ...exits.calibrators import Isotonic, Temperature, logit_threshold
from ...exits.segments import split_into_segments
from ...exits.sidecar import ExitHeads
from ...kernels.api.types import KVProjection, LinearWeights, ProbeWeights
from ...kernels.torch.backend import TorchBackend
from .blocks import norm_before_attention
from .norms import NORM_KINDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .layer_weights import LayerWeights
    from .spec import LayerSpec, ModelSpec


@dataclass(frozen=True, kw_only=True)
class DecoderExit:
    """One exit.

    Arguments:
        after_layers: layers in front of it.
        down, up: factors of the exit head's adapter.
        probe, calibrator: None where the exit has only an adapter, so that no row can exit.
        projections: keys and values, or recurrent states, of the layers behind it that have such, and are here.
    """

    after_layers: int
    down: LinearWeights
    up: LinearWeights
    probe: ProbeWeights | None
    calibrator: Temperature | Isotonic | None
    projections: tuple[KVProjection, ...]

    def logit_threshold(self, probability: float) -> float:
        """The probe's logit from which on the calibrated probability is at least this."""
        assert self.calibrator is not None
        return logit_threshold(self.calibrator, probability)


def pack_exits(
    heads: ExitHeads,
    spec: ModelSpec,
    layers: Sequence[LayerWeights],
    backend: TorchBackend,
    held: range,
) -> dict[int, DecoderExit]:
    """Bring trained exits into a backend's layout.

    Arguments:
        spec: with the heads that are here.
        layers: the packed layers of the model; their projections to keys and values are shared, not copied.
        held: numbers of the layers that are here: exits fill in these only.

    Raises:
        ValueError: when the exits were made for a model of another shape, or its layers' attention makes no keys and
            values for rows that skip them.
    """
    if heads.hidden_size != spec.hidden_size:
        raise ValueError(f"the exits are for hidden size {heads.hidden_size}, the model has {spec.hidden_size}")
    split_into_segments(spec.num_layers, heads.exit_layers)  # refuses exits outside the model
    centred = NORM_KINDS[spec.norm].centred
    projections = {
        number: _projection(layer, layers[number], backend, centred)
        for number, layer in enumerate(spec.layers)
        if number in held and layer.attention.keeps_rows
    }
    exits = {}
    for layer, adapter in heads.adapters.items():
        exits[layer] = DecoderExit(
            after_layers=layer,
            down=backend.pack_linear(adapter.down_JD.detach()),
            up=backend.pack_linear(adapter.up_DJ.detach()),
            probe=_on_device(heads.probes[layer].weights(), backend.device) if layer in heads.probes else None,
            calibrator=heads.calibrators.get(layer),
            projections=tuple(projection for n, projection in projections.items() if n >= layer),
        )
    return exits


def _projection(layer: LayerSpec, weights: LayerWeights, backend: TorchBackend, centred: bool) -> KVProjection:
    before = norm_before_attention(layer.blocks)
    norm_D = None if before is None else weights.norms[before]
    found = layer.attention.projection(norm_D, weights.attention, backend)
    return replace(found, centred=True, norm_bias_D=weights.norms.get(f"{before}_bias")) if centred else found


def _on_device(probe: ProbeWeights, device: torch.device) -> ProbeWeights:
    tensors = {name: value for name, value in vars(probe).items() if isinstance(value, torch.Tensor)}
    return replace(probe, **{name: value.detach().to(device).contiguous() for name, value in tensors.items()})  # type: ignore[arg-type]
