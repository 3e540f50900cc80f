"""Routing kernels against the oracle: every rule, and the tables that grouped GEMMs walk."""

from __future__ import annotations

import pytest
import torch
from dynamoe.kernels.api.router_spec import RouterSpec
from dynamoe.kernels.api.types import Routing
from dynamoe.kernels.reference import operations as reference
from dynamoe.kernels.triton.device import A100
from dynamoe.kernels.triton.index import ExpertIndex, max_row_tiles, plan_index
from dynamoe.kernels.triton.launch import Launch
from dynamoe.kernels.triton.router import FusedRoute, RouteCall

# The interpreter computes lanes that a mask discards later, and numpy warns about them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RULES = {
    "softmax": RouterSpec(num_experts=12, top_k=3),
    "softmax, renormalised": RouterSpec(num_experts=8, top_k=2, renormalize=True),
    "p-norm 2": RouterSpec(num_experts=8, top_k=3, renormalize=True, norm_p=2.0),
    "p-norm 3": RouterSpec(num_experts=8, top_k=3, renormalize=True, norm_p=3.0),
    "norm floor": RouterSpec(num_experts=8, top_k=2, renormalize=True, norm_floor=0.6, selection_bias=True),
    "top-k then softmax": RouterSpec(num_experts=9, top_k=4, softmax_after_topk=True),
    "sigmoid, groups by two best": RouterSpec(
        num_experts=16, top_k=3, score="sigmoid", renormalize=True, norm_epsilon=1e-20, scale=2.5, selection_bias=True,
        num_groups=4, top_groups=2, group_score="top2_sum",
    ),
    "softmax, groups by best, sizes no power of two": RouterSpec(num_experts=15, top_k=4, num_groups=5, top_groups=3),
    "sqrt-softplus": RouterSpec(num_experts=8, top_k=2, score="sqrt_softplus", renormalize=True, selection_bias=True),
    "constant": RouterSpec(num_experts=8, top_k=3, score="constant"),
    "sparsemixer": RouterSpec(num_experts=10, top_k=2, score="sparsemixer", jitter=0.2),
    "zero experts": RouterSpec(num_experts=10, top_k=4, zero_experts=4, selection_bias=True),
    "forced experts": RouterSpec(num_experts=8, top_k=3, score="sqrt_softplus", renormalize=True, forced_experts=True),
    "expert scale": RouterSpec(num_experts=8, top_k=2, renormalize=True, expert_scale=True),
    "K = 1": RouterSpec(num_experts=7, top_k=1, score="sigmoid", weight_on_input=True),
    "K = E": RouterSpec(num_experts=5, top_k=5),
    "one expert": RouterSpec(num_experts=1, top_k=1),
}  # fmt: skip


def tensors_for(spec: RouterSpec, num_tokens: int) -> dict[str, torch.Tensor]:
    given = {}
    if spec.selection_bias:
        given["selection_bias_E"] = torch.randn(spec.num_experts, device=DEVICE) * 0.3
    if spec.expert_scale:
        given["expert_scale_E"] = torch.rand(spec.num_experts, device=DEVICE) + 0.5
    if spec.forced_experts:
        rows = [torch.randperm(spec.num_experts)[: spec.top_k] for _ in range(num_tokens)]
        given["forced_ids_TK"] = torch.stack(rows).to(DEVICE)
    return given


def plan_route(call: RouteCall) -> tuple[Routing, list[Launch]]:
    assert FusedRoute().refuses(call.problem(), A100) is None
    return FusedRoute().plan(call, {}, A100)


def run_route(logits_TE: torch.Tensor, spec: RouterSpec, block_m: int | None = 16, **given: torch.Tensor) -> Routing:
    ticket = torch.zeros(1, dtype=torch.int32, device=logits_TE.device)
    routing, launches = plan_route(RouteCall(logits_TE, spec, block_m, ticket, **given))
    assert len(launches) == (3 if logits_TE.shape[0] > 1024 and block_m else 1)
    routing.weights_TK.fill_(float("nan"))
    routing.expert_ids_TK.fill_(1 << 30)
    for launch in launches:
        launch.run()
    assert ticket.item() == 0, "the ticket must be ready for the next launch"
    return routing


