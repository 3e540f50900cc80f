"""What happens at an exit, in C++ and in Triton, against the oracles; and rows that do not notice each other."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from coded_heads import decode, encode
from dynamoe.kernels.api.types import AttentionBatch, KVLayer, KVProjection, ProbeWeights
from dynamoe.kernels.cpu.backend import CpuBackend
from dynamoe.kernels.reference import exits as exit_reference
from dynamoe.kernels.select import select_backend
from dynamoe.kernels.torch.backend import TorchBackend

# The interpreter computes lanes that a mask discards later, and numpy warns about them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = {"cpu": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
FEATURES = list(itertools.product((False, True), repeat=2))


def make_probe(hidden: int, inner: int, previous: bool = False, router_entropy: bool = False) -> ProbeWeights:
    """A linear probe for ``inner == 0``."""
    generator = torch.Generator().manual_seed(hidden + inner)
    inputs = hidden * (1 + previous) + router_entropy
    return ProbeWeights(
        weight_JX=torch.randn(max(inner, 1), inputs, generator=generator) * inputs**-0.5,
        bias_J=torch.randn(max(inner, 1), generator=generator),
        out_J=torch.randn(inner, generator=generator) if inner else None,
        out_bias=torch.randn((), generator=generator) if inner else None,
        previous=previous,
        router_entropy=router_entropy,
    )


def make_rows(rows: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states of very different sizes, states before, entropies, thresholds of which some keep a row for sure."""
    generator = torch.Generator().manual_seed(rows)
    x, before = (torch.randn(rows, hidden, generator=generator) for _ in range(2))
    thresholds = torch.randn(rows, generator=generator)
    thresholds[::3], thresholds[1::7] = torch.inf, -torch.inf
    return x * torch.logspace(-3, 3, rows)[:, None], before, torch.rand(rows, generator=generator), thresholds


def to(device: str, probe: ProbeWeights) -> ProbeWeights:
    return replace(probe, **{n: t.to(device) for n, t in vars(probe).items() if isinstance(t, torch.Tensor)})


