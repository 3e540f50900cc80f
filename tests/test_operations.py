"""Every operation on every backend and dtype of the support matrix against the oracle, at its edges, through the
interface that the decoder uses. The kernels' own paths and instruction sets have tests of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dynamoe.kernels.api.router_spec import RouterSpec
from dynamoe.kernels.api.support import DTYPES, EXPERTS, REFUSED, ROUTERS
from dynamoe.kernels.api.tolerance import TOLERANCE, error
from dynamoe.kernels.api.types import AttentionBatch, KVLayer, Routing
from dynamoe.kernels.reference import operations as reference
from dynamoe.kernels.reference.elementwise import sigmoid
from dynamoe.kernels.select import select_backend
from dynamoe.kernels.torch.backend import TorchBackend

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("poisoned_memory")]
GPU = torch.cuda.is_available()
CELLS = [
    (row.backend, row.device, dtype)
    for row in EXPERTS
    for dtype, outcome in zip(DTYPES, row.outcomes, strict=True)
    if outcome != REFUSED and row.backend != "megablocks" and (row.device == "cpu" or GPU)
    if not (row.interpreted and GPU)
]
Tensors = dict[str, torch.Tensor]


# Interpreted kernels are the same in both half precisions, and tests of their own run them in each.
PARAMS = [
    pytest.param(cell, marks=[pytest.mark.slow] if cell == ("triton", "cpu", "float16") else []) for cell in CELLS
]


@pytest.fixture(params=PARAMS, ids="-".join)
def backend(request: pytest.FixtureRequest) -> TorchBackend:
    name, device, dtype = request.param
    torch.manual_seed(5)
    return select_backend(device, getattr(torch, dtype), name)


def assert_near(ours: torch.Tensor, oracle: torch.Tensor, dtype: torch.dtype) -> None:
    assert ours.shape == oracle.shape
    if ours.numel():
        assert error(ours, oracle) <= TOLERANCE[dtype]


def normal(backend: TorchBackend, *sizes: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*sizes) * scale).to(backend.device, backend.dtype)


def make_experts(backend: TorchBackend, num_experts: int, width: int, hidden: int, biases: bool = False) -> list:
    parts = [normal(backend, num_experts, width, hidden, scale=hidden**-0.5) for _ in range(2)]
    parts.append(normal(backend, num_experts, hidden, width, scale=width**-0.5))
    shapes = ((num_experts, width), (num_experts, width), (num_experts, hidden)) if biases else ()
    return parts + [normal(backend, *shape, scale=0.5) for shape in shapes]


def make_routing(backend: TorchBackend, rows: int, num_experts: int, top_k: int, counts: bool = False) -> Routing:
    ids_TK = torch.rand(rows, num_experts).argsort(-1)[:, :top_k].int().contiguous()
    counts_T = torch.arange(rows).remainder(top_k + 1).int().to(backend.device) if counts else None
    weights_TK = torch.rand(rows, top_k) + 0.1
    return Routing(expert_ids_TK=ids_TK.to(backend.device), weights_TK=weights_TK.to(backend.device), counts_T=counts_T)


def check_experts(
    backend: TorchBackend, x_TD: torch.Tensor, parts: list, routing: Routing, activation: str = "silu"
) -> None:
    ours_TD = backend.experts(x_TD, backend.pack_experts(*parts[:3], activation, *parts[3:]), routing)
    wide = [t.float() for t in parts]
    oracle_TD = reference.experts(x_TD.float(), *wide[:3], routing, activation, *wide[3:])
    assert ours_TD.dtype == backend.dtype
    assert_near(ours_TD, oracle_TD, backend.dtype)


EDGES = {  # rows, experts, choices, width, hidden size
    "no rows": (0, 4, 2, 32, 64),
    "one token": (1, 8, 2, 32, 64),
    "k = 1": (7, 4, 1, 32, 64),
    "k = E": (5, 4, 4, 48, 64),
    "one expert": (3, 1, 1, 64, 96),
    "most experts empty": (3, 32, 2, 16, 32),
    "rows of whole 16 bytes, no multiple of a block": (9, 5, 3, 40, 56),
    "sizes that are no multiple of anything": (9, 5, 3, 37, 45),
    "several tiles per expert": (40, 2, 1, 24, 32),
}


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("edge", EDGES)
def test_experts(backend: TorchBackend, edge: str, counts: bool) -> None:
    rows, num_experts, top_k, width, hidden = EDGES[edge]
    parts, x_TD = make_experts(backend, num_experts, width, hidden), normal(backend, rows, hidden)
    check_experts(backend, x_TD, parts, make_routing(backend, rows, num_experts, top_k, counts))


def test_all_tokens_to_one_expert(backend: TorchBackend) -> None:
    routing = make_routing(backend, 20, 6, 1)
    routing = replace(routing, expert_ids_TK=torch.full_like(routing.expert_ids_TK, 4))
    check_experts(backend, normal(backend, 20, 32), make_experts(backend, 6, 24, 32), routing)


def test_slots_beyond_a_rows_count_are_never_computed(backend: TorchBackend) -> None:
    """They name an expert whose weights are NaN, with a weight that is NaN; a row without experts is zero."""
    parts, x_TD = make_experts(backend, 4, 24, 32), normal(backend, 6, 32)
    clean = [part.clone() for part in parts]
    for part in parts:
        part[3] = float("nan")
    counts_T = torch.tensor([3, 1, 0, 2, 3, 1], dtype=torch.int32, device=backend.device)
    used_TK = torch.arange(3, device=backend.device) < counts_T[:, None]
    ids_TK = torch.where(used_TK, torch.tensor([2, 0, 1], device=backend.device), 3).int()
    weights_TK = torch.rand(6, 3, device=backend.device).masked_fill(~used_TK, float("nan"))
    routing = Routing(expert_ids_TK=ids_TK, weights_TK=weights_TK, counts_T=counts_T)
    ours_TD = backend.experts(x_TD, backend.pack_experts(*parts, "silu"), routing)
    oracle_TD = reference.experts(x_TD.float(), *(part.float() for part in clean), routing, "silu")
    assert_near(ours_TD, oracle_TD, backend.dtype)
    assert (ours_TD[2] == 0).all()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations_and_biases(backend: TorchBackend, activation: str) -> None:
    routing = make_routing(backend, 6, 5, 3)
    check_experts(backend, normal(backend, 6, 48), make_experts(backend, 5, 40, 48, biases=True), routing, activation)


@pytest.mark.parametrize("counts", [False, True])
def test_zero_experts_and_weight_on_the_input(backend: TorchBackend, counts: bool) -> None:
    parts, x_TD = make_experts(backend, 6, 24, 32), normal(backend, 3, 32)
    routing = make_routing(backend, 3, 6, 2, counts)
    identity_T = torch.rand(3, device=backend.device)
    for case in (
        replace(routing, identity_weights_T=identity_T),
        replace(routing, weight_on_input=True),
        replace(routing, weight_on_input=True, identity_weights_T=identity_T),
    ):
        check_experts(backend, x_TD, parts, case)


def test_experts_as_slices_of_one_dense_matrix_one_by_one_and_all_together(backend: TorchBackend) -> None:
    gate, up, down, *biases = make_experts(backend, 4, 24, 32, biases=True)
    down = down.permute(1, 0, 2).reshape(32, 96).view(32, 4, 24).permute(1, 0, 2)
    assert not down.is_contiguous()
    x_TD, routing = normal(backend, 5, 32), make_routing(backend, 5, 4, 2)
    check_experts(backend, x_TD, [gate, up, down], routing)
    check_experts(backend, x_TD, [gate, up, down, *biases], routing)
    everyone = Routing(
        expert_ids_TK=torch.arange(4, dtype=torch.int32, device=backend.device).repeat(5, 1),
        weights_TK=torch.ones(5, 4, device=backend.device),
    )
    for more in ([], biases):
        ours_TD = backend.all_experts(x_TD, backend.pack_experts(gate, up, down, "silu", *more))
        wide = [t.float() for t in (gate, up, down, *more)]
        oracle_TD = reference.experts(x_TD.float(), *wide[:3], everyone, "silu", *wide[3:])
        assert_near(ours_TD, oracle_TD, backend.dtype)


def router_tensors(backend: TorchBackend, spec: RouterSpec, rows: int) -> Tensors:
    tensors = {"logits_TE": torch.randn(rows, spec.num_experts)}
    if spec.selection_bias:
        tensors["selection_bias_E"] = torch.randn(spec.num_experts) * 0.3
    if spec.expert_scale:
        tensors["expert_scale_E"] = torch.rand(spec.num_experts) + 0.5
    if spec.forced_experts:
        tensors["forced_ids_TK"] = torch.rand(rows, spec.num_experts).argsort(-1)[:, : spec.top_k].contiguous()
    return {name: tensor.to(backend.device) for name, tensor in tensors.items()}


def assert_same_routing(ours: Routing, oracle: Routing) -> None:
    assert ours.weight_on_input == oracle.weight_on_input
    for name in ("expert_ids_TK", "weights_TK", "counts_T", "identity_weights_T"):
        mine, theirs = getattr(ours, name), getattr(oracle, name)
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 1, 21])
@pytest.mark.parametrize("rule", ROUTERS)
def test_every_routing_rule(backend: TorchBackend, rule: str, rows: int) -> None:
    spec = ROUTERS[rule][0]
    tensors = router_tensors(backend, spec, rows)
    tensors["logits_TE"] = tensors["logits_TE"].to(backend.dtype)
    # Distinct in 16 bits as well: ties have a test of their own.
    tensors["logits_TE"] += torch.arange(spec.num_experts, device=backend.device).to(backend.dtype) / 4
    assert_same_routing(backend.route(**tensors, spec=spec), reference.route(**tensors, spec=spec))


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (7, 1), (5, 5), (257, 8)])
def test_routing_to_one_to_all_and_among_many(backend: TorchBackend, num_experts: int, top_k: int) -> None:
    spec = RouterSpec(num_experts=num_experts, top_k=top_k, renormalize=True)
    tensors = router_tensors(backend, spec, 9)
    tensors["logits_TE"][4] = 0.25  # ties go to the lower number
    ours = backend.route(**tensors, spec=spec)
    assert_same_routing(ours, reference.route(**tensors, spec=spec))
    assert ours.expert_ids_TK[4].tolist() == list(range(top_k))


def paged_batch(backend: TorchBackend, contexts: list[int], queries: list[int], page: int = 4) -> AttentionBatch:
    """Sequences on shuffled pages; table entries beyond a context point far outside the cache."""
    counts = [-(-length // page) for length in contexts]
    pages = torch.randperm(sum(counts)).int().split(counts)
    table_SM = torch.full((len(contexts), max(counts)), 10**6, dtype=torch.int32)
    positions, slots = [], []
    for s, (length, rows) in enumerate(zip(contexts, queries, strict=True)):
        table_SM[s, : counts[s]] = pages[s]
        positions.append(torch.arange(length - rows, length))
        slots.append(table_SM[s, positions[-1] // page].long() * page + positions[-1] % page)
    return AttentionBatch(
        positions_T=torch.cat(positions).to(backend.device),
        slots_T=torch.cat(slots).to(backend.device),
        query_start_S1=torch.tensor([0, *queries]).cumsum(0).int().to(backend.device),
        context_len_S=torch.tensor(contexts, dtype=torch.int32, device=backend.device),
        block_table_SM=table_SM.to(backend.device),
        max_query_len=max(queries),
        max_context_len=max(contexts),
    )


CONTEXTS, QUERIES = [9, 1, 16, 21, 7], [1, 1, 1, 6, 7]  # decodes on and off page borders, a chunk, a whole prompt
HEADS, GROUPS, CHANNELS = 6, 2, 24


def attention_tensors(backend: TorchBackend) -> Tensors:
    """Inputs of rotation, cache write and attention; the cache holds NaN where the contexts have no token."""
    batch = paged_batch(backend, CONTEXTS, QUERIES)
    pages = int(batch.block_table_SM[batch.block_table_SM < 10**6].max()) + 1
    keys, values = (torch.full((pages, GROUPS, 4, CHANNELS), float("nan")) for _ in range(2))
    for s, length in enumerate(CONTEXTS):
        for p in range(length):
            for cache in (keys, values):
                cache[batch.block_table_SM[s, p // 4].long(), :, p % 4] = torch.randn(GROUPS, CHANNELS)
    rows = sum(QUERIES)
    return {
        "q_THC": normal(backend, rows, HEADS, CHANNELS),
        "k_TGC": normal(backend, rows, GROUPS, CHANNELS),
        "v_TGC": normal(backend, rows, GROUPS, CHANNELS),
        "cos_sin_LC": torch.randn(32, CHANNELS, device=backend.device),
        "keys_BGPC": keys.to(backend.device, backend.dtype),
        "values_BGPC": values.to(backend.device, backend.dtype),
        **{name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)},
    }


def split_up(tensors: Tensors, wide: bool = False) -> tuple[Tensors, KVLayer, AttentionBatch]:
    """The model's tensors, the cache and the batch; ``wide`` for the oracle, whose matrix products cannot mask NaN."""
    cast = {name: t.float() if wide and t.is_floating_point() else t for name, t in tensors.items()}
    cache = {name: cast[name].nan_to_num() if wide else cast[name] for name in ("keys_BGPC", "values_BGPC")}
    names = ("positions_T", "slots_T", "query_start_S1", "context_len_S", "block_table_SM")
    batch = AttentionBatch(
        **{name: cast[name] for name in names}, max_query_len=max(QUERIES), max_context_len=max(CONTEXTS)
    )
    return cast, KVLayer(**cache), batch