def assert_same_routing(ours: Routing, oracle: Routing) -> None:
    assert torch.equal(ours.expert_ids_TK, oracle.expert_ids_TK)
    torch.testing.assert_close(ours.weights_TK, oracle.weights_TK, rtol=2e-5, atol=1e-6)
    for name in ("counts_T", "identity_weights_T"):
        mine, theirs = getattr(ours, name), getattr(oracle, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-6)
    assert ours.weight_on_input == oracle.weight_on_input


def assert_index_describes(routing: Routing, num_experts: int, block_m: int) -> None:
    """Every used slot once, by expert and then by row; tiles cover each expert's rows without overlap."""
    index = routing.index
    assert isinstance(index, ExpertIndex)
    assert index.matches(routing, num_experts)
    used_TK = routing.used_TK
    ids = routing.expert_ids_TK.masked_fill(~used_TK, num_experts).flatten().cpu()
    expected = ids.sort(stable=True).indices[: int(used_TK.sum())]
    assert torch.equal(index.sorted_slots_X[: len(expected)].cpu().long(), expected)
    sizes = torch.bincount(ids, minlength=num_experts + 1)[:num_experts]
    starts = [0, *sizes.cumsum(0).tolist()]
    assert index.starts_E1.tolist() == starts
    tiles = [(e, row) for e in range(num_experts) for row in range(starts[e], starts[e + 1], block_m)]
    assert index.num_tiles.item() == len(tiles) <= index.max_tiles
    found = zip(index.tile_expert[: len(tiles)].tolist(), index.tile_row[: len(tiles)].tolist(), strict=True)
    assert sorted(found) == tiles


