"""Oracles of what happens at an exit: the probe's logits, which rows exit, and the entropy of a router's choice.

Shape suffixes as in ``types.py``; J inner width of a probe, X its inputs: the hidden state, then the state at the exit
before, then the entropy of the routers in between, each where the probe looks at it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..api.types import ExitDecision, ProbeWeights

PROBE_EPS = 1e-6


def normalize(x_TD: torch.Tensor) -> torch.Tensor:
    """Rows scaled to unit root-mean-square, in float32: a probe sees directions, not the residual's growing size."""
    x_TD = x_TD.float()
    return x_TD * torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + PROBE_EPS)


def probe_logits(
    x_TD: torch.Tensor,
    weights: ProbeWeights,
    previous_TD: torch.Tensor | None = None,
    router_entropy_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """A probe's logits, float32, (T,): positive where agreement with the full model is more likely than not.

    Arguments:
        x_TD: residual stream at the exit.
        previous_TD: residual stream at the exit before (at the first exit: the embedding), if the probe looks at it.
        router_entropy_T: mean entropy of the routers since then, in nats, if the probe looks at it.
    """
    parts = [normalize(x_TD)]
    if weights.previous:
        assert previous_TD is not None
        parts.append(normalize(previous_TD))
    if weights.router_entropy:
        assert router_entropy_T is not None
        parts.append(router_entropy_T.float()[:, None])
    inner_TJ = F.linear(torch.cat(parts, -1), weights.weight_JX, weights.bias_J)
    if weights.out_J is None:
        return inner_TJ[:, 0]
    assert weights.out_bias is not None
    return F.silu(inner_TJ) @ weights.out_J + weights.out_bias


def exit_decide(
    x_TD: torch.Tensor,
    weights: ProbeWeights,
    thresholds_T: torch.Tensor,
    previous_TD: torch.Tensor | None = None,
    router_entropy_T: torch.Tensor | None = None,
) -> ExitDecision:
    """Probe every row and sort the rows into those that continue and those that exit.

    Arguments:
        thresholds_T: float32; a row exits when its logit is at least this. With +inf it never exits.
        Others as for :func:`probe_logits`.
    """
    logits_T = probe_logits(x_TD, weights, previous_TD, router_entropy_T)
    exits_T = (logits_T >= thresholds_T) & (thresholds_T < torch.inf)
    order_T = exits_T.int().argsort(stable=True)
    return ExitDecision(logits_T=logits_T, order_T=order_T, num_staying=int((~exits_T).sum()))


def router_entropy(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Entropy of the softmax over all experts, mean of some layers, in nats, float32, (T,).

    Arguments:
        logits: (T, E) of every layer, at least one.
    """
    return torch.stack([torch.special.entr(logits_TE.float().softmax(-1)).sum(-1) for logits_TE in logits]).mean(0)
