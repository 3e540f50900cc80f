"""Expert kernels against the oracle: every path, dtype and edge shape, on buffers full of NaN."""

from __future__ import annotations

from dataclasses import replace

import interpreter
import pytest
import torch
from dynamoe.kernels.api.router_spec import RouterSpec
from dynamoe.kernels.api.tolerance import TOLERANCE, error
from dynamoe.kernels.api.types import Routing
from dynamoe.kernels.reference import operations as reference
from dynamoe.kernels.torch.experts import PlainExperts
from dynamoe.kernels.triton.device import A100
from dynamoe.kernels.triton.experts import ExpertsCall, Pairs, Tiles
from dynamoe.kernels.triton.gemv import GemvConfig
from dynamoe.kernels.triton.grouped_gemm import GemmConfig, describable

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHS = {
    "pairs": None,
    "tiles": GemmConfig(block_m=16, block_n=32, block_k=64, num_warps=4, num_stages=2),
    "tiles, weights on the left": GemmConfig(block_m=16, block_n=64, block_k=32, num_warps=4, num_stages=2, swap=True),
    "persistent, descriptors": GemmConfig(
        block_m=16, block_n=32, block_k=32, num_warps=4, num_stages=2, tma=True, programs=5, group_m=2
    ),
}


def make_weights(
    num_experts: int, hidden: int, width: int, dtype: torch.dtype = torch.float32, biases: bool = False
) -> PlainExperts:
    def normal(*sizes: int, scale: float) -> torch.Tensor:
        return (torch.randn(*sizes) * scale).to(DEVICE, dtype)

    return PlainExperts(
        normal(num_experts, width, hidden, scale=hidden**-0.5),
        normal(num_experts, width, hidden, scale=hidden**-0.5),
        normal(num_experts, hidden, width, scale=width**-0.5),
        normal(num_experts, width, scale=0.5) if biases else None,
        normal(num_experts, width, scale=0.5) if biases else None,
        normal(num_experts, hidden, scale=0.5) if biases else None,
    )


def run_path(
    path: str, x_TD: torch.Tensor, weights: PlainExperts, routing: Routing, activation: str = "silu"
) -> torch.Tensor:
    ticket, config, gemv = (
        torch.zeros(1, dtype=torch.int32, device=DEVICE),
        PATHS[path],
        GemvConfig(block_n=32, block_k=64),
    )
    call = ExpertsCall(x_TD, weights, routing, activation, ticket)
    if config is None:
        out_TD, launches = Pairs().plan(call, {"pair_gate_up": gemv, "pair_down": gemv}, A100)
    else:
        out_TD, launches = Tiles().plan(call, {"gate_up": config, "down": config}, A100)
    for launch in launches:
        launch.run()
    return out_TD


def assert_equals_oracle(
    path: str, x_TD: torch.Tensor, weights: PlainExperts, routing: Routing, activation: str = "silu"
) -> None:
    ours_TD = run_path(path, x_TD, weights, routing, activation)
    wide = [None if t is None else t.double() for t in vars(weights).values()]
    oracle_TD = reference.experts(x_TD.double(), *wide[:3], routing, activation, *wide[3:])
    assert error(ours_TD, oracle_TD) <= TOLERANCE[x_TD.dtype]


def random_routing(num_tokens: int, num_experts: int, top_k: int) -> Routing:
    return reference.route(
        torch.randn(num_tokens, num_experts, device=DEVICE),
        RouterSpec(num_experts=num_experts, top_k=top_k, renormalize=True),
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20)