@pytest.mark.parametrize("num_tokens", [1, 7, 21])
@pytest.mark.parametrize("rule", RULES)
def test_rule(rule: str, num_tokens: int) -> None:
    spec = RULES[rule]
    torch.manual_seed(num_tokens)
    logits_TE = torch.randn(num_tokens, spec.num_experts, device=DEVICE) * 2
    given = tensors_for(spec, num_tokens)
    ours = run_route(logits_TE, spec, **given)
    assert_same_routing(ours, reference.route(logits_TE, spec, **given))
    assert_index_describes(ours, spec.num_real_experts, block_m=16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(dtype: torch.dtype) -> None:
    spec = RULES["softmax"]
    logits_TE = torch.randn(9, 12, device=DEVICE).to(dtype)
    assert_same_routing(run_route(logits_TE, spec), reference.route(logits_TE, spec))


def test_many_rows_take_three_launches_and_one_row_more_than_a_chunk_is_ranked() -> None:
    torch.manual_seed(0)
    spec = RouterSpec(num_experts=3, top_k=2, renormalize=True)
    logits_TE = torch.randn(1025, 3, device=DEVICE)
    ours = run_route(logits_TE, spec, block_m=64)
    assert_same_routing(ours, reference.route(logits_TE, spec))
    assert_index_describes(ours, 3, block_m=64)
    ticket = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    assert len(plan_route(RouteCall(logits_TE[:1024], spec, 64, ticket))[1]) == 1


def test_ties_go_to_the_lower_expert() -> None:
    logits_TE = torch.zeros(4, 8, device=DEVICE)
    logits_TE[1, 5] = 1.0
    for spec in (RouterSpec(num_experts=8, top_k=3), RouterSpec(num_experts=8, top_k=3, num_groups=4, top_groups=2)):
        assert run_route(logits_TE, spec).expert_ids_TK.tolist() == [[0, 1, 2], [5, 0, 1], [0, 1, 2], [0, 1, 2]]


def test_minus_infinity_and_nan_still_give_distinct_experts() -> None:
    logits_TE = torch.full((3, 8), float("-inf"), device=DEVICE)
    logits_TE[0, 6] = 1.0
    logits_TE[1, :] = float("nan")
    ids_TK = run_route(logits_TE, RouterSpec(num_experts=8, top_k=4, softmax_after_topk=True)).expert_ids_TK
    assert ids_TK[0, 0] == 6
    for row in ids_TK.tolist():
        assert len(set(row)) == 4
        assert all(0 <= e < 8 for e in row)


def test_without_tables() -> None:
    spec = RULES["softmax"]
    logits_TE = torch.randn(2, 12, device=DEVICE)
    ours = run_route(logits_TE, spec, block_m=None)
    assert ours.index is None
    assert_same_routing(ours, reference.route(logits_TE, spec))


@pytest.mark.parametrize(
    ("name", "num_tokens", "top_k", "num_experts"),
    [
        ("one token", 1, 2, 4),
        ("more rows than a chunk", 19, 3, 6),
        ("most experts empty", 3, 2, 64),
        ("three launches", 1030, 2, 4),
    ],
)
@pytest.mark.parametrize("counted", [False, True])
def test_index_of_a_given_routing(name: str, num_tokens: int, top_k: int, num_experts: int, counted: bool) -> None:
    torch.manual_seed(1)
    ids_TK = torch.rand(num_tokens, num_experts, device=DEVICE).argsort(-1)[:, :top_k].int().contiguous()
    counts_T = torch.randint(0, top_k + 1, (num_tokens,), dtype=torch.int32, device=DEVICE) if counted else None
    routing = Routing(expert_ids_TK=ids_TK, weights_TK=torch.rand(num_tokens, top_k, device=DEVICE), counts_T=counts_T)
    ticket = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    index, launches = plan_index(routing, num_experts, 32, ticket)
    for launch in launches:
        launch.run()
    assert_index_describes(
        Routing(expert_ids_TK=ids_TK, weights_TK=routing.weights_TK, counts_T=counts_T, index=index), num_experts, 32
    )


def test_index_ranks_repeated_experts_of_a_row() -> None:
    ids_TK = torch.tensor([[1, 1], [0, 1]], dtype=torch.int32, device=DEVICE)
    routing = Routing(expert_ids_TK=ids_TK, weights_TK=torch.ones(2, 2, device=DEVICE))
    index, launches = plan_index(routing, 2, 16, torch.zeros(1, dtype=torch.int32, device=DEVICE))
    for launch in launches:
        launch.run()
    assert index.sorted_slots_X.tolist() == [2, 0, 1, 3]


def test_index_of_other_tensors_is_not_taken() -> None:
    routing = run_route(torch.randn(3, 12, device=DEVICE), RULES["softmax"])
    fewer = torch.ones(3, dtype=torch.int32, device=DEVICE)
    replaced = Routing(expert_ids_TK=routing.expert_ids_TK, weights_TK=routing.weights_TK, counts_T=fewer)
    assert routing.index.matches(routing, 12)
    assert not routing.index.matches(replaced, 12)


def test_most_tiles() -> None:
    for num_slots, num_experts, block_m in ((8, 128, 16), (17, 1, 16), (1000, 7, 64)):
        most = 0
        for shares in ([1] * num_experts, [1] * (num_experts - 1) + [1000]):
            sizes = torch.tensor(shares, dtype=torch.float64)
            rows = torch.distributions.Multinomial(num_slots, probs=sizes / sizes.sum()).sample((200,))
            most = max(most, int((rows / block_m).ceil().sum(-1).max()))
        assert most <= max_row_tiles(num_slots, num_experts, block_m)


def test_capacity_is_refused() -> None:
    spec = RouterSpec(num_experts=4, top_k=1, capacity=1)
    call = RouteCall(torch.randn(2, 4), spec, None, torch.zeros(1, dtype=torch.int32))
    assert FusedRoute().refuses(call.problem(), A100) == "routing with a capacity"
