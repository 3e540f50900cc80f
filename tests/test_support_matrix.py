"""Every cell of the support matrix that this machine can run does what the matrix says."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from dynamoe.dynamic.model.quantization import Method, methods
from dynamoe.kernels.api.formats import MXFP4
from dynamoe.kernels.api.kv_codes import KV_DTYPES, stored_channels
from dynamoe.kernels.api.quantized_weight import QuantizedWeight
from dynamoe.kernels.api.router_spec import RouterSpec
from dynamoe.kernels.api.support import (
    CACHES,
    DTYPES,
    EXPERTS,
    KERNELS,
    QUANTISED,
    REFUSED,
    ROUTERS,
    TORCH,
    Row,
    render,
    verified_on_gpu,
)
from dynamoe.kernels.api.tolerance import TOLERANCE, error
from dynamoe.kernels.api.types import AttentionBatch, KVLayer, Routing
from dynamoe.kernels.reference import operations as reference
from dynamoe.kernels.reference import quantized as quant_reference
from dynamoe.kernels.select import BACKENDS, select_backend
from dynamoe.kernels.torch import backend as torch_backend
from dynamoe.kernels.torch.backend import TorchBackend
from k_blocks import k_weight

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", EXPERTS, ids=lambda r: f"{r.backend}-{r.label}")
def test_experts(row: Row, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = row.outcomes[DTYPES.index(dtype)]
    torch_dtype = getattr(torch, dtype)
    if row.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if row.interpreted and torch.cuda.is_available():
        pytest.skip("with a GPU at hand kernels are compiled, not interpreted")
    if row.backend == "megablocks" and outcome != REFUSED:
        pytest.importorskip("megablocks")
    if outcome == REFUSED:
        with pytest.raises(ValueError, match=row.backend):
            select_backend(row.device, torch_dtype, row.backend)
        return
    backend = select_backend(row.device, torch_dtype, row.backend)
    fell_back = []
    plain = TorchBackend.experts
    monkeypatch.setattr(TorchBackend, "experts", lambda self, *a: (fell_back.append(1), plain(self, *a))[1])
    torch.manual_seed(9)
    gate, up, down = torch.randn(4, 16, 32) * 0.2, torch.randn(4, 16, 32) * 0.2, torch.randn(4, 32, 16) * 0.2
    routing = reference.route(torch.randn(3, 4), RouterSpec(num_experts=4, top_k=2))
    x_TD = torch.randn(3, 32)
    moved = Routing(expert_ids_TK=routing.expert_ids_TK.to(row.device), weights_TK=routing.weights_TK.to(row.device))
    out_TD = backend.experts(x_TD.to(row.device, torch_dtype), backend.pack_experts(gate, up, down, "silu"), moved)
    expected_TD = reference.experts(x_TD, gate, up, down, routing, "silu")
    assert error(out_TD.cpu(), expected_TD) < TOLERANCE[torch_dtype]
    if row.backend != "torch":
        assert (TORCH if fell_back else KERNELS) == outcome


def mxfp4_weight(like: torch.Tensor) -> QuantizedWeight:
    """Any weight of this shape."""
    inputs = like.shape[-1]
    data = torch.randint(256, (*like.shape[:-1], inputs // 2), dtype=torch.uint8)
    scale = torch.randint(118, 124, (*like.shape[:-1], -(-inputs // 32)), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    return QuantizedWeight(format=MXFP4, data=data, scale=scale, inputs=inputs, group=32).to(like.device)


@pytest.mark.parametrize("weights", QUANTISED)
@pytest.mark.parametrize("name", ["cpu", "triton", "grouped_mm"])
def test_quantised_weights(weights: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    backend = select_backend(device, torch.bfloat16 if device == "cuda" else torch.float32, name)
    names = ("int8", "int8-g32", "w8a8", "int4", "w4a8", "fp8", "fp8-block")
    others = [mxfp4_weight, *(partial(k_weight, kind) for kind in ("Q4_K", "Q5_K", "Q6_K"))]
    known = [*(methods()[name] for name in names), *map(Method, others)]
    method = dict(zip(QUANTISED, known, strict=True))[weights]
    fell_back = []
    oracle = quant_reference.experts
    monkeypatch.setattr(
        quant_reference, "experts", lambda *args, **given: (fell_back.append(1), oracle(*args, **given))[1]
    )
    torch.manual_seed(9)
    gate, up, down = (method.quantize(torch.randn(4, *shape).to(device)) for shape in ((16, 32), (16, 32), (32, 16)))
    packed = backend.pack_quantized_experts(gate, up, down, "silu", scheme=method.scheme)
    ids_TK = torch.tensor([[0, 1], [3, 2]], dtype=torch.int32, device=device)
    routing = Routing(expert_ids_TK=ids_TK, weights_TK=torch.ones(2, 2, device=device))
    assert backend.experts(torch.randn(2, 32).to(device, backend.dtype), packed, routing).isfinite().all()
    assert (TORCH if fell_back else KERNELS) == QUANTISED[weights].get(name, TORCH)


@pytest.mark.parametrize("kept", CACHES)
@pytest.mark.parametrize("name", ["cpu", "triton", "grouped_mm"])
def test_keys_and_values(kept: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    backend = select_backend(device, torch.bfloat16, name)
    outcome = CACHES[kept].get(name, TORCH)
    assert (kept in backend.kv_formats) == (outcome != REFUSED)
    if outcome == REFUSED:
        return
    fell_back = []
    for operation in ("rope_and_write", "attention"):
        plain = getattr(TorchBackend, operation)
        monkeypatch.setattr(
            TorchBackend,
            operation,
            lambda self, *args, plain=plain, **given: (fell_back.append(1), plain(self, *args, **given))[1],
        )
    dtype, channels, page = KV_DTYPES[kept] or backend.dtype, 8, 4
    size = stored_channels(channels, dtype) * dtype.itemsize
    pages = [torch.zeros(1, 2, page, size, dtype=torch.uint8, device=device).view(dtype) for _ in range(2)]
    layer = KVLayer(keys_BGPC=pages[0], values_BGPC=pages[1], scales_behind_page=backend.scales_behind_page)
    numbers = torch.arange(3, device=device)
    batch = AttentionBatch(
        positions_T=numbers, slots_T=numbers, query_start_S1=torch.tensor([0, 3], dtype=torch.int32, device=device),
        context_len_S=torch.tensor([3], dtype=torch.int32, device=device),
        block_table_SM=torch.zeros(1, 1, dtype=torch.int32, device=device), max_query_len=3, max_context_len=3,
    )  # fmt: skip
    q_THC, k_TGC, v_TGC = (torch.randn(3, heads, channels).to(device, backend.dtype) for heads in (4, 2, 2))
    q_THC = backend.rope_and_write(q_THC, k_TGC, v_TGC, torch.ones(3, channels, device=device), batch, layer)
    out_THC = backend.attention(q_THC, layer, batch, scale=1.0)
    torch.testing.assert_close(out_THC[0], v_TGC[0].repeat_interleave(2, 0), rtol=0.07, atol=0.02)
    assert (TORCH if fell_back else KERNELS) == outcome


@pytest.mark.parametrize("rule", ROUTERS)
@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_routing(rule: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, _, outcomes = ROUTERS[rule]
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    backend = select_backend(device, torch.float32, name)
    fell_back = []
    oracle = reference.route

    def route(*args: object, **given: object) -> Routing:
        fell_back.append(1)
        return oracle(*args, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(torch_backend.reference, "route", route)
    torch.manual_seed(8)
    logits_TE = torch.randn(5, spec.num_experts, device=device)
    given: dict[str, torch.Tensor] = {}
    if spec.selection_bias:
        given["selection_bias_E"] = torch.randn(spec.num_experts, device=device)
    if spec.expert_scale:
        given["expert_scale_E"] = torch.rand(spec.num_experts, device=device)
    if spec.forced_experts:
        given["forced_ids_TK"] = torch.tensor([[1, 3]] * 5, device=device)
    ours, expected = backend.route(logits_TE, spec, **given), oracle(logits_TE, spec, **given)
    assert torch.equal(ours.expert_ids_TK, expected.expert_ids_TK)
    torch.testing.assert_close(ours.weights_TK, expected.weights_TK, rtol=1e-5, atol=1e-6)
    assert (TORCH if fell_back else KERNELS) == outcomes[name]


def test_the_matrix_covers_every_backend_and_its_page_is_up_to_date() -> None:
    assert {row.backend for row in EXPERTS} == set(BACKENDS) - {"auto"}
    assert (ROOT / "docs" / "support-matrix.md").read_text() == render(), (
        "write the page again: python -m dynamoe.kernels.api.support > docs/support-matrix.md"
    )


def test_results_of_a_gpu_verify_its_cells(tmp_path: Path) -> None:
    assert "*unverified*" in render(tmp_path)
    report = {"rehearsal": False, "device": "Some GPU", "date": "2026-12-01T10:00:00",
              "correct": {"triton/bfloat16": True, "triton/float16": False}}  # fmt: skip
    (tmp_path / "gpu_check-a.json").write_text(json.dumps(report))
    rehearsal = {**report, "rehearsal": True, "correct": {"torch/float32": True}}
    (tmp_path / "gpu_check-b.json").write_text(json.dumps(rehearsal))
    assert verified_on_gpu(tmp_path) == {"triton/bfloat16": "Some GPU, 2026-12-01"}
    row = "| triton | GPU | torch, *unverified* | kernels (Some GPU, 2026-12-01) | kernels, *unverified* |"
    assert row in render(tmp_path)