@pytest.mark.parametrize(("previous", "entropy"), FEATURES)
@pytest.mark.parametrize(
    ("rows", "hidden", "inner"),
    [
        (1, 64, 0),
        (33, 64, 3),  # more rows than a task, an inner width that is no power of two
        (300, 7, 2),  # more rows than a block of the ordering, a width that is no multiple of a vector
        (5, 200, 1),  # a perceptron of one unit is not linear
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_decisions_equal_the_oracle(
    backend: str, rows: int, hidden: int, inner: int, previous: bool, entropy: bool
) -> None:
    device = DEVICE[backend]
    probe = to(device, make_probe(hidden, inner, previous, entropy))
    given = [t.to(device) for t in make_rows(rows, hidden)]
    x_TD, before_TD, entropy_T, thresholds_T = given
    expected = exit_reference.exit_decide(x_TD, probe, thresholds_T, before_TD, entropy_T)
    found = select_backend(device, torch.float32, backend).exit_decide(x_TD, probe, thresholds_T, before_TD, entropy_T)
    torch.testing.assert_close(found.logits_T, expected.logits_T, atol=2e-5, rtol=1e-5)
    assert (found.num_staying, found.order_T.tolist()) == (expected.num_staying, expected.order_T.tolist())


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_nobody_leaves_or_everybody(backend: str) -> None:
    device, probe = DEVICE[backend], to(DEVICE[backend], make_probe(16, 2))
    x_TD = torch.randn(9, 16, device=device)
    x_TD[4] = torch.nan  # a row of nonsense goes on: its logit reaches no threshold
    for limit, staying in ((torch.inf, 9), (-torch.inf, 1)):
        thresholds_T = torch.full((9,), limit, device=device)
        decision = select_backend(device, torch.float32, backend).exit_decide(x_TD, probe, thresholds_T)
        assert decision.num_staying == staying
        assert sorted(decision.order_T.tolist()) == list(range(9))


def test_a_rows_decision_is_bitwise_its_own() -> None:
    backend, probe = CpuBackend("cpu", torch.float32), make_probe(192, 8, True, True)
    x_TD, before_TD, entropy_T, thresholds_T = make_rows(70, 192)
    together = backend.exit_decide(x_TD, probe, thresholds_T, before_TD, entropy_T).logits_T
    for row in range(0, 70, 9):
        one = slice(row, row + 1)
        alone = backend.exit_decide(x_TD[one], probe, thresholds_T[one], before_TD[one], entropy_T[one])
        assert torch.equal(alone.logits_T, together[one])
    logits = [torch.randn(70, 13) for _ in range(3)]
    assert torch.equal(backend.router_entropy(logits)[5:6], backend.router_entropy([t[5:6] for t in logits]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [1, 8, 130])
def test_router_entropy_equals_the_oracle(dtype: torch.dtype, experts: int) -> None:
    logits = [(torch.randn(40, experts) * 3).to(dtype) for _ in range(3)]
    logits[1][3, experts // 2 :] = -torch.inf if experts > 1 else 0  # experts that are masked out
    found = CpuBackend("cpu", dtype).router_entropy(logits)
    torch.testing.assert_close(found, exit_reference.router_entropy(logits), atol=1e-5, rtol=1e-5)


PROJECTIONS = [  # q_size: keys begin at a block of packed outputs, or inside of one, which Triton does not know
    pytest.param(backend, norm, q_size, biased, dtype, coded, marks=[pytest.mark.slow] if often else [])
    for backend in ("cpu", "triton")
    for norm, q_size, biased, dtype, coded in itertools.product(
        ("none", "head", "full"), (64, 40), (False, True), (torch.float32, torch.bfloat16), (False, True)
    )
    for often in [backend == "triton" and (q_size == 64 or biased != coded)]
]


@pytest.mark.parametrize(("backend", "norm", "q_size", "biased", "dtype", "coded"), PROJECTIONS)
def test_projected_keys_and_values_equal_the_oracle(
    backend: str, norm: str, q_size: int, biased: bool, dtype: torch.dtype, coded: bool
) -> None:
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("with a GPU at hand kernels are compiled, not interpreted")
    hidden, heads, channels, page, rows, num_layers = 48, 3, 8, 4, 21, 2
    clip = 1.0 if norm == "full" else None
    x_TD, table = torch.randn(rows, hidden) * 5, torch.randn(64, channels)
    slots_T = torch.randperm(10 * page)[:rows]
    batch = AttentionBatch(
        positions_T=torch.randint(64, (rows,)),
        slots_T=slots_T,
        query_start_S1=torch.arange(rows + 1, dtype=torch.int32),
        context_len_S=torch.ones(rows, dtype=torch.int32),
        block_table_SM=torch.zeros(rows, 1, dtype=torch.int32),
        max_query_len=1,
        max_context_len=1,
    )
    width = {"none": None, "head": channels, "full": heads * channels}[norm]
    weights = [
        (
            torch.rand(hidden).to(dtype) + 0.5,
            (torch.randn(q_size + 2 * heads * channels, hidden) * 0.2).to(dtype),
            torch.randn(q_size + 2 * heads * channels).to(dtype) if biased else None,
            None if width is None else torch.rand(width).to(dtype) + 0.5,
        )
        for _ in range(num_layers)
    ]
    caches: dict[str, list[KVLayer]] = {}
    for chosen in (select_backend("cpu", dtype, backend), TorchBackend("cpu", dtype)):
        projections = [
            KVProjection(norm_D=norm_D, kv=chosen.linear_tail(chosen.pack_linear(qkv, bias), q_size), k_norm=k_norm)
            for norm_D, qkv, bias, k_norm in weights
        ]
        pages = [torch.zeros(2, 10, heads, page, channels, dtype=dtype) for _ in weights]
        pages = [encode(p) for p in pages] if coded else pages
        layers = caches[chosen.name] = [KVLayer(keys_BGPC=p[0], values_BGPC=p[1]) for p in pages]
        chosen.project_kv(x_TD, projections, layers, table, batch, norm_eps=1e-6, clip=clip)
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    for found, expected in zip(caches[backend], caches["torch"], strict=True):
        for name in ("keys_BGPC", "values_BGPC"):
            got, wanted = getattr(found, name), getattr(expected, name)
            assert wanted.any()
            if coded:  # a number near the middle between two codes may become either
                got, wanted = decode(got), decode(wanted)
                steps = wanted.abs().amax(-1, keepdim=True) / 120
                assert ((got - wanted).abs() <= steps + tolerance["atol"]).all()
            else:
                torch.testing.assert_close(got, wanted, **tolerance)
