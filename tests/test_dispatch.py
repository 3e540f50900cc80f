"""The exchange of a mixture, planned: every row goes to the ranks of its experts, and their sums are the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dynamoe.kernels import reference
from dynamoe.kernels.types import Routing
from dynamoe.moe.dispatch import UNUSED, arrived, plan_sends, share_experts


def random_routing(rows: int, experts: int, top_k: int, limited: bool) -> Routing:
    generator = torch.Generator().manual_seed(rows)
    ids = torch.rand(rows, experts, generator=generator).argsort(1)[:, :top_k].int()
    weights = torch.rand(rows, top_k, generator=generator)
    counts = torch.randint(1, top_k + 1, (rows,), generator=generator).int() if limited else None
    return Routing(expert_ids_TK=ids.contiguous(), weights_TK=weights, counts_T=counts)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("parts", [[[0, 1, 2, 3], [4, 5]], [[5, 0], [2], [1, 3, 4]], [[0], [1], [2], [3], [4], [5]]])
def test_the_sums_of_all_ranks_are_the_whole(parts: list[list[int]], limited: bool, on_input: bool) -> None:
    rows, hidden, size = 9, 8, 5
    gate, up, down = (torch.randn(6, *shape) for shape in ((size, hidden), (size, hidden), (hidden, size)))
    x = torch.randn(rows, hidden)
    routing = replace(random_routing(rows, 6, 3, limited), weight_on_input=on_input)
    sends = plan_sends(routing, share_experts(parts, 3, "cpu"))
    used = routing.counts_T.sum() if routing.counts_T is not None else rows * 3
    assert sends.counts_XT.sum() == used
    total = torch.zeros(rows, hidden)
    for rank, experts in enumerate(parts):
        going = sends.counts_XT[rank] > 0
        there = arrived(sends.expert_ids_XTQ[rank][going], sends.weights_XTQ[rank][going], on_input)
        assert there.counts_T is not None
        assert there.counts_T.tolist() == sends.counts_XT[rank][going].tolist()
        weights = (gate[experts], up[experts], down[experts])
        total[going] += reference.experts(x[going], *weights, there, "silu")
    torch.testing.assert_close(total, reference.experts(x, gate, up, down, routing, "silu"))


def test_slots_keep_their_order_and_unused_ones_come_last() -> None:
    ids = torch.tensor([[5, 0, 3], [2, 1, 0]], dtype=torch.int32)
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]])
    counts = torch.tensor([3, 2], dtype=torch.int32)  # the second row's last slot is unused
    shares = share_experts([[2, 1, 0], [3, 4, 5]], 3, "cpu")
    sends = plan_sends(Routing(expert_ids_TK=ids, weights_TK=weights, counts_T=counts), shares)
    assert sends.counts_XT.tolist() == [[1, 2], [2, 0]]
    assert sends.expert_ids_XTQ[0].tolist() == [[2, UNUSED, UNUSED], [0, 1, UNUSED]]
    assert sends.expert_ids_XTQ[1].tolist() == [[2, 0, UNUSED], [UNUSED] * 3]
    assert torch.equal(sends.weights_XTQ[0], torch.tensor([[0.3, 0, 0], [0.6, 0.3, 0]]))
    assert torch.equal(sends.weights_XTQ[1], torch.tensor([[0.5, 0.2, 0], [0, 0, 0]]))


def test_a_rank_gets_no_more_slots_than_it_has_experts() -> None:
    shares = share_experts([[0, 1], [2, 3, 4]], 5, "cpu")
    assert (shares.top_k, shares.slots) == (5, 3)
    sends = plan_sends(random_routing(4, 5, 5, limited=False), shares)
    assert sends.expert_ids_XTQ.shape == (2, 4, 3)
    assert sends.counts_XT.tolist() == [[2] * 4, [3] * 4]
    nobody = plan_sends(random_routing(0, 5, 5, limited=True), shares)
    assert nobody.expert_ids_XTQ.shape == (2, 0, 3)
