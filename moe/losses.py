"""Auxiliary losses that keep a router healthy while it trains.

Shape suffixes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import torch


def load_balancing_loss(probs_TE: torch.Tensor, expert_ids_TK: torch.Tensor) -> torch.Tensor:
    """``E * sum_e f_e p_e``: 1 when experts share the load evenly, E when one expert takes everything.

    f_e is the share of the T*K slots that went to expert e (no gradient), p_e the mean router probability of e.

    Arguments:
        probs_TE: softmax of the router's logits, float32.
        expert_ids_TK: chosen experts, any integer dtype.

    Returns: float32 scalar. Source: Switch Transformer, Fedus et al. 2021, eq. 4, over K slots.
    """
    num_experts = probs_TE.shape[1]
    load_E = torch.bincount(expert_ids_TK.flatten().long(), minlength=num_experts).float()
    return num_experts * torch.dot(load_E / load_E.sum(), probs_TE.mean(0))


def router_z_loss(logits_TE: torch.Tensor) -> torch.Tensor:
    """Mean squared log-sum-exp of the router's logits, which keeps them small (ST-MoE, Zoph et al. 2022, eq. 5).

    Arguments:
        logits_TE: router logits; reduced in float32.

    Returns: float32 scalar.
    """
    return logits_TE.float().logsumexp(-1).square().mean()
