"""What a router computes, as data. One spec drives every backend's routing kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property

SCORES = ("softmax", "sigmoid", "sqrt_softplus", "constant", "sparsemixer")
GROUP_SCORES = ("max", "top2_sum")
# What plain rules may set, of the logits and of the rule.
_PLAIN = {"float32_logits", "input_norm_eps"}
_PLAIN |= {"num_experts", "top_k", "score", "softmax_after_topk", "renormalize", "scale"}


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """The rule that turns router logits into experts and weights, in the order in which the fields are listed.

    Arguments:
        num_experts: outputs of the router (E), zero experts included.
        top_k: experts chosen per token (K).
        score: how logits become scores. ``constant`` gives every chosen expert the weight 1. ``sparsemixer`` weighs
            each choice by its softmax over the experts within ``jitter`` of it, earlier choices taken out (Phimoe).
        softmax_after_topk: choose on raw logits, then softmax over the chosen ones (GPT-OSS, Granite).
        renormalize: divide the chosen weights by their norm.
        scale: factor on the final weights (``routed_scaling_factor``).
        selection_bias: a bias per expert is added to the scores for choosing and does not enter the weights.
        num_groups: experts come in this many equal groups of neighbours; 1 means no groups.
        top_groups: groups in which a token may choose.
        group_score: what a group is worth: its best score (``max``) or the sum of its best two (``top2_sum``).
        norm_p: which norm ``renormalize`` divides by (DBRX); 1 is the sum.
        norm_epsilon: added to that norm (DeepSeek-V3: 1e-20).
        norm_floor: smallest value of that norm (Ernie 4.5).
        jitter: width of ``sparsemixer``'s mask (``router_jitter_noise``).
        expert_scale: the final weight is multiplied by a learned factor per expert (Gemma 4).
        zero_experts: the last so many experts return the token itself; they never reach a GEMM (LongCat-Flash).
        forced_experts: the caller names the experts (by token id, DeepSeek-V4's first layers); logits only weigh them.
        weight_on_input: the weight multiplies the expert's input instead of its output (Llama 4).
        capacity: rows an expert takes per call, in row order, first choices before second ones; later rows drop that
            choice (Switch, NLLB). A row's result then depends on its neighbours.
        capacity_fraction: the same as a share of the rows, rounded up.
        renormalize_after_drop: with a capacity, ``renormalize`` sees only the choices that were kept.
        float32_logits: the router's matrix product runs in float32 whatever the model's dtype.
        input_norm_eps: the router sees ``rms_norm(x) * input_scale / sqrt(D)`` with this epsilon, not x (Gemma 4).

    Raises:
        ValueError: for a combination that no kernel could honour; the message names the value.
    """

    num_experts: int
    top_k: int
    score: str = "softmax"
    softmax_after_topk: bool = False
    renormalize: bool = False
    scale: float = 1.0
    selection_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    norm_p: float = 1.0
    norm_epsilon: float = 0.0
    norm_floor: float = 0.0
    jitter: float = 0.0
    expert_scale: bool = False
    zero_experts: int = 0
    forced_experts: bool = False
    weight_on_input: bool = False
    capacity: int | None = None
    capacity_fraction: float | None = None
    renormalize_after_drop: bool = False
    float32_logits: bool = False
    input_norm_eps: float | None = None

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"router score must be one of {SCORES}, not {self.score!r}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k must be between 1 and num_experts={self.num_experts}, not {self.top_k}")
        if self.group_score not in GROUP_SCORES:
            raise ValueError(f"group_score must be one of {GROUP_SCORES}, not {self.group_score!r}")
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ValueError(f"num_groups={self.num_groups} does not divide num_experts={self.num_experts}")
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(f"top_groups must be between 1 and num_groups={self.num_groups}, not {self.top_groups}")
        if self.top_k > self.top_groups * self.group_size:
            raise ValueError(
                f"top_k={self.top_k} experts do not fit into {self.top_groups} groups of {self.group_size}"
            )
        if self.grouped and self.group_score == "top2_sum" and self.group_size < 2:
            raise ValueError(f"top2_sum needs groups of at least two experts, not {self.group_size}")
        if not 0 <= self.zero_experts < self.num_experts:
            raise ValueError(f"zero_experts must be between 0 and num_experts - 1, not {self.zero_experts}")
        if self.softmax_after_topk and self.score != "softmax":
            raise ValueError(f"softmax_after_topk needs score 'softmax', not {self.score!r}")
        if self.norm_p <= 0:
            raise ValueError(f"norm_p must be positive, not {self.norm_p}")
        if self.capacity is not None and self.capacity_fraction is not None:
            raise ValueError("give capacity or capacity_fraction, not both")
        if self.score == "sparsemixer" and (self.grouped or self.selection_bias or self.forced_experts):
            raise ValueError("sparsemixer knows no groups, selection bias or forced experts")
        if self.forced_experts and (self.grouped or self.selection_bias):
            raise ValueError("forced_experts leaves nothing for groups or a selection bias to choose")

    @property
    def group_size(self) -> int:
        """Experts per group."""
        return self.num_experts // self.num_groups

    @property
    def grouped(self) -> bool:
        """Whether groups restrict the choice."""
        return self.top_groups < self.num_groups

    @property
    def num_real_experts(self) -> int:
        """Experts that have weights."""
        return self.num_experts - self.zero_experts

    @property
    def drops(self) -> bool:
        """Whether an expert may turn rows away."""
        return self.capacity is not None or self.capacity_fraction is not None

    def capacity_for(self, num_rows: int) -> int:
        """Rows that one expert takes out of ``num_rows``."""
        if self.capacity_fraction is not None:
            return math.ceil(self.capacity_fraction * num_rows)
        return num_rows if self.capacity is None else self.capacity

    @cached_property
    def is_plain(self) -> bool:
        """Whether the rule is scores, top-k, weights and nothing else: what every kernel can do, on the hot path."""
        rest = (f for f in fields(self) if f.name not in _PLAIN)
        return self.score != "sparsemixer" and all(getattr(self, f.name) == f.default for f in rest)

    @property
    def is_regular(self) -> bool:
        """Whether the rule is scores, a choice by score, bias and groups, and weights that are divided by their sum."""
        others = self.zero_experts or self.forced_experts or self.drops or self.norm_p != 1
        return self.score != "sparsemixer" and not others
