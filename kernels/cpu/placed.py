"""Quantised experts whose blocks lie anywhere in memory, where something else has put them before they run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

from ..api.types import ExpertWeights, Routing
from .quantized import CpuQuantExperts, Layout

_Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class ExpertSource(Protocol):
    """Has the experts of a layer in memory when they run."""

    def bring(self, x_TD: torch.Tensor, routing: Routing | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Words of memory, and where in them the two parts of each expert that is used begin: (2, E), int64, bytes.

        They stay there until the next call. Without a routing all are used.
        """
        ...


@dataclass(frozen=True)
class CpuPlacedExperts:
    """As :class:`.CpuQuantExperts`, with a source in place of the blocks."""

    isa: int
    gate_up_layout: Layout
    down_layout: Layout
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    shape: tuple[int, int, int, int]
    source: ExpertSource = field(repr=False)

    def run(self, x_TD: torch.Tensor, routing: Routing | None) -> torch.Tensor:
        """(T, D); without a routing every row uses every expert with weight 1."""
        words, places_2E = self.source.bring(x_TD, routing)
        packed = (words, self.gate_up_layout, words, self.down_layout, self.gate_up_bias, self.down_bias)
        parts: tuple[Any, ...] = (None, None, None)
        if routing is not None:
            parts = (routing.expert_ids_TK, routing.weights_TK, routing.counts_T)
        return torch.ops.dynamoe_cpu.quant_experts.default(self.isa, x_TD, *packed, self.shape, *parts, places_2E)


@dataclass(frozen=True)
class ExpertParts:
    """Packed experts as bytes, and what the kernels have to know beside them.

    Arguments:
        gate_up, down: (E, bytes).
        shared: the biases of all, one behind the other.
        facts: JSON: layouts, shape, activation, whether there are biases.
    """

    gate_up: _Bytes
    down: _Bytes
    shared: bytes
    facts: Any

    @classmethod
    def of(cls, weights: ExpertWeights) -> ExpertParts | None:
        """Those of a layer; None where it is not quantised, or not in one format."""
        data = weights.data
        if not isinstance(data, CpuQuantExperts):
            return None
        gate_up, down = (
            packed.view(weights.num_experts, -1).numpy().view(np.uint8) for packed in (data.gate_up, data.down)
        )
        biases = [None if bias is None else bias.numpy() for bias in (data.gate_up_bias, data.down_bias)]
        facts = {
            "layouts": [list(data.gate_up_layout), list(data.down_layout)],
            "shape": list(data.shape),
            "activation": weights.activation,
            "nbytes": weights.nbytes,
            "biases": [0 if bias is None else bias.size for bias in biases],
        }
        shared = b"".join(bias.tobytes() for bias in biases if bias is not None)
        return cls(gate_up, down, shared, facts)


def placed_experts(isa: int, dtype: torch.dtype, facts: Any, shared: bytes, source: ExpertSource) -> ExpertWeights:
    """Experts out of what :class:`ExpertParts` says of them, whose blocks come from a source."""
    values, biases = torch.frombuffer(bytearray(shared), dtype=torch.float32) if shared else torch.empty(0), []
    for part, count in zip(values.split(facts["biases"]), facts["biases"], strict=True):
        biases.append(part.clone() if count else None)
    gate_up_bias, down_bias = biases
    gate_up_layout, down_layout = (Layout(*numbers) for numbers in facts["layouts"])
    experts, hidden, width, activation = facts["shape"]
    shape = experts, hidden, width, activation
    data = CpuPlacedExperts(isa, gate_up_layout, down_layout, gate_up_bias, down_bias, shape, source)
    weights = ExpertWeights.of((experts, width, hidden), facts["activation"], dtype, data)
    return replace(weights, nbytes=facts["nbytes"])
