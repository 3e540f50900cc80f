"""Layers whose parts are packed by themselves, run by themselves, and keep their formats: parts in different formats,
and experts without gates.

Shape suffixes are explained in ``types.py``; N rows that are sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from ..api.types import LinearWeights, Routing
from ..reference import operations as reference
from ..reference.quantized import all_on
from .experts import weighted_sum

_VECTOR = 64  # elements; no instruction set takes more at once
_SERIAL = 32768  # elements that torch does not share out among threads

Linear = Callable[[torch.Tensor, LinearWeights], torch.Tensor]


@dataclass(frozen=True)
class SplitLinear:
    """Linear layers with the same inputs, whose outputs follow each other; ``linear`` is the backend's."""

    parts: tuple[LinearWeights, ...]
    linear: Linear = field(repr=False)

    def run(self, x_TI: torch.Tensor) -> torch.Tensor:
        """(T, O), of x's dtype."""
        return torch.cat([self.linear(x_TI, part) for part in self.parts], -1)

    def tail(self, start: int, tail_of: Callable[[LinearWeights, int], LinearWeights]) -> LinearWeights:
        """The layer that computes the outputs from ``start`` on; ``tail_of`` gives that of a part."""
        for number, part in enumerate(self.parts):
            if start < part.out_features:
                first = tail_of(part, start) if start else part
                return replace(join_linear((first, *self.parts[number + 1 :]), self.linear), nbytes=0)
            start -= part.out_features
        raise AssertionError("a tail has outputs")


@dataclass(frozen=True)
class SplitExperts:
    """Experts whose projections are linear layers of their own, one for each expert; ``linear`` is the backend's.

    Without gates an expert is the activation between two of them.
    """

    gate: tuple[LinearWeights, ...]
    up: tuple[LinearWeights, ...]
    down: tuple[LinearWeights, ...]
    activation: str
    linear: Linear = field(repr=False)

    def run(self, x_TD: torch.Tensor, routing: Routing | None) -> torch.Tensor:
        """(T, D), of x's dtype; without a routing every row uses every expert with weight 1."""
        routing = all_on(x_TD, len(self.down)) if routing is None else routing
        return weighted_sum(x_TD, routing, len(self.down), self._products)

    def _products(self, rows_ND: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        """Every sorted row through its expert, (N, D); unused rows come out undefined."""
        out_ND = torch.empty_like(rows_ND)
        begin, linear = 0, self.linear
        for expert, end in enumerate(ends_E.tolist()):
            if begin < end:
                x = rows_ND[begin:end].contiguous()
                gate_NF = linear(x, self.gate[expert]) if self.gate else None
                inner_NF = _activated(gate_NF, linear(x, self.up[expert]), self.activation)
                out_ND[begin:end] = linear(inner_NF, self.down[expert])
            begin = end
        return out_ND


def join_linear(parts: tuple[LinearWeights, ...], linear: Linear) -> LinearWeights:
    """Linear layers with the same inputs as one; ``linear`` runs one."""
    if len(parts) == 1:
        return parts[0]
    return LinearWeights(
        out_features=sum(part.out_features for part in parts),
        in_features=parts[0].in_features,
        dtype=parts[0].dtype,
        data=SplitLinear(parts, linear),
        nbytes=sum(part.nbytes for part in parts),
    )


def _activated(gate_NF: torch.Tensor | None, up_NF: torch.Tensor, activation: str) -> torch.Tensor:
    """The rows' activations, whose bits do not depend on the number of rows.

    torch computes what is left over at the end of a tensor, or of a thread's share of it, one by one and with another
    exponential. So rows are whole vectors here, and few enough for one thread.
    """
    width = up_NF.shape[1]
    if gate_NF is None or gate_NF.is_cuda:  # squares need no exponential
        return reference.activate(gate_NF, up_NF, activation)
    rows = max(1, _SERIAL // (width + _VECTOR))
    wide = [F.pad(part, (0, -width % _VECTOR)).split(rows) for part in (gate_NF, up_NF)]
    return torch.cat([reference.activate(gate, up, activation) for gate, up in zip(*wide, strict=True)])[:, :width]