def rope_and_write(backend: TorchBackend, tensors: Tensors) -> list[torch.Tensor]:
    given, layer, batch = split_up(tensors)
    out = backend.rope_and_write(given["q_THC"], given["k_TGC"], given["v_TGC"], given["cos_sin_LC"], batch, layer)
    return [out, layer.keys_BGPC.nan_to_num(), layer.values_BGPC.nan_to_num()]


def rope_and_write_oracle(tensors: Tensors) -> list[torch.Tensor]:
    given, layer, batch = split_up({name: t.clone() for name, t in tensors.items()}, wide=True)
    k_TGC = reference.rope(given["k_TGC"], given["cos_sin_LC"], batch.positions_T)
    reference.write_kv(k_TGC, given["v_TGC"], layer, batch.slots_T)
    q_THC = reference.rope(given["q_THC"], given["cos_sin_LC"], batch.positions_T)
    return [q_THC, layer.keys_BGPC, layer.values_BGPC]


def attention(backend: TorchBackend, tensors: Tensors, window: int | None = None) -> list[torch.Tensor]:
    given, layer, batch = split_up(tensors)
    return [backend.attention(given["q_THC"], layer, batch, scale=0.3, window=window)]


def attention_oracle(tensors: Tensors, window: int | None = None) -> list[torch.Tensor]:
    given, layer, batch = split_up(tensors, wide=True)
    return [reference.paged_attention(given["q_THC"], layer, batch, scale=0.3, window=window)]


