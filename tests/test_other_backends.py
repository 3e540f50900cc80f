"""Backends on other people's grouped products: what they hand over to torch, and MegaBlocks' without MegaBlocks."""

from __future__ import annotations

import pytest
import torch
from dynamoe.kernels.api.router_spec import RouterSpec
from dynamoe.kernels.api.tolerance import TOLERANCE, error
from dynamoe.kernels.api.types import Routing
from dynamoe.kernels.reference import operations as reference
from dynamoe.kernels.select import select_backend
from dynamoe.kernels.torch import megablocks as megablocks_backend
from dynamoe.kernels.torch.backend import TorchBackend
from dynamoe.kernels.torch.experts import run_experts

SPEC = RouterSpec(num_experts=4, top_k=2)


def make_experts(width: int) -> list[torch.Tensor]:
    torch.manual_seed(6)
    sizes = ((4, width, 32), (4, width, 32), (4, 32, width))
    return [(torch.randn(size) * 0.2).bfloat16() for size in sizes]


def test_grouped_mm_says_once_what_torch_runs_instead(caplog: pytest.LogCaptureFixture) -> None:
    backend = select_backend("cpu", torch.bfloat16, "grouped_mm")
    x_TD, routing = torch.randn(7, 32).bfloat16(), reference.route(torch.randn(7, 4), SPEC)
    for width, said in ((24, 0), (21, 1), (21, 1)):  # rows of 21 bfloat16 are no multiple of 16 bytes
        parts = make_experts(width)
        out_TD = backend.experts(x_TD, backend.pack_experts(*parts, "silu"), routing)
        expected_TD = reference.experts(x_TD.float(), *(part.float() for part in parts), routing, "silu")
        assert error(out_TD, expected_TD) < TOLERANCE[torch.bfloat16]
        assert len(caplog.records) == said
    assert "the grouped_mm backend has no kernel for rows that are not whole 16 bytes" in caplog.text


def strict_gmm(a: torch.Tensor, b: torch.Tensor, batch_sizes: torch.Tensor, trans_b: bool) -> torch.Tensor:
    """A grouped product with the checks of the ``grouped_gemm`` package, row group by row group."""
    assert a.is_contiguous()
    assert b.is_contiguous()
    assert batch_sizes.dtype == torch.int64
    assert batch_sizes.device.type == "cpu"
    assert trans_b
    assert len(a) == batch_sizes.sum() > 0
    groups = a.split(batch_sizes.tolist())
    return torch.cat([rows @ matrix.T for rows, matrix in zip(groups, b, strict=True)])


@pytest.mark.parametrize("counts", [None, [2, 1, 0, 2, 1, 0, 2], [0] * 7], ids=["all", "some", "none"])
def test_megablocks_products(counts: list[int] | None) -> None:
    parts, x_TD = make_experts(24), torch.randn(7, 32).bfloat16()
    routing = reference.route(torch.randn(7, 4), SPEC)
    counts_T = None if counts is None else torch.tensor(counts, dtype=torch.int32)
    routing = Routing(expert_ids_TK=routing.expert_ids_TK, weights_TK=routing.weights_TK, counts_T=counts_T)
    plain = TorchBackend("cpu", torch.bfloat16).pack_experts(*parts, "silu").data

    def products(*arguments: object) -> torch.Tensor:
        return megablocks_backend.products(*arguments, gmm=strict_gmm)  # type: ignore[arg-type]

    out_TD = run_experts(x_TD, plain, routing, "silu", products)
    expected_TD = reference.experts(x_TD.float(), *(part.float() for part in parts), routing, "silu")
    assert error(out_TD, expected_TD) < TOLERANCE[torch.bfloat16]


def test_megablocks_hands_over_what_its_product_refuses() -> None:
    gate, up, down = make_experts(24)
    pack, x_TD = TorchBackend("cpu", torch.bfloat16).pack_experts, torch.ones(1, 32)
    refused = megablocks_backend.MegaBlocksBackend.refused
    assert refused(x_TD, pack(gate, up, down, "silu").data) is None
    assert refused(x_TD, pack(gate, up, down, "silu", torch.ones(4, 24)).data) == "biases"
    view = down.permute(1, 0, 2).reshape(32, 96).view(32, 4, 24).permute(1, 0, 2)
    assert refused(x_TD, pack(gate, up, view, "silu").data) == "weights that are views of wider ones"


def test_megablocks_is_refused_without_a_gpu() -> None:
    with pytest.raises(ValueError, match="megablocks backend runs bfloat16 on a GPU"):
        select_backend("cpu", torch.bfloat16, "megablocks")
