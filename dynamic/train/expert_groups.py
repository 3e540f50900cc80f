"""Experts spread over a group of ranks: rows are sent to their experts and back, and so are gradients.

Every rank of the group holds an equal, consecutive part of each mixture's experts. The numbers of rows are
exchanged first, so no row is dropped or padded. A rank without rows takes part with none.

Shape suffixes: T tokens, D hidden size, E experts, K experts per token, F width of one expert, R = T*K sorted rows of
this rank, A received rows, G ranks of the group.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_to_all_single

from ...moe.trainable_experts import arranged, combine, dispatch, gated_experts


def _exchange(rows: torch.Tensor, sent: list[int], received: list[int], group: Any) -> torch.Tensor:
    """Sends rows to their ranks, and their gradients back."""
    found = rows.new_empty(sum(received), *rows.shape[1:])
    return all_to_all_single(found, rows.contiguous(), received, sent, group=group)


def spread_mixture(
    x_TD: torch.Tensor,
    gate_up_EID: torch.Tensor,
    down_EDF: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    group: Any,
) -> torch.Tensor:
    """As :func:`.trainable_experts.mixture` where every rank of a group holds a part of the experts. All ranks call it.

    Arguments:
        gate_up_EID, down_EDF: of this rank's experts only.
        expert_ids_TK: numbers among all experts of the group.
        group: process group; its ranks hold consecutive experts, in their order.
    """
    ranks, here, top_k = dist.get_world_size(group), gate_up_EID.shape[0], expert_ids_TK.shape[1]
    order_R, inverse_R, counts = arranged(expert_ids_TK.flatten(), ranks * here)
    counts_GE = counts.view(ranks, here)
    received_GE = torch.empty_like(counts_GE)
    dist.all_to_all_single(received_GE, counts_GE, group=group)
    sent, received = counts_GE.sum(1).tolist(), received_GE.sum(1).tolist()
    weights_R1 = weights_TK.flatten()[order_R].to(x_TD.dtype)[:, None]
    # One exchange for both.
    rows = torch.cat([dispatch(x_TD, order_R, inverse_R, top_k), weights_R1], 1)
    received_A = _exchange(rows, sent, received, group)
    # Received rows lie rank by rank, each rank's in the order of the experts.
    numbers_A = torch.arange(here, device=x_TD.device).repeat(ranks).repeat_interleave(received_GE.flatten())
    order_A, inverse_A, counts_E = arranged(numbers_A, here)
    sorted_A = dispatch(received_A, order_A, inverse_A, 1)
    rows_AD, weights_A1 = sorted_A.split([x_TD.shape[1], 1], 1)
    y_AD = gated_experts(rows_AD.contiguous(), gate_up_EID, down_EDF, weights_A1, counts_E.tolist())
    returned_RD = _exchange(dispatch(y_AD, inverse_A, order_A, 1), received, sent, group)
    return combine(returned_RD, order_R, inverse_R, top_k)


def spread_experts(mixtures: Iterable[Any], group: Any) -> list[nn.Parameter]:
    """Reduce the layers to this rank's part of their experts. Every rank of the group must hold the same model.

    Arguments:
        mixtures: the model's :class:`.model.SparseMLP`, one per layer.
        group: process group; its size divides the number of experts.

    Returns: the parameters that hold experts.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    parameters: list[nn.Parameter] = []
    for mlp in mixtures:
        mlp.group = group
        for name in mlp.EXPERTS:
            part = nn.Parameter(getattr(mlp, name).detach().chunk(ranks)[rank].clone())
            setattr(mlp, name, part)
            parameters.append(part)
    return parameters


@torch.no_grad()
def collect_experts(part: torch.Tensor, group: Any) -> torch.Tensor:
    """All experts of a group, from each rank's part. All of its ranks call this."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts)