@pytest.mark.parametrize("window", [None, 1, 6, 100])
def test_attention(backend: TorchBackend, window: int | None) -> None:
    tensors = attention_tensors(backend)
    assert_near(attention(backend, tensors, window)[0], attention_oracle(tensors, window)[0], backend.dtype)


@pytest.mark.parametrize("window", [None, 6])
def test_attention_with_sinks_and_its_denominators(backend: TorchBackend, window: int | None) -> None:
    tensors = attention_tensors(backend)
    given, layer, batch = split_up(tensors)
    wide, wide_layer, _ = split_up(tensors, wide=True)
    rows, heads, _ = given["q_THC"].shape
    sinks_H = torch.linspace(-4, 6, heads, device=backend.device)
    sinks_H[0] = -torch.inf  # no sink
    for sinks in (None, sinks_H):
        lse_TH, oracle_lse_TH = (torch.full((rows, heads), torch.nan, device=backend.device) for _ in range(2))
        options = {"scale": 0.3, "window": window, "sinks_H": sinks}
        out_THC = backend.attention(given["q_THC"], layer, batch, **options, lse_TH=lse_TH)
        oracle_THC = reference.paged_attention(wide["q_THC"], wide_layer, batch, **options, lse_TH=oracle_lse_TH)
        assert_near(out_THC, oracle_THC, backend.dtype)
        assert_near(lse_TH, oracle_lse_TH, backend.dtype)
        assert_near(backend.attention(given["q_THC"], layer, batch, **options), oracle_THC, backend.dtype)


