"""Experts through torch's own grouped matrix product; everything else as :class:`TorchBackend` does it."""

from __future__ import annotations

import torch

from ..api.types import ExpertWeights, Routing
from .backend import TorchBackend
from .experts import PlainExperts, Product, grouped_products, run_experts
from .quantized import QuantExperts
from .split import SplitExperts


class GroupedMmBackend(TorchBackend):
    """Three grouped products per layer, no word from the device in between. Weights that torch's operation refuses
    (biases, rows that are not whole 16 bytes) run expert by expert, with one log line."""

    name = "grouped_mm"
    products: Product = staticmethod(grouped_products)  # of all experts at once

    def experts(self, x_TD: torch.Tensor, weights: ExpertWeights, routing: Routing) -> torch.Tensor:
        quantised = isinstance(weights.data, QuantExperts | SplitExperts)
        reason = "quantised experts" if quantised else self.refused(x_TD, weights.data)
        if reason is None:
            return run_experts(x_TD, weights.data, routing, weights.activation, self.products)
        self._fall_back(reason)
        return super().experts(x_TD, weights, routing)

    @staticmethod
    def refused(x_TD: torch.Tensor, plain: PlainExperts) -> str | None:
        """What about these rows and weights the product does not take, if anything."""
        if plain.biased:
            return "biases"
        if x_TD.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return str(x_TD.dtype)
        if x_TD.is_cuda and x_TD.dtype != torch.bfloat16:
            return f"{x_TD.dtype} on a GPU"
        return None if plain.aligned else "rows that are not whole 16 bytes"
