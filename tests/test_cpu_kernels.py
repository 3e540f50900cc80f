"""The C++ kernels against the oracle, on every instruction set that this processor has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from dynamoe.kernels.api.router_spec import RouterSpec
from dynamoe.kernels.api.tolerance import TOLERANCE, error
from dynamoe.kernels.api.types import Routing
from dynamoe.kernels.cpu.backend import CpuBackend
from dynamoe.kernels.reference import operations as reference
from dynamoe.kernels.torch.backend import TorchBackend

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def backend(cpu_backend: CpuBackend) -> CpuBackend:
    return cpu_backend


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape
    assert error(actual, expected) <= TOLERANCE[dtype]


LINEAR_EDGES = {
    "one of everything": (1, 1, 1),
    "fewer outputs than a block": (3, 7, 32),
    "odd inputs": (5, 64, 37),
    "ragged default model": (4, 100, 576),
    "one more row than a tile": (13, 96, 64),
    "several chunks of rows": (200, 40, 1030),
}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("edge", LINEAR_EDGES)
def test_linear(backend: CpuBackend, edge: str, with_bias: bool):
    rows, outputs, inputs = LINEAR_EDGES[edge]
    x, weight = torch.randn(rows, inputs).to(backend.dtype), torch.randn(outputs, inputs).to(backend.dtype)
    bias = torch.randn(outputs).to(backend.dtype) if with_bias else None
    packed = backend.pack_linear(weight, bias)
    expected = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    assert_near(backend.linear(x, packed), expected, backend.dtype)
    logits = backend.logits_linear(x, packed)
    assert logits.dtype == torch.float32
    assert_near(logits, expected, torch.float32)
    ids = torch.randint(outputs, (9,))
    assert torch.equal(backend.weight_rows(packed, ids), weight[ids])
    assert torch.equal(backend.embed(packed, ids, 12.0), weight[ids].float() * 12.0)
    stream, norm = torch.randn(rows, inputs), torch.rand(inputs).to(backend.dtype)
    logits = backend.logits_linear(backend.rms_norm(stream, norm, 1e-5), packed) / 6.0
    assert torch.equal(backend.logits(stream, norm, 1e-5, packed, 6.0), logits)


def test_linear_takes_rows_that_lie_apart_and_weights_that_are_views(backend: CpuBackend):
    wide, stored = torch.randn(6, 96).to(backend.dtype), torch.randn(64, 50).to(backend.dtype)
    packed = backend.pack_linear(stored.T)
    assert_near(backend.linear(wide[:, 16:80], packed), wide[:, 16:80].float() @ stored.float(), backend.dtype)


def test_non_contiguous_inputs_are_refused(backend: CpuBackend):
    packed = backend.pack_linear(torch.randn(8, 6).to(backend.dtype))
    with pytest.raises(ValueError, match="contiguous rows"):
        backend.linear(torch.randn(6, 4).to(backend.dtype).T, packed)
    with pytest.raises(ValueError, match="packed words"):
        backend.linear(torch.randn(4, 8).to(backend.dtype), packed)
    weights = random_experts(backend, 2, 16, 6)[0]
    x = torch.randn(4, 6).to(backend.dtype)
    ids, probs = torch.zeros(2, 4, dtype=torch.int32), torch.ones(2, 4)
    with pytest.raises(ValueError, match="contiguous"):
        backend.experts(x, weights, Routing(expert_ids_TK=ids.T, weights_TK=probs.T))
    with pytest.raises(ValueError, match="out of range"):
        backend.experts(x, weights, Routing(expert_ids_TK=ids.T.contiguous() + 2, weights_TK=probs.T.contiguous()))
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        backend.rms_norm(torch.randn(2, 4, dtype=torch.float64), torch.ones(4), 1e-6)


def random_experts(
    backend: CpuBackend, num_experts: int, width: int, hidden: int, activation="silu", bias=False, dense=False
):
    gate, up = (torch.randn(num_experts, width, hidden).to(backend.dtype) / hidden**0.5 for _ in range(2))
    down = torch.randn(num_experts, hidden, width).to(backend.dtype) / width**0.5
    if dense:  # slices of one (D, E * F) matrix
        down = down.permute(1, 0, 2).reshape(hidden, -1).view(hidden, num_experts, width).permute(1, 0, 2)
    parts = [gate, up, down]
    biases = []
    if bias:
        shapes = ((num_experts, width), (num_experts, width), (num_experts, hidden))
        biases = [torch.randn(shape).to(backend.dtype) for shape in shapes]
    packed = backend.pack_experts(*parts, activation, *biases)
    return packed, [t.float() for t in parts], [t.float() for t in biases]


def random_routing(rows: int, num_experts: int, top_k: int, counts: bool = False) -> Routing:
    ids = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(rows)]).int()
    counts_T = torch.arange(rows).remainder(top_k + 1).int() if counts else None
    return Routing(expert_ids_TK=ids, weights_TK=torch.rand(rows, top_k), counts_T=counts_T)


EXPERT_EDGES = {  # rows, experts, top_k, width, hidden
    "one token": (1, 8, 2, 32, 64),
    "k = 1": (7, 4, 1, 32, 64),
    "k = E": (5, 4, 4, 48, 64),
    "one expert": (3, 1, 1, 64, 96),
    "empty experts": (3, 32, 2, 16, 32),
    "sizes that are no multiple of anything": (9, 5, 3, 37, 45),
    "default model": (6, 16, 14, 96, 576),
    "several tiles per expert": (90, 3, 2, 40, 70),
}


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("edge", EXPERT_EDGES)
def test_experts(backend: CpuBackend, edge: str, counts: bool):
    rows, num_experts, top_k, width, hidden = EXPERT_EDGES[edge]
    packed, parts, _ = random_experts(backend, num_experts, width, hidden)
    x, routing = torch.randn(rows, hidden).to(backend.dtype), random_routing(rows, num_experts, top_k, counts)
    expected = reference.experts(x.float(), *parts, routing, "silu")
    assert_near(backend.experts(x, packed, routing), expected, backend.dtype)


def test_all_tokens_to_one_expert(backend: CpuBackend):
    packed, parts, _ = random_experts(backend, 6, 48, 64)
    x, ids = torch.randn(40, 64).to(backend.dtype), torch.full((40, 1), 4, dtype=torch.int32)
    routing = Routing(expert_ids_TK=ids, weights_TK=torch.rand(40, 1))
    assert_near(
        backend.experts(x, packed, routing), reference.experts(x.float(), *parts, routing, "silu"), backend.dtype
    )


def test_unused_slots_read_no_weights(backend: CpuBackend):
    gate, up, down = (torch.randn(2, 32, 32).to(backend.dtype) for _ in range(3))
    gate[1] = up[1] = down[1] = float("nan")
    packed = backend.pack_experts(gate, up, down, "silu")
    routing = Routing(
        expert_ids_TK=torch.tensor([[0, 1]] * 5, dtype=torch.int32),
        weights_TK=torch.ones(5, 2),
        counts_T=torch.ones(5, dtype=torch.int32),
    )
    assert backend.experts(torch.randn(5, 32).to(backend.dtype), packed, routing).isfinite().all()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations_and_biases(backend: CpuBackend, activation: str):
    packed, parts, biases = random_experts(backend, 5, 37, 45, activation, bias=True)
    x, routing = 2 * torch.randn(11, 45).to(backend.dtype), random_routing(11, 5, 3)
    expected = reference.experts(x.float(), *parts, routing, activation, *biases)
    assert_near(backend.experts(x, packed, routing), expected, backend.dtype)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("rows", "num_experts", "width", "hidden"), [(1, 1, 64, 32), (5, 16, 96, 576), (30, 3, 37, 45)]
)
def test_all_experts_are_one_dense_ffn(
    backend: CpuBackend, rows: int, num_experts: int, width: int, hidden: int, dense: bool
):
    packed, parts, biases = random_experts(backend, num_experts, width, hidden, bias=True, dense=dense)
    x = torch.randn(rows, hidden).to(backend.dtype)
    everything = Routing(
        expert_ids_TK=torch.arange(num_experts, dtype=torch.int32).repeat(rows, 1),
        weights_TK=torch.ones(rows, num_experts),
    )
    expected = reference.experts(x.float(), *parts, everything, "silu", *biases)
    assert_near(backend.all_experts(x, packed), expected, backend.dtype)
    assert_near(backend.experts(x, packed, everything), expected, backend.dtype)


def test_weights_on_the_input_and_rows_that_join_the_sum(backend: CpuBackend):
    packed, parts, _ = random_experts(backend, 6, 32, 48)
    x = torch.randn(9, 48).to(backend.dtype)
    plain = random_routing(9, 6, 3, counts=True)
    for routing in (
        replace(plain, weight_on_input=True),
        replace(plain, identity_weights_T=torch.rand(9)),
        replace(plain, weight_on_input=True, identity_weights_T=torch.rand(9)),
    ):
        expected = reference.experts(x.float(), *parts, routing, "silu")
        assert_near(backend.experts(x, packed, routing), expected, backend.dtype)


ROUTERS = {
    "Mixtral": RouterSpec(num_experts=8, top_k=2, renormalize=True),
    "OLMoE": RouterSpec(num_experts=64, top_k=8),
    "Granite": RouterSpec(num_experts=32, top_k=8, softmax_after_topk=True),
    "sigmoid, scaled": RouterSpec(num_experts=37, top_k=5, score="sigmoid", renormalize=True, scale=2.5),
    "square root of softplus": RouterSpec(num_experts=16, top_k=3, score="sqrt_softplus"),
    "constant": RouterSpec(num_experts=16, top_k=4, score="constant"),
    "k = 1": RouterSpec(num_experts=16, top_k=1),
    "k = E": RouterSpec(num_experts=5, top_k=5),
}


@pytest.mark.parametrize("rule", ROUTERS)
def test_route(backend: CpuBackend, rule: str):
    spec = ROUTERS[rule]
    logits = torch.randn(70, spec.num_experts).to(backend.dtype)
    logits[3] = 0.5  # ties go to the lower number
    routing, expected = backend.route(logits, spec), reference.route(logits, spec)
    torch.testing.assert_close(routing.weights_TK, expected.weights_TK, rtol=1e-5, atol=1e-6)
    # Scores that differ by rounding may swap places, but not the experts' weights.
    chosen, wanted = (r.weights_TK.gather(1, r.expert_ids_TK.long().argsort(1)) for r in (routing, expected))
    torch.testing.assert_close(chosen, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(routing.expert_ids_TK.sort(1).values, expected.expert_ids_TK.sort(1).values)
    assert routing.expert_ids_TK[3].tolist() == list(range(spec.top_k))


def test_a_rule_that_the_fast_router_does_not_know(backend: CpuBackend):
    spec = RouterSpec(num_experts=16, top_k=4, score="sigmoid", selection_bias=True, num_groups=4, top_groups=2)
    logits, bias = torch.randn(9, 16), torch.randn(16)
    routing = backend.route(logits, spec, selection_bias_E=bias)
    expected = reference.route(logits, spec, selection_bias_E=bias)
    assert torch.equal(routing.expert_ids_TK, expected.expert_ids_TK)
    with pytest.raises(ValueError, match="needs selection_bias_E"):
        backend.route(logits, spec)
    with pytest.raises(ValueError, match="logits must be"):
        backend.route(logits, ROUTERS["Mixtral"])


@pytest.mark.parametrize("stream", [None, torch.float32])  # a residual stream wider than the activations
@pytest.mark.parametrize("hidden", [1, 45, 576])
@pytest.mark.parametrize("rows", [1, 40])
def test_norms(backend: CpuBackend, rows: int, hidden: int, stream: torch.dtype | None):
    x = torch.randn(rows, hidden).to(backend.dtype)
    residual = torch.randn(rows, hidden).to(stream or backend.dtype)
    weight = torch.randn(hidden).to(backend.dtype)
    assert_near(
        backend.rms_norm(residual, weight, 1e-5), reference.rms_norm(residual, weight, 1e-5).float(), backend.dtype
    )
    assert_near(backend.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5).float(), backend.dtype)
    for scale in (1.0, 0.22):
        wanted, wanted_sum = TorchBackend("cpu", backend.dtype).add_rms_norm(x, residual.clone(), weight, 1e-5, scale)
        normed, total = backend.add_rms_norm(x, residual.clone(), weight, 1e-5, scale)
        assert total.dtype == residual.dtype
        assert normed.dtype == weight.dtype
        assert torch.equal(total, wanted_sum)
        assert_near(normed, wanted.float(), backend.dtype)