def norm_tensors(backend: TorchBackend, rows: int = 5, width: int = 48) -> Tensors:
    return {
        "x_TD": normal(backend, rows, width),
        "residual_TD": torch.randn(rows, width, device=backend.device),  # the stream is wider than the activations
        "weight_D": normal(backend, width),
    }


def norms(backend: TorchBackend, t: Tensors) -> list[torch.Tensor]:
    residual_TD = t["residual_TD"].clone() if t["residual_TD"].is_contiguous() else t["residual_TD"]
    plain_TD = backend.rms_norm(t["x_TD"], t["weight_D"], 1e-5)
    return [plain_TD, *backend.add_rms_norm(t["x_TD"], residual_TD, t["weight_D"], 1e-5, 0.3)]


def norms_oracle(t: Tensors) -> list[torch.Tensor]:
    sum_TD = t["residual_TD"] + t["x_TD"].float() * 0.3
    weight_D = t["weight_D"].float()
    return [reference.rms_norm(t["x_TD"].float(), weight_D, 1e-5), reference.rms_norm(sum_TD, weight_D, 1e-5), sum_TD]


@pytest.mark.parametrize(("rows", "width"), [(0, 48), (1, 1), (5, 577)])
def test_norms(backend: TorchBackend, rows: int, width: int) -> None:
    tensors = norm_tensors(backend, rows, width)
    for ours, oracle in zip(norms(backend, tensors), norms_oracle(tensors), strict=True):
        assert_near(ours, oracle, backend.dtype)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(0, 8, 16), (1, 1, 1), (5, 37, 45), (13, 96, 64)])
