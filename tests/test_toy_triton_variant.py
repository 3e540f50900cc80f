"""A Triton variant that lives in this file: registered here, it is chosen, tuned, warmed up and reported like our own.

One launch runs a whole mixture for one or two rows: a program per row, expert by expert.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from dynamoe import LLM, SamplingParams
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.warm_up import warm_up_shapes
from dynamoe.kernels.api.router_spec import RouterSpec
from dynamoe.kernels.reference import operations as reference
from dynamoe.kernels.triton import variants
from dynamoe.kernels.triton.backend import TritonBackend
from dynamoe.kernels.triton.device import DeviceProperties
from dynamoe.kernels.triton.experts import ExpertProblem, ExpertsCall, PlainVariant
from dynamoe.kernels.triton.launch import Launch, next_power_of_2
from dynamoe.kernels.triton.tune import tune_experts
from dynamoe.kernels.triton.tuning import TuningCache
from dynamoe.kernels.triton.variants import Planner, Ranked, Tilings, register
from dynamoe.kernels.triton.warmup import planned_launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # lanes that a mask discards


@dataclass(frozen=True)
class ToyConfig:
    block: int
    num_warps: int = 8


@triton.jit
def toy_kernel(
    x_ptr, gate_ptr, up_ptr, down_ptr, ids_ptr, weights_ptr, out_ptr, hidden_size, expert_size,
    K: tl.constexpr, D_PAD: tl.constexpr, F_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out[row] = sum_k weight_k down_e (silu(gate_e x) * up_e x)``; BLOCK inputs or outputs at a time."""
    row = tl.program_id(0)
    f_F = tl.arange(0, F_PAD)
    for n0 in range(0, D_PAD, BLOCK):
        n_N = n0 + tl.arange(0, BLOCK)
        out_N = tl.zeros((BLOCK,), dtype=tl.float32)
        for k in range(K):
            matrix = tl.load(ids_ptr + row * K + k) * expert_size * hidden_size
            gate_F, up_F = tl.zeros((F_PAD,), dtype=tl.float32), tl.zeros((F_PAD,), dtype=tl.float32)
            for d0 in range(0, D_PAD, BLOCK):
                d_D = d0 + tl.arange(0, BLOCK)
                x_D = tl.load(x_ptr + row * hidden_size + d_D, mask=d_D < hidden_size, other=0.0).to(tl.float32)
                at_FD = matrix + f_F[:, None] * hidden_size + d_D[None, :]
                ok_FD = (f_F < expert_size)[:, None] & (d_D < hidden_size)[None, :]
                gate_F += tl.sum(tl.load(gate_ptr + at_FD, mask=ok_FD, other=0.0).to(tl.float32) * x_D[None, :], 1)
                up_F += tl.sum(tl.load(up_ptr + at_FD, mask=ok_FD, other=0.0).to(tl.float32) * x_D[None, :], 1)
            h_F = gate_F * tl.sigmoid(gate_F) * up_F
            at_NF = matrix + n_N[:, None] * expert_size + f_F[None, :]
            ok_NF = (n_N < hidden_size)[:, None] & (f_F < expert_size)[None, :]
            down_NF = tl.load(down_ptr + at_NF, mask=ok_NF, other=0.0).to(tl.float32)
            out_N += tl.load(weights_ptr + row * K + k) * tl.sum(down_NF * h_F[None, :], 1)
        tl.store(out_ptr + row * hidden_size + n_N, out_N.to(out_ptr.dtype.element_ty), mask=n_N < hidden_size)


class Toy(PlainVariant):
    """All that the package learns of it."""

    name = "toy"
    kernels = (toy_kernel,)

    def refuses(self, problem: ExpertProblem, device: DeviceProperties) -> str | None:
        if problem.tokens > 2 or problem.expert_size > 128 or problem.activation != "silu":
            return "mixtures that are no toys"
        return super().refuses(problem, device)

    def seconds(self, problem: ExpertProblem, device: DeviceProperties) -> float:
        return 1e-9

    def tilings(self, problem: ExpertProblem, device: DeviceProperties, count: int) -> list[Ranked]:
        return [{"toy": [ToyConfig(block) for block in (16, 32, 64)[:count]]}]

    def plan(self, call: ExpertsCall, tilings: Tilings, device: DeviceProperties) -> tuple[torch.Tensor, list[Launch]]:
        weights, routing, out_TD = call.weights, call.routing, self.outputs(call)
        config: ToyConfig = tilings["toy"]
        _, expert_size, hidden_size = weights.gate_EFD.shape
        launch = Launch(
            kernel=toy_kernel,
            grid=(call.x_TD.shape[0],),
            args={
                "x_ptr": call.x_TD,
                "gate_ptr": weights.gate_EFD,
                "up_ptr": weights.up_EFD,
                "down_ptr": weights.down_EDF,
                "ids_ptr": routing.expert_ids_TK,
                "weights_ptr": routing.weights_TK,
                "out_ptr": out_TD,
                "hidden_size": hidden_size,
                "expert_size": expert_size,
            },
            constexprs={
                "K": routing.expert_ids_TK.shape[1],
                "D_PAD": next_power_of_2(hidden_size),
                "F_PAD": next_power_of_2(expert_size),
                "BLOCK": config.block,
            },
            num_warps=config.num_warps,
        )
        return out_TD, [launch]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> type[Toy]:
    """The variant, registered for one test."""
    monkeypatch.setattr(variants, "_REGISTERED", {call: [*found] for call, found in variants._REGISTERED.items()})
    return register(Toy)


