"""The GPU backend as a whole (interpreted without a GPU): choices, fallbacks, warm-up, tuning, parity of a model."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.engine.warm_up import warm_up_shapes
from dynamoe.kernels.api.router_spec import RouterSpec
from dynamoe.kernels.api.types import ExpertWeights
from dynamoe.kernels.reference import operations as reference
from dynamoe.kernels.triton.backend import TritonBackend
from dynamoe.kernels.triton.device import A100, H100, LISTED, DeviceProperties
from dynamoe.kernels.triton.experts import ExpertProblem, ExpertsCall, Pairs, Tiles
from dynamoe.kernels.triton.launch import Launch
from dynamoe.kernels.triton.shapes import WarmUpShape
from dynamoe.kernels.triton.tune import tune_experts
from dynamoe.kernels.triton.tuning import TuningCache, best_gemms, refine, row_tile, shared_bytes
from dynamoe.kernels.triton.variants import Choice, Planner
from dynamoe.kernels.triton.warmup import planned_launches

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPEC = RouterSpec(num_experts=6, top_k=2, renormalize=True)


@pytest.fixture
def backend(tmp_path: Path) -> TritonBackend:
    return TritonBackend(DEVICE, torch.float32, TuningCache("test", directory=tmp_path, shipped=tmp_path / "none"))


def variant(launch: Launch) -> tuple:
    """What decides which compiled kernel a launch uses. The interpreter does not know which numbers never matter."""
    varying = {"num_tokens", "num_rows", "num_items", "num_chunks", "num_slots", "window", "table_stride"}
    name, kinds, *rest = launch.variant()
    return name, tuple(kind for kind in kinds if kind[0] not in varying), *rest


def make_experts(backend: TritonBackend, activation: str = "silu") -> ExpertWeights:
    torch.manual_seed(4)
    return backend.pack_experts(
        torch.randn(6, 24, 32) * 0.2, torch.randn(6, 24, 32) * 0.2, torch.randn(6, 32, 24) * 0.2, activation
    )


def oracle(x_TD: torch.Tensor, weights: ExpertWeights, routing: object) -> torch.Tensor:
    plain = weights.data
    return reference.experts(x_TD, plain.gate_EFD, plain.up_EFD, plain.down_EDF, routing, weights.activation)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_two_runs_give_the_same_bits(backend: TritonBackend, num_tokens: int) -> None:
    weights = make_experts(backend)
    x_TD, logits_TE = torch.randn(num_tokens, 32, device=DEVICE), torch.randn(num_tokens, 6, device=DEVICE)
    first, second = (backend.experts(x_TD, weights, backend.route(logits_TE, SPEC)) for _ in range(2))
    assert torch.equal(first, second)


def test_replaced_counts_get_new_tables(backend: TritonBackend) -> None:
    weights = make_experts(backend)
    x_TD = torch.randn(40, 32, device=DEVICE)
    routing = backend.route(torch.randn(40, 6, device=DEVICE), SPEC)
    counts_T = torch.randint(0, 3, (40,), dtype=torch.int32, device=DEVICE)
    fewer = replace(routing, counts_T=counts_T)
    torch.testing.assert_close(
        backend.experts(x_TD, weights, fewer), oracle(x_TD, weights, fewer), rtol=1e-4, atol=1e-5
    )


def test_no_rows(backend: TritonBackend) -> None:
    weights = make_experts(backend)
    routing = backend.route(torch.empty(0, 6, device=DEVICE), SPEC)
    assert backend.experts(torch.empty(0, 32, device=DEVICE), weights, routing).shape == (0, 32)


def test_strided_inputs_are_refused(backend: TritonBackend) -> None:
    weights = make_experts(backend)
    routing = backend.route(torch.randn(3, 6, device=DEVICE), SPEC)
    with pytest.raises(ValueError, match=r"x_TD must be contiguous; it has shape \(3, 32\), strides \(1, 3\)"):
        backend.experts(torch.randn(32, 3, device=DEVICE).t(), weights, routing)
    with pytest.raises(ValueError, match="logits_TE must be contiguous"):
        backend.route(torch.randn(6, 3, device=DEVICE).t(), SPEC)
    swapped = replace(routing, weights_TK=torch.randn(2, 3, device=DEVICE).t())
    with pytest.raises(ValueError, match="weights_TK must be contiguous"):
        backend.experts(torch.randn(3, 32, device=DEVICE), weights, swapped)


def test_what_no_kernel_covers_falls_back_and_says_so_once(
    backend: TritonBackend, caplog: pytest.LogCaptureFixture
) -> None:
    capped = RouterSpec(num_experts=6, top_k=1, capacity=2)
    logits_TE = torch.randn(5, 6, device=DEVICE)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            ours = backend.route(logits_TE, capped)
    assert torch.equal(ours.weights_TK, reference.route(logits_TE, capped).weights_TK)
    weights, x_TD = make_experts(backend), torch.randn(5, 32, device=DEVICE)
    strided = replace(weights.data, gate_EFD=weights.data.gate_EFD.transpose(1, 2).contiguous().transpose(1, 2))
    with caplog.at_level(logging.WARNING):
        out_TD = backend.experts(x_TD, replace(weights, data=strided), ours)
    torch.testing.assert_close(out_TD, oracle(x_TD, weights, ours), rtol=1e-4, atol=1e-5)
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [
        "the triton backend has no kernel for routing with a capacity",
        "the triton backend has no kernel for expert weights with strided rows",
    ]


@pytest.mark.parametrize("kept", ["auto", "int8", "fp8"])
def test_a_model_compiles_nothing_during_requests(make_checkpoint: Callable[..., Path], kept: str) -> None:
    path = make_checkpoint("mixtral", num_hidden_layers=1, sliding_window=4)
    limits = EngineConfig(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=32)
    model = load_model(path, dtype="float32", device=DEVICE, backend="triton", kv_cache_dtype=kept, progress=False)
    engine, backend, launched = Engine(model, limits), model.decoder.backend, []
    assert isinstance(backend, TritonBackend)
    run = backend._run
    backend._run = lambda launches: (launched.extend(launches), run(launches))[1]  # type: ignore[method-assign]
    shapes = warm_up_shapes(model.spec, limits, 32, kv_dtype=model.decoder.kv_dtype)
    planned = planned_launches(shapes, torch.float32, backend.planner)
    for number, prompt in enumerate([[5, 9, 200, 31, 7, 77], [11]]):
        engine.add_request(str(number), prompt, SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))
    while engine.has_unfinished():
        engine.step()
    compiled = {variant(launch) for launch in planned}
    assert launched
    assert not {launch.name for launch in launched if variant(launch) not in compiled}, "compiled during a request"


def test_without_a_gpu_or_the_interpreter_the_backend_is_refused() -> None:
    code = (
        "import torch; from dynamoe.kernels.select import select_backend; "
        "select_backend('cpu', torch.bfloat16, 'triton')"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert "ValueError: the triton backend needs a GPU (or TRITON_INTERPRET=1), not device 'cpu'" in done.stderr


def test_warm_up_plans_everything_that_requests_launch(backend: TritonBackend) -> None:
    """The variants that real calls use are among those that the warm-up compiled."""
    shape = WarmUpShape(
        hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=16, page_size=4, max_tokens=64, max_context=64,
        max_sequences=4, router=SPEC, expert_size=24, activation="silu",
    )  # fmt: skip
    launches = planned_launches([shape], torch.float32, backend.planner)
    planned = {variant(launch) for launch in launches}
    assert backend.warm_up([shape], progress=False) == len(launches)
    weights, launched = make_experts(backend), []
    backend._run = lambda launches: launched.extend(launches)  # type: ignore[method-assign]
    for num_tokens in (1, 2, 3, 17, 40, 64):
        x_TD = torch.randn(num_tokens, 32, device=DEVICE)
        routing = backend.route(torch.randn(num_tokens, 6, device=DEVICE), SPEC)
        backend.experts(x_TD, weights, routing)
        counts_T = torch.ones(num_tokens, dtype=torch.int32, device=DEVICE)
        backend.experts(x_TD, weights, replace(routing, counts_T=counts_T))  # an expert budget
        backend.rms_norm(x_TD, x_TD[0], 1e-5)
        backend.add_rms_norm(x_TD, x_TD, x_TD[0], 1e-5)
    assert not {launch.name for launch in launched if variant(launch) not in planned}
    assert len(launched) > 20


# The cost model


QWEN = ExpertProblem(tokens=1, num_experts=128, top_k=8, hidden_size=2048, expert_size=768)


def planner_of(device: DeviceProperties, path: Path) -> Planner:
    return Planner(device, TuningCache("nobody's", directory=path, shipped=path))


@pytest.mark.parametrize("device", LISTED.values(), ids=LISTED)
@pytest.mark.parametrize("shape", [(14, 12, 576, 96), (128, 8, 2048, 768), (8, 2, 4096, 14336), (4, 1, 8, 8)])
def test_every_shape_gets_configurations_that_fit(
    device: DeviceProperties, shape: tuple[int, int, int, int], tmp_path: Path
) -> None:
    planner = planner_of(device, tmp_path)
    for tokens in (1, 2, 5, 16, 64, 100, 1000, 16384):
        problem = ExpertProblem(1, *shape).of_rows(tokens, shape[1])
        pairs = Pairs().tilings(problem, device, 1)[0]
        assert pairs["pair_gate_up"][0].block_n * pairs["pair_gate_up"][0].block_k >= 16
        assert pairs["pair_down"][0].num_warps in (2, 4, 8)
        choice = planner.choice(ExpertsCall, problem)
        tiles = Tiles().tilings(problem, device, 1)[0]
        assert choice.table_rows in (None, tiles["gate_up"][0].block_m)
        for part, product in zip(("gate_up", "down"), problem.products(tiles["gate_up"][0].block_m), strict=True):
            assert tiles[part][0].block_m == product.block_m
            assert shared_bytes(product, tiles[part][0], device) <= device.shared_bytes


def test_decode_streams_pairs_and_prefill_is_persistent_with_descriptors(tmp_path: Path) -> None:
    planner = planner_of(H100, tmp_path)

    def choice(tokens: int, planner: Planner = planner) -> Choice:
        return planner.choice(ExpertsCall, QWEN.of_rows(tokens, 8))

    assert [choice(tokens).variant.name for tokens in (1, 64, 8192)] == ["pairs", "tiles", "tiles"]
    assert [row_tile(t, 128, 8) for t in (1, 64, 256, 8192)] == [16, 16, 32, 128]
    for config in choice(8192).tilings.values():
        assert (config.tma, config.swap, config.programs) == (True, False, H100.num_sms)
    for config in choice(64).tilings.values():
        assert (config.tma, config.swap, config.programs) == (False, True, 0)
    assert not any(c.tma or c.swap for c in choice(64, planner_of(A100, tmp_path)).tilings.values())


def test_tuning_keeps_the_fastest_and_another_process_finds_it(
    backend: TritonBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = make_experts(backend)
    plain = weights.data
    tried: list[object] = []

    def measure(launches: list) -> float:
        tried.append(launches[0].name)
        blocks = launches[0].constexprs.get("BLOCK_N", 0), launches[0].constexprs.get("BLOCK_K", 0)
        return 1.0 if blocks == (32, 32) else 2.0 + len(tried) * 1e-3

    tune_experts(backend.planner, plain, 2, "silu", [8], backend._ticket(), measure=measure, candidates=6)
    assert {"gate_up_kernel", "down_kernel", "pair_gate_up_kernel", "pair_down_kernel"} <= set(tried)
    problem = ExpertProblem.of(plain, "silu", torch.float32).of_rows(7, 2)  # 7 tokens share the measurements for 8
    kept = backend.planner.choice(ExpertsCall, problem)
    assert (kept.variant.name, kept.tilings["gate_up"].block_n, kept.tilings["gate_up"].block_k) == ("tiles", 32, 32)
    found = TuningCache("test", directory=tmp_path, shipped=tmp_path / "none")
    assert Planner(backend.planner.device, found).choice(ExpertsCall, problem) == kept
    monkeypatch.setattr(Tiles, "kernels", Tiles.kernels[1:])  # measured with other kernels: no longer believed
    assert Planner(backend.planner.device, found).choice(ExpertsCall, problem).variant.name == "pairs"
    x_TD = torch.randn(7, 32, device=DEVICE)
    routing = backend.route(torch.randn(7, 6, device=DEVICE), SPEC)
    torch.testing.assert_close(
        backend.experts(x_TD, weights, routing), oracle(x_TD, weights, routing), rtol=1e-4, atol=1e-5
    )


def test_cache_files(tmp_path: Path) -> None:
    shipped, own = tmp_path / "shipped", tmp_path / "own"
    TuningCache("A GPU 80GB", directory=shipped, shipped=own).put("key", {"variant": "tiles"})
    assert (shipped / "a-gpu-80gb.json").is_file()
    read = TuningCache("A GPU 80GB", directory=own, shipped=shipped)
    assert read.get("key") == {"variant": "tiles"}
    assert read.get("other") == {}
    read.put("key", {"variant": "pairs"})
    assert TuningCache("A GPU 80GB", directory=own, shipped=shipped).get("key") == {"variant": "pairs"}
    (own / "a-gpu-80gb.json").write_text(json.dumps({"entries": "cut short"})[:-3])
    assert TuningCache("A GPU 80GB", directory=own, shipped=tmp_path).get("key") == {}


def test_refine_passes_over_what_does_not_run() -> None:
    def measure(number: int) -> float:
        if number == 1:
            raise RuntimeError("out of shared memory")
        return float(number)

    assert refine([3, 1, 2], measure) == (2, 2.0)
    with pytest.raises(RuntimeError, match="no configuration could be measured"):
        refine([1], measure)


def test_more_candidates_are_ranked_by_time(tmp_path: Path) -> None:
    problem = QWEN.of_rows(8192, 8)
    configs = best_gemms(problem.products(128)[0], H100, True, 8)
    assert len(set(configs)) == 8
    assert configs[0] == planner_of(H100, tmp_path).choice(ExpertsCall, problem).tilings["gate_up"]