def test_linear(backend: TorchBackend, rows: int, outputs: int, inputs: int, biased: bool) -> None:
    x_TI, weight_OI = normal(backend, rows, inputs), normal(backend, outputs, inputs)
    bias_O = normal(backend, outputs) if biased else None
    packed = backend.pack_linear(weight_OI, bias_O)
    oracle_TO = F.linear(x_TI.float(), weight_OI.float(), None if bias_O is None else bias_O.float())
    assert_near(backend.linear(x_TI, packed), oracle_TO, backend.dtype)
    logits_TO = backend.logits_linear(x_TI, packed)
    assert logits_TO.dtype == torch.float32
    assert_near(logits_TO, oracle_TO, backend.dtype)


def expert_tensors(backend: TorchBackend) -> Tensors:
    routing = make_routing(backend, 6, 4, 2, counts=True)
    tensors = {name: value for name, value in vars(routing).items() if isinstance(value, torch.Tensor)}
    tensors["identity_weights_T"] = torch.rand(6, device=backend.device)
    parts = dict(zip(("gate", "up", "down"), make_experts(backend, 4, 24, 32), strict=True))
    return {"x_TD": normal(backend, 6, 32), **tensors, **parts}


def experts(backend: TorchBackend, t: Tensors) -> list[torch.Tensor]:
    routing = Routing(**{name: t[name] for name in t if name.endswith(("_TK", "_T"))})
    return [backend.experts(t["x_TD"], backend.pack_experts(t["gate"], t["up"], t["down"], "silu"), routing)]


