"""Experts through MegaBlocks' grouped products (optional package, GPU only); the rest as in :class:`TorchBackend`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import torch

from ..reference import operations as reference
from .experts import PlainExperts
from .grouped_mm import GroupedMmBackend


class MegaBlocksBackend(GroupedMmBackend):
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
        self.products = partial(products, gmm=util.ops.gmm)

    @staticmethod
    def refused(x_TD: torch.Tensor, plain: PlainExperts) -> str | None:
        if plain.biased:
            return "biases"
        return None if all(t.is_contiguous() for t in plain.weights) else "weights that are views of wider ones"


def products(
    rows_ND: torch.Tensor,
    weights: PlainExperts,
    ends_E: torch.Tensor,
    activation: str,
    gmm: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """Every sorted row through its expert, (N, D); unused rows come out undefined.

    Arguments:
        gmm: ``gmm(a, b, sizes, trans_b)`` multiplies the rows of each group with that group's matrix. ``sizes`` is
            int64 on the host; ``a`` and ``b`` are contiguous.
    """
    ends = ends_E.cpu().long()
    sizes_E = torch.diff(ends, prepend=ends.new_zeros(1))
    used_ND = rows_ND[: int(ends[-1])]
    out_ND = torch.empty_like(rows_ND)
    if len(used_ND):
        gate_NF = gmm(used_ND, weights.gate_EFD, sizes_E, trans_b=True)
        up_NF = gmm(used_ND, weights.up_EFD, sizes_E, trans_b=True)
        hidden_NF = reference.activate(gate_NF, up_NF, activation)
        out_ND[: len(used_ND)] = gmm(hidden_NF, weights.down_EDF, sizes_E, trans_b=True)
    return out_ND
