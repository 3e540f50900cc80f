"""What a router computes, as data. One spec drives every backend's routing kernel."""

from __future__ import annotations

from dataclasses import dataclass

SCORES = ("softmax", "sigmoid", "sqrt_softplus", "constant")


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """The rule that turns router logits into experts and weights.

    Arguments:
        num_experts: experts the router chooses from (E).
        top_k: experts chosen per token (K).
        score: how logits become scores. ``constant`` gives every chosen expert the weight 1.
        softmax_after_topk: choose on raw logits, then softmax over the chosen ones (GPT-OSS, Granite).
        renormalize: divide the chosen weights by their sum.
        scale: factor on the final weights (``routed_scaling_factor``).

    Raises:
        ValueError: for a combination that no kernel could honour; the message names the value.
    """

    num_experts: int
    top_k: int
    score: str = "softmax"
    softmax_after_topk: bool = False
    renormalize: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"router score must be one of {SCORES}, not {self.score!r}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k must be between 1 and num_experts={self.num_experts}, not {self.top_k}")
