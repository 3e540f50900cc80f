"""Experts through torch's own grouped matrix product; everything else as :class:`TorchBackend` does it."""

from __future__ import annotations

import torch

from ..api.types import ExpertWeights, Routing
from .backend import TorchBackend
from .experts import PlainExperts, grouped_products, run_experts
from .quantized import QuantExperts


class GroupedMmBackend(TorchBackend):
    """Three grouped products per layer, no word from the device in between. Weights that torch's operation refuses
    (biases, rows that are not whole 16 bytes) run expert by expert, with one log line."""

    name = "grouped_mm"

    def experts(self, x_TD: torch.Tensor, weights: ExpertWeights, routing: Routing) -> torch.Tensor:
        if isinstance(weights.data, QuantExperts):
            self._fall_back("quantised experts")
            return super().experts(x_TD, weights, routing)
        reason = self._refused(x_TD, weights.data)
        if reason is None:
            return run_experts(x_TD, weights.data, routing, weights.activation, grouped_products)
        self._fall_back(reason)
        return super().experts(x_TD, weights, routing)

    def _refused(self, x_TD: torch.Tensor, plain: PlainExperts) -> str | None:
        if plain.gate_bias_EF is not None or plain.up_bias_EF is not None or plain.down_bias_ED is not None:
            return "biases"
        if x_TD.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return str(x_TD.dtype)
        if x_TD.is_cuda and x_TD.dtype != torch.bfloat16:
            return f"{x_TD.dtype} on a GPU"
        size = x_TD.element_size()
        for tensor in (plain.gate_EFD, plain.up_EFD, plain.down_EDF):
            rows = (*tensor.shape[1:], *tensor.stride()[:-1])
            if tensor.stride(-1) != 1 or any(n * size % 16 for n in rows):
                return "rows that are not whole 16 bytes"
        return None