def cache(path: Path) -> TuningCache:
    return TuningCache("test", directory=path, shipped=path / "none")


def test_it_runs_what_it_claims(toy: type[Toy], tmp_path: Path) -> None:
    backend = TritonBackend(DEVICE, torch.float32, cache(tmp_path))
    weights = backend.pack_experts(
        torch.randn(6, 24, 40) * 0.2, torch.randn(6, 24, 40) * 0.2, torch.randn(6, 40, 24) * 0.2, "silu"
    )
    launched: list[str] = []
    run = backend._run
    backend._run = lambda launches: (launched.extend(launch.name for launch in launches), run(launches))[1]  # type: ignore[method-assign]
    for rows, names in ((2, ["toy_kernel"]), (3, ["pair_gate_up_kernel", "pair_down_kernel"])):
        x_TD, logits_TE = torch.randn(rows, 40, device=DEVICE), torch.randn(rows, 6, device=DEVICE)
        routing = backend.route(logits_TE, RouterSpec(num_experts=6, top_k=2))
        launched.clear()
        out_TD, plain = backend.experts(x_TD, weights, routing), weights.data
        expected_TD = reference.experts(x_TD, plain.gate_EFD, plain.up_EFD, plain.down_EDF, routing, "silu")
        torch.testing.assert_close(out_TD, expected_TD, rtol=1e-4, atol=1e-5)
        assert launched == names
    with pytest.raises(ValueError, match="experts already has a variant 'toy'"):
        register(toy)


def test_it_serves_a_model_that_compiles_nothing_during_requests(
    toy: type[Toy], make_checkpoint: Callable[..., Path]
) -> None:
    path = make_checkpoint("mixtral", num_hidden_layers=1)
    prompts, params = ["a b", "c"], SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    limits = {"max_model_len": 32, "max_num_seqs": 2, "max_num_batched_tokens": 8}
    tokens = {}
    for name in ("torch", "triton"):
        llm = LLM(path, dtype="float32", device=DEVICE, backend=name, progress=False, **limits)
        decoder = llm.engine.model.decoder
        launched: list[Launch] = []
        if isinstance(decoder.backend, TritonBackend):
            run = decoder.backend._run
            decoder.backend._run = lambda launches, run=run, seen=launched: (seen.extend(launches), run(launches))[1]
        tokens[name] = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    assert tokens["triton"] == tokens["torch"]
    assert {"toy_kernel", "pair_gate_up_kernel"} <= {launch.name for launch in launched}  # decoding, prompts
    shapes = warm_up_shapes(decoder.spec, EngineConfig(**limits), 32)
    planned = {launch.variant() for launch in planned_launches(shapes, torch.float32, decoder.backend.planner)}
    assert {launch.variant() for launch in launched if launch.kernel is toy_kernel} <= planned


def test_tuning_measures_it(toy: type[Toy], tmp_path: Path) -> None:
    backend = TritonBackend(DEVICE, torch.float32, cache(tmp_path))
    weights = backend.pack_experts(torch.randn(4, 16, 32), torch.randn(4, 16, 32), torch.randn(4, 32, 16), "silu")

    def measure(launches: Sequence[Launch]) -> float:
        return {32: 1.0}.get(launches[0].constexprs["BLOCK"], 3.0) if launches[0].name == "toy_kernel" else 2.0

    tune_experts(backend.planner, weights.data, 2, "silu", [1], backend._ticket(), measure=measure, candidates=3)
    problem = ExpertProblem.of(weights.data, "silu", torch.float32).of_rows(1, 2)
    choice = Planner(backend.planner.device, cache(tmp_path)).choice(ExpertsCall, problem)
    assert (choice.variant.name, choice.tilings) == ("toy", {"toy": ToyConfig(32)})


def test_it_compiles_ahead_of_time() -> None:
    """In a process of its own, as this one may be in interpreter mode."""
    code = (
        "from test_toy_triton_variant import Toy, register; register(Toy)\n"
        "from dynamoe.kernels.triton.aot import reports\n"
        "for target in ('sm_80', 'sm_90', 'gfx942'):\n"
        "    for r in reports(target, 'default', kernels=('toy_kernel',)):\n"
        "        print(target, r.kernel, r.tokens, r.registers > 0, r.complaint)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        cwd=Path(__file__).parent,
    )
    assert done.stdout.splitlines() == [
        f"{target} toy_kernel 1 True None" for target in ("sm_80", "sm_90", "gfx942")
    ], done.stdout + done.stderr
