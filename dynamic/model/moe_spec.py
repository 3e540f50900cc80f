"""The mixture of one layer, as data."""

from __future__ import annotations

from dataclasses import dataclass

from ...kernels.api.router_spec import RouterSpec
from ...kernels.api.uncommon import ROUTING, SHARED_EXPERTS


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    """The mixture of one layer.

    Arguments:
        router: the rule that chooses among the routed experts.
        router_bias: the router's linear layer has a bias, which is part of the logits.
        expert_size: neurons of one expert.
        num_always_on: experts in front of the routed ones that every token uses with weight 1.
        shared_size: neurons of a shared expert beside the mixture, or of several together; 0 is none.
        shared_gate: the shared expert's output is multiplied by the sigmoid of a gate.
        shared_scale: factor on the shared expert's output.
        expert_bias: whether the projections of routed experts have biases.
        latent_size: channels of what experts read and give: one projection makes it of the hidden state, another the
            mixture's output of it; 0: experts read and give the hidden state itself.
    """

    router: RouterSpec
    expert_size: int
    num_always_on: int = 0
    shared_size: int = 0
    shared_gate: bool = False
    shared_scale: float = 1.0
    router_bias: bool = False
    expert_bias: bool = False
    latent_size: int = 0

    @property
    def num_experts(self) -> int:
        """Routed and always-on experts together."""
        return self.router.num_experts + self.num_always_on

    @property
    def uncommon(self) -> set[str]:
        """See :attr:`.ModelSpec.uncommon`."""
        rules = {ROUTING} if self.router.float32_logits or not self.router.is_plain else set[str]()
        return rules | ({SHARED_EXPERTS} if self.shared_size else set())

    @property
    def is_dense(self) -> bool:
        """Every expert has weight 1 for every token, so that the router decides nothing."""
        return self.router.score == "constant" and self.router.top_k == self.router.num_experts
