"""The exchange of a mixture, planned: every row goes to the ranks of its experts, and their sums are the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dynamoe.kernels.api.types import Routing
from dynamoe.kernels.reference import operations as reference
from dynamoe.moe.dispatch import UNUSED, share_experts, used_ids


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
    shares, ids = share_experts(parts, 3, "cpu"), used_ids(routing)
    reached = shares.reached(ids, x)
    assert reached.sum() == (rows * 3 if routing.counts_T is None else routing.counts_T.sum())
    total = torch.zeros(rows, hidden)
    for rank, experts in enumerate(parts):
        going = reached[rank].any(1)
        there = shares.on_rank(rank, ids[going], routing.weights_TK[going], on_input)
        assert there.counts_T is not None
        assert there.counts_T.tolist() == reached[rank].sum(1)[going].tolist()
        weights = (gate[experts], up[experts], down[experts])
        total[going] += reference.experts(x[going], *weights, there, "silu")
    torch.testing.assert_close(total, reference.experts(x, gate, up, down, routing, "silu"))


def test_slots_keep_their_order_and_unused_ones_come_last() -> None:
    ids = torch.tensor([[5, 0, 3], [2, 1, 0]], dtype=torch.int32)
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]])
    counts = torch.tensor([3, 2], dtype=torch.int32)  # the second row's last slot is unused
    shares = share_experts([[2, 1, 0], [3, 4, 5]], 3, "cpu")
    used = used_ids(Routing(expert_ids_TK=ids, weights_TK=weights, counts_T=counts))
    assert used.tolist() == [[5, 0, 3], [2, 1, UNUSED]]
    assert shares.reached(used, torch.zeros(2, 4)).sum(2).tolist() == [[1, 2], [2, 0]]
    first, second = (shares.on_rank(rank, used, weights, False) for rank in (0, 1))
    assert first.counts_T is not None
    assert second.counts_T is not None
    assert (first.counts_T.tolist(), second.counts_T.tolist()) == ([1, 2], [2, 0])
    assert (first.expert_ids_TK[0, 0], first.expert_ids_TK[1, :2].tolist()) == (2, [0, 1])
    assert second.expert_ids_TK[0, :2].tolist() == [2, 0]
    assert torch.equal(first.weights_TK, torch.tensor([[0.3, 0, 0], [0.6, 0.3, 0]]))
    assert torch.equal(second.weights_TK, torch.tensor([[0.5, 0.2, 0], [0, 0, 0]]))


def test_a_rank_has_no_more_slots_than_experts() -> None:
    shares = share_experts([[0, 1], [2, 3, 4]], 5, "cpu")
    routing = random_routing(4, 5, 5, limited=False)
    for rank, slots in enumerate((2, 3)):
        there = shares.on_rank(rank, used_ids(routing), routing.weights_TK, False)
        assert there.expert_ids_TK.shape == there.weights_TK.shape == (4, slots)
    nobody = random_routing(0, 5, 5, limited=True)
    assert shares.on_rank(1, used_ids(nobody), nobody.weights_TK, False).expert_ids_TK.shape == (0, 3)
