"""Experts through MegaBlocks' grouped products (optional package, GPU only); the rest as in :class:`TorchBackend`."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from . import reference
from .torch_backend import TorchBackend
from .torch_experts import PlainExperts, run_experts
from .types import ExpertWeights, Routing


class MegaBlocksBackend(TorchBackend):
    """Dropless experts on ``megablocks.grouped_gemm_util`` (Gale et al. 2022). Group sizes go through the host.

    Raises:
        ValueError: without a GPU, in another dtype than bfloat16, or when the package or its extension is missing.
    """

    name = "megablocks"

    def __init__(self, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        if self.device.type != "cuda" or dtype != torch.bfloat16:
            raise ValueError(f"the megablocks backend runs bfloat16 on a GPU, not {dtype} on {str(device)!r}")
        try:
            util = importlib.import_module("megablocks.grouped_gemm_util")
        except ImportError as error:
            raise ValueError(f"the megablocks backend needs the package megablocks: {error}") from error
        if not util.grouped_gemm_is_available():
            raise ValueError("the megablocks backend needs the package grouped_gemm beside megablocks")
        self._gmm: Any = util.ops.gmm

    def experts(self, x_TD: torch.Tensor, weights: ExpertWeights, routing: Routing) -> torch.Tensor:
        plain: PlainExperts = weights.data
        if plain.gate_bias_EF is not None or plain.up_bias_EF is not None or plain.down_bias_ED is not None:
            return super().experts(x_TD, weights, routing)
        return run_experts(x_TD, plain, routing, weights.activation, self._products)

    def _products(
        self, rows_ND: torch.Tensor, weights: PlainExperts, ends_E: torch.Tensor, activation: str
    ) -> torch.Tensor:
        ends = ends_E.cpu().long()
        sizes_E = torch.diff(ends, prepend=ends.new_zeros(1))
        used_ND = rows_ND[: int(ends[-1])]
        gate_NF = self._gmm(used_ND, weights.gate_EFD, sizes_E, trans_b=True)
        up_NF = self._gmm(used_ND, weights.up_EFD, sizes_E, trans_b=True)
        out_ND = torch.empty_like(rows_ND)
        hidden_NF = reference.activate(gate_NF, up_NF, activation)
        out_ND[: used_ND.shape[0]] = self._gmm(hidden_NF, weights.down_EDF, sizes_E, trans_b=True)
        return out_ND
