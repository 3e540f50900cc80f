"""The mixture of experts on torch's own matrix products: rows sorted by expert, one product per expert or one for all.

Shape suffixes are explained in ``types.py``; N is T · K, the slots of all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F

from ..api.types import Routing
from ..reference import operations as reference

WeightT = TypeVar("WeightT")


@dataclass(frozen=True)
class ExpertParts(Generic[WeightT]):
    """The weights of a layer's experts; biases may be missing."""

    gate_EFD: WeightT
    up_EFD: WeightT
    down_EDF: WeightT
    gate_bias_EF: torch.Tensor | None
    up_bias_EF: torch.Tensor | None
    down_bias_ED: torch.Tensor | None

    @property
    def weights(self) -> tuple[WeightT, WeightT, WeightT]:
        return self.gate_EFD, self.up_EFD, self.down_EDF

    @property
    def biases(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        return self.gate_bias_EF, self.up_bias_EF, self.down_bias_ED


@dataclass(frozen=True)
class PlainExperts(ExpertParts[torch.Tensor]):
    """Expert weights as plain tensors."""

    @property
    def biased(self) -> bool:
        return any(bias is not None for bias in self.biases)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PlainExperts:
        """The experts with every tensor changed; experts are its first dimension."""
        return replace(self, **{name: change(t) for name, t in vars(self).items() if t is not None})

    @property
    def aligned(self) -> bool:
        """Whether rows are contiguous, and whole 16 bytes apart and long: what grouped products of torch take."""
        return all(
            t.stride(-1) == 1 and not any(n * t.element_size() % 16 for n in (*t.shape[1:], *t.stride()[:-1]))
            for t in self.weights
        )


Product = Callable[[torch.Tensor, PlainExperts, torch.Tensor, str], torch.Tensor]
SlotProduct = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def run_experts(
    x_TD: torch.Tensor, weights: PlainExperts, routing: Routing, activation: str, product: Product | None = None
) -> torch.Tensor:
    """The weighted sum of each row's experts, (T, D): what :func:`reference.experts` computes.

    On a GPU, bfloat16 weights without biases go through grouped products, which need no word from the device;
    everything else runs expert by expert, which needs one. ``product`` takes the place of this choice.
    """
    if product is None:
        product = grouped_products if can_group(x_TD, weights) else products_one_by_one
    return weighted_sum(
        x_TD, routing, weights.gate_EFD.shape[0], lambda rows_ND, ends_E: product(rows_ND, weights, ends_E, activation)
    )


def weighted_sum(x_TD: torch.Tensor, routing: Routing, num_experts: int, product: SlotProduct) -> torch.Tensor:
    """As :func:`run_experts`: ``product`` takes every slot's row, sorted by expert, and where each expert's end."""
    num_rows, top_k = routing.expert_ids_TK.shape
    order_N, ends_E = slots_by_expert(routing, num_experts)
    rows_ND = x_TD[order_N // top_k]
    weights_TK = routing.weights_TK
    if routing.weight_on_input:
        rows_ND = (rows_ND * weights_TK.flatten()[order_N, None]).to(x_TD.dtype)
        weights_TK = torch.ones_like(weights_TK)
    slots_TKD = torch.empty_like(rows_ND)
    slots_TKD[order_N] = product(rows_ND, ends_E)
    slots_TKD = slots_TKD.view(num_rows, top_k, x_TD.shape[1])
    if routing.counts_T is not None:
        unused_TK = ~routing.used_TK
        slots_TKD.masked_fill_(unused_TK[..., None], 0.0)  # whatever lies there, even NaN
        weights_TK = weights_TK.masked_fill(unused_TK, 0.0)
    out_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    for k in range(top_k):
        out_TD.addcmul_(slots_TKD[:, k].float(), weights_TK[:, k, None])
    if routing.identity_weights_T is not None:
        out_TD.addcmul_(x_TD.float(), routing.identity_weights_T[:, None])
    return out_TD.to(x_TD.dtype)


def slots_by_expert(routing: Routing, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slot numbers (``t * K + k``, int64) sorted by expert, unused ones last, and where each expert's slots end."""
    ids_TK = routing.expert_ids_TK
    if routing.counts_T is not None:
        ids_TK = torch.where(routing.used_TK, ids_TK, num_experts)
    sorted_N, order_N = ids_TK.flatten().sort(stable=True)
    experts_E = torch.arange(num_experts, dtype=sorted_N.dtype, device=sorted_N.device)
    return order_N, torch.searchsorted(sorted_N, experts_E, right=True, out_int32=True)


def can_group(x_TD: torch.Tensor, weights: PlainExperts) -> bool:
    """Whether torch's grouped product takes these weights: bfloat16 on a GPU, rows of whole 16 bytes, no biases."""
    return x_TD.is_cuda and x_TD.dtype == torch.bfloat16 and not weights.biased and weights.aligned


def grouped_products(
    rows_ND: torch.Tensor, weights: PlainExperts, ends_E: torch.Tensor, activation: str
) -> torch.Tensor:
    """Every sorted row through its expert, (N, D), three launches for all experts; unused rows come out undefined."""
    gate_NF = F.grouped_mm(rows_ND, weights.gate_EFD.transpose(1, 2), offs=ends_E)
    up_NF = F.grouped_mm(rows_ND, weights.up_EFD.transpose(1, 2), offs=ends_E)
    hidden_NF = reference.activate(gate_NF, up_NF, activation)
    return F.grouped_mm(hidden_NF, weights.down_EDF.transpose(1, 2), offs=ends_E)


def products_one_by_one(
    rows_ND: torch.Tensor, weights: PlainExperts, ends_E: torch.Tensor, activation: str
) -> torch.Tensor:
    """Every sorted row through its expert, (N, D); unused rows come out undefined."""
    out_ND = torch.empty_like(rows_ND)
    begin = 0
    for expert, end in enumerate(ends_E.tolist()):
        if begin == end:
            continue
        x = rows_ND[begin:end]
        gate = F.linear(x, weights.gate_EFD[expert], _of(weights.gate_bias_EF, expert))
        up = F.linear(x, weights.up_EFD[expert], _of(weights.up_bias_EF, expert))
        hidden = reference.activate(gate, up, activation)
        out_ND[begin:end] = F.linear(hidden, weights.down_EDF[expert], _of(weights.down_bias_ED, expert))
        begin = end
    return out_ND


def _of(biases: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    return None if biases is None else biases[expert]