EDGES = {
    # name: (tokens, experts, choices, hidden size, expert width)
    "one token": (1, 4, 2, 48, 40),
    "more experts than slots: most are empty": (3, 9, 2, 32, 32),
    "K = 1": (5, 3, 1, 32, 64),
    "K = E": (4, 3, 3, 32, 64),
    "an expert with more rows than a tile": (20, 2, 1, 32, 32),
    "sizes that are no multiple of a block": (7, 3, 2, 72, 104),
    "one expert": (6, 1, 1, 48, 48),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("path", PATHS)
def test_edge(path: str, edge: str) -> None:
    num_tokens, num_experts, top_k, hidden, width = EDGES[edge]
    weights = make_weights(num_experts, hidden, width)
    x_TD = torch.randn(num_tokens, hidden, device=DEVICE)
    assert_equals_oracle(path, x_TD, weights, random_routing(num_tokens, num_experts, top_k))


@pytest.mark.parametrize("path", ["pairs", "tiles", "tiles, weights on the left"])
def test_odd_sizes_that_no_descriptor_could_address(path: str) -> None:
    weights = make_weights(3, 37, 21)
    assert not describable(weights.gate_EFD)
    assert_equals_oracle(path, torch.randn(5, 37, device=DEVICE), weights, random_routing(5, 3, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
def test_half_precision(path: str, dtype: torch.dtype) -> None:
    weights = make_weights(4, 64, 48, dtype)
    x_TD = torch.randn(5, 64, device=DEVICE).to(dtype)
    assert_equals_oracle(path, x_TD, weights, random_routing(5, 4, 2))


@pytest.mark.parametrize("path", PATHS)
def test_all_tokens_to_one_expert(path: str) -> None:
    routing = random_routing(18, 4, 1)
    routing = replace(routing, expert_ids_TK=torch.full_like(routing.expert_ids_TK, 2))
    assert_equals_oracle(path, torch.randn(18, 32, device=DEVICE), make_weights(4, 32, 32), routing)


@pytest.mark.parametrize("path", PATHS)
def test_rows_with_fewer_experts_than_k_never_touch_the_others(path: str) -> None:
    """Weights of experts that only unused slots name are NaN; a row with no expert at all comes out as zero."""
    weights = make_weights(4, 32, 32)
    for tensor in (weights.gate_EFD, weights.up_EFD, weights.down_EDF):
        tensor[3] = float("nan")
    ids_TK = torch.tensor([[0, 1], [2, 3], [3, 3], [1, 0]], dtype=torch.int32, device=DEVICE)
    counts_T = torch.tensor([2, 1, 0, 2], dtype=torch.int32, device=DEVICE)
    weights_TK = torch.rand(4, 2, device=DEVICE).masked_fill(torch.arange(2, device=DEVICE) >= counts_T[:, None], 0.0)
    routing = Routing(expert_ids_TK=ids_TK, weights_TK=weights_TK, counts_T=counts_T)
    x_TD = torch.randn(4, 32, device=DEVICE)
    assert_equals_oracle(path, x_TD, weights, routing)
    assert (run_path(path, x_TD, weights, routing)[2] == 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_zero_experts_and_weight_on_the_input(path: str) -> None:
    weights = make_weights(3, 32, 32)
    x_TD = torch.randn(6, 32, device=DEVICE)
    logits_TE = torch.randn(6, 5, device=DEVICE)
    zeros = reference.route(logits_TE, RouterSpec(num_experts=5, top_k=3, zero_experts=2))
    assert_equals_oracle(path, x_TD, weights, zeros)
    on_input = RouterSpec(num_experts=3, top_k=2, score="sigmoid", weight_on_input=True)
    assert_equals_oracle(path, x_TD, weights, reference.route(logits_TE[:, :3].contiguous(), on_input))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "clamped_swiglu"])
@pytest.mark.parametrize("path", ["pairs", "tiles"])
def test_activations_and_biases(path: str, activation: str) -> None:
    weights, size = make_weights(3, 32, 40, biases=True), 12 if activation == "clamped_swiglu" else 1
    assert_equals_oracle(path, size * torch.randn(4, 32, device=DEVICE), weights, random_routing(4, 3, 2), activation)


@pytest.mark.parametrize("path", PATHS)
def test_down_weights_as_a_view_of_one_dense_matrix(path: str) -> None:
    weights = make_weights(4, 32, 24)
    dense_DX = weights.down_EDF.permute(1, 0, 2).reshape(32, 4 * 24).contiguous()
    view_EDF = dense_DX.view(32, 4, 24).permute(1, 0, 2)
    assert not view_EDF.is_contiguous()
    weights = replace(weights, down_EDF=view_EDF)
    assert_equals_oracle(path, torch.randn(5, 32, device=DEVICE), weights, random_routing(5, 4, 2))


@pytest.mark.parametrize("path", ["pairs", "tiles"])
def test_shape_of_the_default_model(path: str) -> None:
    weights = make_weights(14, 576, 96)
    assert_equals_oracle(path, torch.randn(1, 576, device=DEVICE), weights, random_routing(1, 14, 2))


@pytest.mark.parametrize("path", PATHS)
def test_order_of_the_rows_does_not_matter(path: str) -> None:
    weights = make_weights(4, 32, 32)
    x_TD, routing = torch.randn(9, 32, device=DEVICE), random_routing(9, 4, 2)
    order = torch.randperm(9, device=DEVICE)
    shuffled = Routing(
        expert_ids_TK=routing.expert_ids_TK[order].contiguous(), weights_TK=routing.weights_TK[order].contiguous()
    )
    out_TD = run_path(path, x_TD, weights, routing)
    torch.testing.assert_close(run_path(path, x_TD[order].contiguous(), weights, shuffled), out_TD[order])


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU at hand kernels are compiled, not interpreted")
@pytest.mark.parametrize("path", PATHS)
def test_the_hastened_interpreter_gives_the_bits_of_tritons_own(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x_TD, weights, routing = torch.randn(9, 64), make_weights(4, 64, 48, biases=True), random_routing(9, 4, 2)
    hastened = run_path(path, x_TD, weights, routing)
    calls: list[object] = []

    def own(*arguments: object, **more: object) -> object:
        calls.append(arguments[0])
        assert interpreter.TRITONS_OWN is not None
        return interpreter.TRITONS_OWN(*arguments, **more)

    monkeypatch.setattr("triton.runtime.interpreter.InterpretedFunction.__call__", own)
    assert torch.equal(run_path(path, x_TD, weights, routing), hastened)
    assert calls
