"""The weights of one layer as a backend keeps them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from ...kernels.api.types import ExpertWeights, LinearWeights
from .attention.kind import AttentionWeights


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One layer's weights as the backend keeps them.

    Arguments:
        attention: of the layer's kind.
        ffn: all experts, or the dense FFN as one expert.
        router: logits over the routed experts.
        shared, shared_gate: the shared expert and its gate.
        contribution_scale_E: float32, what each routed expert adds per unit of router weight; None: not calibrated.
    """

    attention_norm_D: torch.Tensor
    attention: AttentionWeights
    ffn_norm_D: torch.Tensor
    ffn: ExpertWeights
    router: LinearWeights | None = None
    shared: ExpertWeights | None = None
    shared_gate: LinearWeights | None = None
    contribution_scale_E: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return sum(getattr(self, f.name).nbytes for f in fields(self) if getattr(self, f.name) is not None)
