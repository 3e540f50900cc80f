"""What an expert adds to the residual stream per unit of router weight, measured on text with the frozen model.

A router's weight is the router's preference for an expert, not how much the expert adds. For expert e with output
``f_e(x)`` and weight ``w_e``, the scale is ``E[|w_e f_e(x)|] / E[w_e]`` over the tokens that chose it; weight times
scale then estimates a slot's contribution before the expert has run. The rule that spends these estimates is
:func:`..kernels.reference.budget.limit_experts`.

Shape suffixes: T tokens, D hidden size, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..kernels.api.types import ExpertWeights, Routing
from ..kernels.torch.backend import TorchBackend

PRIOR_TOKENS = 32.0


@dataclass(frozen=True, kw_only=True)
class LayerScales:
    """What was measured in one layer.

    Arguments:
        scale_E: float32, per routed expert.
        impact: mean of the summed contributions of a token's experts, in relation to the mean norm of the residual
            stream that they are added to.

    Raises:
        ValueError: for numbers that are not finite or negative.
    """

    scale_E: torch.Tensor
    impact: float

    def __post_init__(self) -> None:
        for name, found in (("contribution scales", self.scale_E), ("impact", torch.tensor(self.impact))):
            if not (found.isfinite() & (found >= 0)).all():
                raise ValueError(f"a layer's {name} must be finite and at least 0, not {found.tolist()}")


@dataclass(frozen=True, kw_only=True)
class ExpertScales:
    """What was measured in a model.

    Arguments:
        layers: one entry per layer; None for those that choose no experts.
        tokens: measured tokens.
        backbone_sha256: of the measured weights.
    """

    layers: tuple[LayerScales | None, ...]
    tokens: int
    backbone_sha256: str


def keep_by_layer(keep: float, impacts: Sequence[float]) -> list[float]:
    """Spread one setting over the layers so that a token may lose the same share of the residual stream in each.

    A layer whose experts add little to the stream may lose more of what they add. On average over the layers the share
    is ``keep``, as long as no layer may lose everything.

    Arguments:
        keep: share of the contributions to reach, in (0, 1].
        impacts: of the layers; see :class:`LayerScales`.

    Returns: the share for each layer, from 0 (only the best expert) to 1.
    """
    if keep >= 1:
        return [1.0] * len(impacts)
    inverse = [1 / impact for impact in impacts if impact]
    return [max(0.0, 1 - (1 - keep) * len(inverse) / sum(inverse) / i) if i else 0.0 for i in impacts]


def slot_norms(x_TD: torch.Tensor, weights: ExpertWeights, routing: Routing, backend: TorchBackend) -> torch.Tensor:
    """The norm of what each slot adds to its row, (T, K), float32: every slot runs as a row of its own.

    Arguments:
        x_TD: the experts' input.
        routing: without unused slots.
    """
    num_rows, top_k = routing.expert_ids_TK.shape
    slots = Routing(
        expert_ids_TK=routing.expert_ids_TK.reshape(-1, 1),
        weights_TK=routing.weights_TK.reshape(-1, 1),
        weight_on_input=routing.weight_on_input,
    )
    out = backend.experts(x_TD.repeat_interleave(top_k, 0), weights, slots)
    return out.float().norm(dim=-1).view(num_rows, top_k)


class ContributionMeter:
    """Sums over tokens of the router weights, output norms and residual norms of one layer's routed experts."""

    def __init__(self, num_experts: int) -> None:
        self.norms_E = torch.zeros(num_experts, dtype=torch.float64)
        self.weights_E = torch.zeros(num_experts, dtype=torch.float64)
        self.tokens_E = torch.zeros(num_experts, dtype=torch.float64)
        self.stream = 0.0  # norms of the residual stream

    def add(
        self, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor, norms_TK: torch.Tensor, stream_T: torch.Tensor
    ) -> None:
        """Add some tokens: experts, router weights, norms of each slot's output and of the residual stream."""
        self.stream += float(stream_T.double().sum())
        experts = expert_ids_TK.flatten().long().cpu()
        self.norms_E.index_add_(0, experts, norms_TK.flatten().double().cpu())
        self.weights_E.index_add_(0, experts, weights_TK.abs().flatten().double().cpu())
        self.tokens_E.index_add_(0, experts, torch.ones(experts.numel(), dtype=torch.float64))

    def scales(self, prior_tokens: float = PRIOR_TOKENS) -> LayerScales:
        """What was measured.

        Arguments:
            prior_tokens: every expert is taken to have been chosen by this many more tokens with the layer's mean norm
                and weight, which draws rarely chosen ones to the layer's mean.

        Raises:
            ValueError: when no token was measured.
        """
        total = self.tokens_E.sum()
        if not total:
            raise ValueError("no token was measured")
        prior = prior_tokens / total
        norms_E = self.norms_E + prior * self.norms_E.sum()
        scale_E = norms_E / (self.weights_E + prior * self.weights_E.sum())
        return LayerScales(scale_E=scale_E.float(), impact=float(self.norms_E.sum()) / self.stream)