def experts_oracle(t: Tensors) -> list[torch.Tensor]:
    routing = Routing(**{name: t[name] for name in t if name.endswith(("_TK", "_T"))})
    return [reference.experts(*(t[name].float() for name in ("x_TD", "gate", "up", "down")), routing, "silu")]


def route(backend: TorchBackend, t: Tensors, spec: RouterSpec) -> list[torch.Tensor]:
    routing = backend.route(**t, spec=spec)
    return [routing.expert_ids_TK, routing.weights_TK]


CHOOSING = RouterSpec(num_experts=8, top_k=3, selection_bias=True, expert_scale=True)
FORCED = RouterSpec(num_experts=8, top_k=3, forced_experts=True)
REFERENCE = TorchBackend("cpu", torch.float32)
Case = tuple[Callable[[TorchBackend], Tensors], Callable[..., list[torch.Tensor]], Callable[..., list[torch.Tensor]]]
OPERATIONS: dict[str, Case] = {
    "experts": (expert_tensors, experts, experts_oracle),
    "norms": (norm_tensors, norms, norms_oracle),
    "rope_and_write": (attention_tensors, rope_and_write, rope_and_write_oracle),
    "attention": (attention_tensors, attention, attention_oracle),
    "route": (
        lambda b: router_tensors(b, CHOOSING, 5),
        lambda b, t: route(b, t, CHOOSING),
        lambda t: route(REFERENCE, t, CHOOSING),
    ),
    "plain route": (
        lambda b: router_tensors(b, RouterSpec(num_experts=8, top_k=3), 5),
        lambda b, t: route(b, t, RouterSpec(num_experts=8, top_k=3)),
        lambda t: route(REFERENCE, t, RouterSpec(num_experts=8, top_k=3)),
    ),
    "forced route": (
        lambda b: router_tensors(b, FORCED, 5),
        lambda b, t: route(b, t, FORCED),
        lambda t: route(REFERENCE, t, FORCED),
    ),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_strided_input_is_refused_by_name_or_computed_rightly(backend: TorchBackend, operation: str) -> None:
    """Each tensor in turn has its elements two steps apart: no kernel may take it for a contiguous one."""
    make, run, oracle = OPERATIONS[operation]
    tensors = make(backend)
    expected: Any = oracle(tensors)
    for name, tensor in tensors.items():
        spread = torch.stack((tensor, tensor), -1)[..., 0]
        refusal = "contiguous"
        try:
            results = run(backend, {k: v.clone() for k, v in tensors.items()} | {name: spread})
        except ValueError as raised:
            results, refusal = [], str(raised)
        assert "contiguous" in refusal, f"{name}: {refusal}"
        for ours, wanted in zip(results, expected, strict=bool(results)):
            assert error(ours, wanted) <= TOLERANCE[backend.dtype], f"{name} was misread"


@pytest.mark.parametrize("width", [1, 6, 37])
def test_a_rows_sigmoid_does_not_depend_on_the_number_of_rows(width: int) -> None:
    x_TD = torch.randn(2000, width) * 3
    whole = sigmoid(x_TD)
    assert torch.equal(torch.cat([sigmoid(row) for row in x_TD.split(1)]), whole)
    torch.testing.assert_close(whole, x_TD.sigmoid(), rtol=1e-6, atol=0)
