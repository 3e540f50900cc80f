"""The weights of one layer as a backend keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from ...kernels.api.quantized_weight import QuantizedWeight
from ...kernels.api.types import ExpertWeights, LinearWeights
from .attention.kind import AttentionWeights
from .spec import LayerSpec


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One layer's weights as the backend keeps them.

    Arguments:
        norms: by the names in the layer's blocks; a norm's bias has its name with ``_bias`` behind it.
        attention: of the layer's kind.
        ffn: all experts, or the dense FFN as one expert; of a layer without either, none.
        router: logits over the routed experts.
        selection_bias_E, expert_scale_E: float32, what its rule takes beside the logits, see :class:`.RouterSpec`.
        router_norm_D: scale of the norm in front of the router.
        shared, shared_gate: the shared expert and its gate.
        latent_in, latent_out: what makes the experts' input of the hidden state, and the mixture's output of theirs.
        contribution_scale_E: float32, what each routed expert adds per unit of router weight; None: not calibrated.
    """

    norms: Mapping[str, torch.Tensor]
    attention: AttentionWeights
    ffn: ExpertWeights
    router: LinearWeights | None = None
    shared: ExpertWeights | None = None
    shared_gate: LinearWeights | None = None
    latent_in: LinearWeights | None = None
    latent_out: LinearWeights | None = None
    contribution_scale_E: torch.Tensor | None = None
    selection_bias_E: torch.Tensor | None = None
    expert_scale_E: torch.Tensor | None = None
    router_norm_D: torch.Tensor | None = None

    @property
    def routing(self) -> dict[str, torch.Tensor]:
        """What a backend's ``route`` takes beside logits and rule."""
        given = {"selection_bias_E": self.selection_bias_E, "expert_scale_E": self.expert_scale_E}
        return {name: tensor for name, tensor in given.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        others = [getattr(self, f.name) for f in fields(self) if f.name != "norms"]
        return sum(part.nbytes for part in (*self.norms.values(), *others) if part is not None)


@dataclass(frozen=True, kw_only=True)
class MtpWeights:
    """A layer that predicts further tokens, as the backend keeps it.

    It reads ``join(embedding norm of the next token's embedding, hidden norm of the last hidden state)``; what it
    leaves goes through its final norm, if it has one, and the LM head.

    Arguments:
        spec: of the layer.
        norms: ``embedding``, ``hidden`` and maybe ``final``; biases as in :class:`LayerWeights`.
        embedding, head: its own, where they are not the model's; as the model keeps these.
    """

    spec: LayerSpec
    norms: Mapping[str, torch.Tensor]
    join: LinearWeights
    layer: LayerWeights
    embedding: torch.Tensor | QuantizedWeight | None = None
    head: LinearWeights | None = None

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        parts = (*self.norms.values(), self.join, self.layer, self.embedding, self.head)
        return sum(part.nbytes for part in parts if part is not None)


def packed_router_tensors(
    tensors: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """What a router reads beside its weight, as :class:`LayerWeights` takes it.

    Arguments:
        tensors: float32, by field, as checkpoints have them.
        dtype: of norms.
    """
    packed = {name: tensor.flatten().to(device) for name, tensor in tensors.items()}
    if (scale_D := packed.get("router_norm_D")) is not None:
        packed["router_norm_D"] = (scale_D * len(scale_D) ** -0.5).to(dtype)
    return packed
