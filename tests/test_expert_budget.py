"""The rule that spends an expert budget, and the calibrated contributions that it looks at."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.model.prompt_pass import fresh_cache
from dynamoe.dynamic.train.expert_scales import ExpertsConfig, make_expert_scales, measure_scales
from dynamoe.exits.segments import Segment
from dynamoe.exits.sidecar import backbone_hash
from dynamoe.kernels.api.router_spec import RouterSpec
from dynamoe.kernels.api.types import ExpertBudget, Routing
from dynamoe.kernels.cpu.backend import CpuBackend
from dynamoe.kernels.reference import operations as reference
from dynamoe.kernels.reference.budget import limit_experts
from dynamoe.kernels.select import select_backend
from dynamoe.moe.contribution import ContributionMeter, ExpertScales, LayerScales, keep_by_layer, slot_norms
from dynamoe.moe.sidecar import JSON_FILE, load_scales, save_scales

NO_CAP = 2**31 - 1


def routing_of(ids: list[list[int]], weights: list[list[float]], counts: list[int] | None = None) -> Routing:
    return Routing(
        expert_ids_TK=torch.tensor(ids, dtype=torch.int32),
        weights_TK=torch.tensor(weights),
        counts_T=None if counts is None else torch.tensor(counts, dtype=torch.int32),
    )


def limits(rows: int, keep: float, cap: int = NO_CAP) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((rows,), keep), torch.full((rows,), cap, dtype=torch.int32)


# Scales of experts 0 … 3; the row below then contributes 1, 4, 2 and 1 of 8, in the router's order.
SCALES = torch.tensor([2.0, 16.0, 10.0, 10.0])
ROW = ([[0, 1, 2, 3]], [[0.5, 0.25, 0.2, 0.1]])


@pytest.mark.parametrize(
    ("keep", "cap", "kept"),
    [
        (0.5, NO_CAP, [1]),  # expert 1 has half of the sum: reached exactly
        (0.51, NO_CAP, [1, 2]),
        (0.75, NO_CAP, [1, 2]),
        (0.8, NO_CAP, [0, 1, 2]),  # 0 and 3 tie: the router's order decides, and is kept
        (0.99, NO_CAP, [0, 1, 2, 3]),
        (1.0, NO_CAP, [0, 1, 2, 3]),
        (1.0, 2, [1, 2]),
        (0.99, 3, [0, 1, 2]),
        (1e-6, NO_CAP, [1]),  # never fewer than one
    ],
)
def test_the_rule_by_hand(keep: float, cap: int, kept: list[int]) -> None:
    limited = limit_experts(routing_of(*ROW), SCALES, *limits(1, keep, cap))
    assert limited.counts_T is not None
    assert limited.counts_T.tolist() == [len(kept)]
    assert limited.expert_ids_TK[0].tolist() == kept + [0] * (4 - len(kept))
    expected = [ROW[1][0][e] for e in kept] + [0.0] * (4 - len(kept))
    assert torch.equal(limited.weights_TK[0], torch.tensor(expected))


def test_without_calibration_the_routers_weight_is_the_estimate() -> None:
    limited = limit_experts(routing_of(*ROW), None, *limits(1, 1.0, 2))
    assert limited.expert_ids_TK[0].tolist() == [0, 1, 0, 0]


def test_unused_slots_stay_unused_and_cost_nothing() -> None:
    routing = routing_of([[0, 1, 99], [3, 2, 99], [7, 7, 7]], [[0.5, 0.4, 9.0], [0.3, 0.2, 0.1], [0.0] * 3], [2, 1, 0])
    limited = limit_experts(routing, SCALES, *limits(3, 0.8))
    assert limited.counts_T is not None
    assert limited.counts_T.tolist() == [1, 1, 0]  # 1 and 6.4 of 7.4; the only one; none to begin with
    assert limited.expert_ids_TK[:2, 0].tolist() == [1, 3]


def test_rows_that_lose_nothing_stay_as_they_are() -> None:
    routing = reference.route(torch.randn(40, 16), RouterSpec(num_experts=16, top_k=6))
    limited = limit_experts(replace(routing, index="tables"), torch.rand(16), *limits(40, 1.0, 6))
    assert torch.equal(limited.expert_ids_TK, routing.expert_ids_TK)
    assert torch.equal(limited.weights_TK, routing.weights_TK)
    assert limited.counts_T is not None
    assert (limited.counts_T == 6).all()
    assert limited.index is None, "tables of another routing"


def test_what_is_not_finite_keeps_its_experts() -> None:
    routing = routing_of([[0, 1], [2, 3]], [[float("nan"), 0.4], [float("inf"), 0.2]])
    for keep in (0.1, float("nan")):
        limited = limit_experts(routing, SCALES, *limits(2, keep))
        assert limited.counts_T is not None
        assert limited.counts_T[0] == 2


EDGES = {
    "no row": (0, 4, 2),
    "one row": (1, 8, 3),
    "one expert per row": (5, 4, 1),
    "every expert": (33, 6, 6),
    "many": (301, 64, 8),
}


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("edge", EDGES)
def test_the_kernel_equals_the_oracle(cpu_backend: CpuBackend, edge: str, scales: bool, counts: bool) -> None:
    rows, experts, top_k = EDGES[edge]
    routing = reference.route(torch.randn(rows, experts), RouterSpec(num_experts=experts, top_k=top_k))
    if rows > 4:
        routing.weights_TK[1] = 0.25  # ties
        routing.weights_TK[2] = 0.0  # nothing to have a share of
        routing.weights_TK[3, 0] = torch.nan
    if counts:
        routing = replace(routing, counts_T=torch.randint(0, top_k + 1, (rows,), dtype=torch.int32))
    keep_T = torch.rand(rows)
    keep_T[::3] = 1.0
    cap_T = torch.randint(1, top_k + 2, (rows,), dtype=torch.int32)
    scale_E = torch.rand(experts) if scales else None
    before = routing.expert_ids_TK.clone(), routing.weights_TK.clone()
    ours = cpu_backend.limit_experts(routing, scale_E, keep_T, cap_T)
    assert torch.equal(before[0], routing.expert_ids_TK), "the argument was changed"
    assert torch.equal(before[1].nan_to_num(7.0), routing.weights_TK.nan_to_num(7.0)), "the argument was changed"
    expected = limit_experts(routing, scale_E, keep_T, cap_T)
    assert ours.counts_T is not None
    assert expected.counts_T is not None
    assert torch.equal(ours.counts_T, expected.counts_T)
    unused_TK = torch.arange(top_k) >= ours.counts_T[:, None]
    for mine, theirs in (
        (ours.expert_ids_TK, expected.expert_ids_TK),
        (ours.weights_TK.nan_to_num(7.0), expected.weights_TK.nan_to_num(7.0)),
    ):
        assert torch.equal(mine.masked_fill(unused_TK, 0), theirs.masked_fill(unused_TK, 0))


def test_the_kernel_refuses_what_does_not_fit(cpu_backend: CpuBackend) -> None:
    routing = routing_of(*ROW)
    with pytest.raises(ValueError, match="one entry per row"):
        cpu_backend.limit_experts(routing, SCALES, *limits(2, 1.0))
    with pytest.raises(ValueError, match="there are 3 experts"):
        cpu_backend.limit_experts(routing, SCALES[:3], *limits(1, 0.5))
    with pytest.raises(ValueError, match=r"count 5 is not in 0 … 4"):
        cpu_backend.limit_experts(
            replace(routing, counts_T=torch.tensor([5], dtype=torch.int32)), None, *limits(1, 0.5)
        )


@pytest.mark.parametrize("backend", ["cpu", "triton", "grouped_mm"])
def test_a_decoder_on_a_budget_is_the_same_on_every_backend(make_checkpoint: Callable[..., Path], backend: str) -> None:
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    path, outputs, skipped = make_checkpoint("qwen3_moe", num_hidden_layers=2), [], []
    for name, where in (("torch", "cpu"), (backend, device)):
        decoder = load_decoder(path, dtype="float32", backend=name, device=where)
        layers, rows = decoder.spec.num_layers, 12
        keep_TL, cap_TL = torch.full((rows, layers), 0.6), torch.full((rows, layers), 2, dtype=torch.int32)
        keep_TL[:4], cap_TL[:4] = 1.0, NO_CAP
        limits_TL = [t.to(where) for t in (keep_TL, cap_TL, torch.zeros(rows, dtype=torch.int64))]
        budget = ExpertBudget(keep_TL=limits_TL[0], cap_TL=limits_TL[1], skipped_T=limits_TL[2])
        kv, batch = fresh_cache(decoder, [rows])
        x_TD = decoder.embed(torch.arange(3, 3 + rows, device=where))
        whole = Segment(index=0, layers=range(layers))
        outputs.append(decoder.logits(decoder.run_segment(whole, x_TD, kv, batch, budget=budget)).cpu())
        skipped.append(budget.skipped_T.tolist())
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3, atol=1e-3)
    assert skipped[0] == skipped[1]
    assert sum(skipped[0][:4]) == 0
    assert min(skipped[0][4:]) >= 2, "one of three experts in each layer"


def test_a_meter_is_a_ratio_of_means_drawn_to_the_layers() -> None:
    meter = ContributionMeter(3)
    ids_TK, weights_TK = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0.5, 0.25], [0.25, 0.25]])
    meter.add(ids_TK, weights_TK, torch.tensor([[1.0, 3.0], [2.0, 1.0]]), torch.tensor([10.0, 4.0]))
    assert meter.scales(prior_tokens=1e-9).scale_E.tolist() == pytest.approx([4.0, 8.0, 5.6])
    measured = meter.scales(prior_tokens=4.0)  # the mean norm is 7/4, the mean weight 5/16
    assert measured.scale_E.tolist() == pytest.approx([10 / 2.0, 11 / 1.75, 5.6])
    assert measured.impact == 0.5
    with pytest.raises(ValueError, match="no token"):
        ContributionMeter(3).scales()


@pytest.mark.parametrize("on_input", [False, True])
def test_norms_of_slots_are_those_of_what_they_add(on_input: bool) -> None:
    torch.manual_seed(0)
    gate, up, down = torch.randn(4, 16, 32), torch.randn(4, 16, 32), torch.randn(4, 32, 16)
    routing = replace(reference.route(torch.randn(5, 4), RouterSpec(num_experts=4, top_k=2)), weight_on_input=on_input)
    backend, x_TD = select_backend("cpu", torch.float32, "cpu"), torch.randn(5, 32)
    norms_TK = slot_norms(x_TD, backend.pack_experts(gate, up, down, "silu"), routing, backend)
    for k in range(2):
        alone = replace(
            routing, expert_ids_TK=routing.expert_ids_TK[:, k : k + 1], weights_TK=routing.weights_TK[:, k : k + 1]
        )
        added_TD = reference.experts(x_TD, gate, up, down, alone, "silu")
        torch.testing.assert_close(norms_TK[:, k], added_TD.norm(dim=-1))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_scales_are_measured_through_the_decoder(make_checkpoint: Callable[..., Path], backend: str) -> None:
    """An expert that adds twice as much gets twice the scale, everything in front of it being equal."""
    decoder = load_decoder(make_checkpoint("qwen3_moe"), dtype="float32", backend=backend, device="cpu")
    windows_NL, told = torch.randint(3, 320, (5, 20)), []
    scales = measure_scales(decoder, windows_NL, told.append)
    assert told[-1] == 100
    for layer in scales:
        assert layer is not None
        assert layer.scale_E.shape == (8,)
        assert (layer.scale_E > 0).all()
    changed = load_decoder(make_checkpoint("qwen3_moe"), dtype="float32", backend="torch", device="cpu")
    changed.layers[-1].ffn.data.down_EDF.mul_(2)
    found = measure_scales(changed, windows_NL)
    last, doubled = scales[-1], found[-1]
    assert last is not None
    assert doubled is not None
    torch.testing.assert_close(doubled.scale_E, 2 * last.scale_E, rtol=1e-3, atol=1e-4)
    assert doubled.impact == pytest.approx(2 * last.impact, rel=1e-3)


def test_a_model_without_weighed_experts_is_refused(make_checkpoint: Callable[..., Path]) -> None:
    decoder = load_decoder(make_checkpoint("llama"), dtype="float32")
    with pytest.raises(ValueError, match="needs experts; this llama model has none"):
        measure_scales(decoder, torch.zeros(1, 4, dtype=torch.int64))


def test_the_command_writes_a_sidecar_that_the_loader_reads(
    copy_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = copy_checkpoint("mixtral")
    said: list[str] = []
    config = ExpertsConfig(model=str(path), windows=4, window_tokens=32, dtype="float32")
    scales = make_expert_scales(config, progress=False, say=said.append)
    assert said == [f"{path / JSON_FILE}: contribution scales of 3 layers"]
    assert scales.tokens == 128
    decoder = load_decoder(path, backend="cpu")
    for number, (held, layer) in enumerate(zip(scales.layers, decoder.layers, strict=True)):
        assert held is not None
        assert layer.contribution_scale_E is not None
        assert torch.equal(held.scale_E, layer.contribution_scale_E)
        assert held.impact == decoder.expert_impacts[number]
    with pytest.raises(ValueError, match="windows must be at least 1, not 0"):
        ExpertsConfig(windows=0)
    with pytest.raises(ValueError, match="window_tokens=513 exceeds the model's 512"):
        make_expert_scales(replace(config, window_tokens=513), progress=False)


def test_a_sidecar_that_does_not_fit_is_refused(copy_checkpoint: Callable[..., Path]) -> None:
    path = copy_checkpoint("mixtral")
    file = path / JSON_FILE
    measured = LayerScales(scale_E=torch.rand(6), impact=0.1)
    scales = ExpertScales(layers=(measured, None), tokens=1, backbone_sha256="0" * 64)
    save_scales(scales, path)
    found = load_scales(path)
    assert found is not None
    assert found.layers[0] is not None
    assert torch.equal(found.layers[0].scale_E, measured.scale_E)
    assert found.layers[0].impact == measured.impact
    with pytest.raises(ValueError, match="measured on other weights: it names 000000000000"):
        load_decoder(path)
    save_scales(replace(scales, backbone_sha256=backbone_hash(path)), path)
    with pytest.raises(ValueError, match=r"holds scales for \[6, 0\] experts per layer; the model has \[6, 6, 6\]"):
        load_decoder(path)
    file.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        load_scales(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 7}, "has format 7; this version reads 1"),
        ({"layers": [{"impact": 1.0}]}, "is damaged: KeyError"),
        ({"layers": [{"impact": 1.0, "scales": [[]]}]}, "is damaged: TypeError"),
        (
            {"layers": [{"impact": 1.0, "scales": [-1.0]}]},
            r"contribution scales must be finite and at least 0, not \[-1",
        ),
        ({"layers": [{"impact": float("nan"), "scales": [1.0]}]}, "impact must be finite and at least 0, not nan"),
    ],
)
def test_a_sidecar_with_damage_names_it(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save_scales(ExpertScales(layers=(None,), tokens=1, backbone_sha256=""), tmp_path)
    file = tmp_path / JSON_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        load_scales(tmp_path)


def test_layers_that_matter_less_may_lose_more() -> None:
    assert keep_by_layer(1.0, [0.1, 0.0]) == [1.0, 1.0]
    assert keep_by_layer(0.8, [0.1, 0.1]) == pytest.approx([0.8, 0.8])
    assert keep_by_layer(0.8, [0.3, 0.1]) == pytest.approx([0.9, 0.7])  # each loses 0.03 of the stream
    assert keep_by_layer(0.4, [0.9, 0.1, 0.0]) == pytest.approx([0.88, 0.0, 0.0])
