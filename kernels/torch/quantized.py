"""Quantised weights in torch's own hands: kept as they are, dequantised when a product needs them. Slow, everywhere.

Shape suffixes are explained in ``types.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..api.formats import ActivationScheme
from ..api.packed_weight import PackedWeight
from ..api.quantized_weight import QuantizedWeight
from ..api.types import ExpertWeights, LinearWeights, Routing
from ..reference import quantized as quant_reference
from .experts import ExpertParts


@dataclass(frozen=True)
class QuantLinear:
    """A linear layer: its weight and how its input is rounded."""

    weight: QuantizedWeight
    bias_O: torch.Tensor | None
    scheme: ActivationScheme

    def run(self, x_TI: torch.Tensor) -> torch.Tensor:
        """(T, O), float32."""
        return quant_reference.linear(x_TI, self.weight, self.bias_O, self.scheme)

    def rows(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Rows of the weight, dequantised, (T, I), float32."""
        return self.weight.take(ids_T).dequantize()

    def tail(self, start: int) -> QuantLinear:
        """The layer that computes the outputs from ``start`` on."""
        bias_O = None if self.bias_O is None else self.bias_O[start:]
        return QuantLinear(self.weight.rows(start, self.weight.out_features), bias_O, self.scheme)


@dataclass(frozen=True)
class QuantExperts(ExpertParts[QuantizedWeight]):
    """The experts of a layer, and how their input is rounded."""

    scheme: ActivationScheme

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> QuantExperts:
        """The experts with every tensor changed; experts are its first dimension."""
        gate, up, down = (weight.map(change) for weight in self.weights)
        first, second, third = (None if bias is None else change(bias) for bias in self.biases)
        return QuantExperts(gate, up, down, first, second, third, self.scheme)

    def run(self, x_TD: torch.Tensor, routing: Routing, activation: str) -> torch.Tensor:
        """(T, D), float32."""
        return quant_reference.experts(x_TD, *self.weights, routing, activation, *self.biases, scheme=self.scheme)

    def run_all(self, x_TD: torch.Tensor, activation: str) -> torch.Tensor:
        """Every expert with weight 1, (T, D), float32."""
        experts = self.gate_EFD.num_experts
        assert experts is not None
        return self.run(x_TD, quant_reference.all_on(x_TD, experts), activation)


class QuantOperations:
    """How weights are quantised while they are loaded; a backend may have a faster way, and one around it."""

    def quantize(self, rounding: Callable[[torch.Tensor], QuantizedWeight], weight: torch.Tensor) -> QuantizedWeight:
        """``rounding(weight)``, maybe computed in another way, with the same bits.

        Raises:
            ValueError: as ``rounding`` does.
        """
        return rounding(weight)

    def packed_weight(self, weights: LinearWeights | ExpertWeights) -> PackedWeight | None:
        """What :meth:`packed_linear` or :meth:`packed_experts` makes the same weights of; None: there is no such thing,
        for weights that are not quantised, or with this backend."""
        return None

    def packed_linear(self, packed: PackedWeight, bias_O: torch.Tensor | None) -> LinearWeights:
        """A layer of which :meth:`packed_weight` was kept."""
        raise NotImplementedError

    def packed_experts(self, packed: PackedWeight, activation: str, *biases: torch.Tensor | None) -> ExpertWeights:
        """Experts of which :meth:`packed_weight` was kept; biases are those of :meth:`.TorchBackend.pack_experts`."""
        raise NotImplementedError

    def allocate(self, words: int) -> torch.Tensor:
        """Uninitialised memory for packed words, int32."""
        raise NotImplementedError


def check_experts(gate: QuantizedWeight, up: QuantizedWeight, down: QuantizedWeight) -> None:
    """Raise ValueError when the three do not fit together."""
    transposed = (*gate.shape[:-2], gate.shape[-1], gate.shape[-2])
    if gate.num_experts is None or up.shape != gate.shape or down.shape != transposed:
        raise ValueError(f"shapes of gate {gate.shape}, up {up.shape} and down {down.shape} do not fit together")
