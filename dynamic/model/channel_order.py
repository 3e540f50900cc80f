"""The order in which the decoder keeps the rows of a tensor, where a checkpoint has them in another one."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch

from ...kernels.api.quantized_weight import QuantizedWeight

Order = tuple[int, ...]
Weight = TypeVar("Weight", torch.Tensor, QuantizedWeight)


def in_order(weight: Weight, order: Order) -> Weight:
    """The rows of a tensor, or the outputs of a quantised one, in another order.

    Arguments:
        order: of the rows of one head, alike for all heads that are here: which comes to each place; empty leaves all.
    """
    if not order:
        return weight
    rows = torch.arange(weight.shape[0]).view(-1, len(order))[:, list(order)].flatten()
    if isinstance(weight, torch.Tensor):
        return weight[rows]
    if weight.block_out % len(order) == 0:  # heads stay within the blocks of outputs that share a scale
        return replace(weight, data=weight.data[rows])
    return weight.take(rows)


def inverse(order: Order) -> Order:
    """What puts rows back."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))
