"""Experts that move and are copied while a model runs: where they go, that no bit changes, and that ranks get even."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dynamoe.dynamic.parallel.plan import Operation
from dynamoe.kernels.api.types import Routing
from dynamoe.moe.dispatch import UNUSED, used_ids
from dynamoe.moe.rebalance import evened_out, imbalance
from dynamoe.moe.slot_exchange import place_experts
from family_parity import Variant
from forks import run_processes
from parallel_jobs import PATIENCE, run_job
from test_families_parity_gpt_oss import to_mxfp4
from test_families_parity_gpt_oss import variant as gpt_oss
from test_families_parity_latent import DENSE_FIRST
from test_families_parity_latent import variant as latent

SCRIPT = Path(__file__).with_name("rebalance_run.py")


def work_of(rows: Sequence[int], places: list[list[int]]) -> list[float]:
    copies = {e: sum(e in experts for experts in places) for e in range(len(rows))}
    return [sum(rows[e] / copies[e] for e in experts if e != UNUSED) for experts in places]


@pytest.mark.parametrize("copies", [0, 1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_places_become_even_and_most_experts_stay(copies: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = generator.zipf(1.5, 32).clip(max=400).tolist()
    before = [[*range(8 * rank, 8 * rank + 8), *[UNUSED] * copies] for rank in range(4)]
    after = evened_out(rows, before)
    for experts, places in zip(before, after, strict=True):
        held = [expert for expert in places if expert != UNUSED]
        assert len(places) == 8 + copies
        assert len(set(held)) == len(held)
        assert all(
            place == expert for place, expert in zip(places, experts, strict=True) if place in held and place in experts
        )
    assert {expert for places in after for expert in places} - {UNUSED} == set(range(32))
    # No rank can be nearer to the mean than an expert's rows on all ranks allow.
    least = max(max(rows) / min(4, 1 + 4 * copies) / (sum(rows) / 4), 1)
    assert imbalance([work_of(rows, after)]) <= max(imbalance([work_of(rows, before)]) * 0.6, least * 1.1)
    again = evened_out(rows, after)
    assert again == after
    moved = sum(expert not in experts for experts, places in zip(before, after, strict=True) for expert in places)
    assert moved <= 16


def test_even_work_is_left_alone_and_cold_copies_give_way() -> None:
    assert evened_out([5, 5, 5, 5], [[0, 1], [2, 3]]) == [[0, 1], [2, 3]]
    assert imbalance([[3, 1], [2, 2]]) == pytest.approx(5 / 4)
    assert imbalance([[0, 0]]) == 1.0
    places = evened_out([0, 100, 10, 10], [[0, 1, UNUSED], [2, 3, 0]])  # no room but that of a copy that is not used
    assert 1 in places[0]
    assert 1 in places[1]


def test_a_row_itself_chooses_the_copy() -> None:
    places = [[0, 1, 4], [2, 0, UNUSED], [3, 0, 4]]
    shares = place_experts(places, 5, 3, "cpu")
    x = torch.randn(300, 20)
    ids = torch.tensor([[0, 4, 2]] * 300, dtype=torch.int32)
    counts = torch.tensor([3, 2] * 150, dtype=torch.int32)
    used = used_ids(Routing(expert_ids_TK=ids, weights_TK=torch.ones(300, 3), counts_T=counts))
    reached = shares.reached(used, x)
    assert reached.sum(0).equal((used != UNUSED).long())  # one rank for every slot
    for rank, experts in enumerate(places):
        assert {int(e) for e in used[reached[rank]]} <= set(experts)
    assert all(60 < count < 140 for count in reached[:, :, 0].sum(1).tolist())
    order = torch.randperm(300)
    assert shares.reached(used[order][:7], x[order][:7]).equal(reached[:, order][:, :7])


def skewed(made: Variant, folder: Path, ranks: int) -> Path:
    """A model whose first experts, those of rank 0 of so many, get about twice the mean load."""
    from safetensors.torch import load_file, save_file

    path = made.save(folder)
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith(("mlp.router.bias", "e_score_correction_bias")):
            tensor *= 0.2
            tensor[: len(tensor) // ranks] += 1.1 if "router" in name else 0.2
    save_file(tensors, file, metadata={"format": "pt"})
    return path


MODELS = {
    "gpt-oss-mxfp4": (lambda: gpt_oss(to_mxfp4, num_local_experts=8, num_hidden_layers=2), {}),
    "gpt-oss-int4": (lambda: gpt_oss(num_local_experts=16, num_experts_per_tok=4), {"quantization": "int4"}),
    "deepseek-int8": (
        lambda: latent("deepseek_v3", **DENSE_FIRST, n_routed_experts=16, n_group=1, topk_group=1),
        {"quantization": "int8"},
    ),
    "deepseek-bf16": (
        lambda: latent("deepseek_v3", **DENSE_FIRST, n_routed_experts=16, n_group=1, topk_group=1, n_shared_experts=2),
        {"dtype": "bfloat16"},
    ),
}
CELLS = [
    ("gpt-oss-mxfp4", {"expert": 4}, 10),
    *(pytest.param(name, {"expert": 4}, 20, marks=pytest.mark.slow) for name in MODELS),
    pytest.param("deepseek-int8", {"expert": 2, "tensor": 2}, 20, marks=pytest.mark.slow),
    pytest.param("gpt-oss-int4", {"expert": 2, "pipeline": 2}, 20, marks=pytest.mark.slow),
    pytest.param("gpt-oss-int4", {"expert": 2, "data": 2}, 20, marks=pytest.mark.slow),
]


def prompts_of(count: int) -> list[list[int]]:
    return np.random.default_rng(3).integers(3, 250, (count, 100)).tolist()


@pytest.mark.parametrize(("model", "sizes", "prompts"), CELLS)
def test_skewed_work_becomes_even_and_no_bit_changes(
    tmp_path: Path, model: str, sizes: dict[str, int], prompts: int
) -> None:
    make, arguments = MODELS[model]
    path = skewed(make(), tmp_path / "model", sizes["expert"])
    job = {"model": str(path), "prompts": prompts_of(prompts), "max_tokens": 3, "script": SCRIPT}

    def several(name: str, **more: Any) -> dict[str, Any]:
        parallel = {"parallel": {**sizes, "timeout": PATIENCE, **more}}
        return run_job(tmp_path / name, prod(sizes.values()), arguments=arguments | parallel, rounds=2, **job)

    one = run_job(tmp_path / "one", 1, arguments=arguments, rounds=1, **job)
    moving = several("moving", rebalance_steps=3, copies_memory="64KiB")
    first, second = moving["rounds"]
    assert first == second  # log-probabilities as well
    if arguments.get("dtype") != "bfloat16":  # where one process rounds less often
        assert [tokens for tokens, _ in first] == [tokens for tokens, _ in one["rounds"][0]]
    assert moving["windows"][0][1] > (1.9 if model == "gpt-oss-mxfp4" else 1.35)  # of two ranks one cannot have twice
    large = [uneven for slots, uneven in moving["windows"] if slots > 300]
    assert large[-1] <= 1.2
    assert 0 < moving["moves"] < 64
    assert moving["received"]["moves"] > 0
    assert moving["moving"].count(Operation.MOVE) > 1  # one layer in front of one step
    if prompts > 10:
        staying = several("staying", rebalance_steps=1 << 40)
        assert staying["rounds"] == moving["rounds"]
        assert (staying["moves"], staying["windows"]) == (0, [])


@pytest.mark.parametrize("shared_memory", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_rank_that_dies_while_experts_move_ends_the_model(tmp_path: Path, shared_memory: bool) -> None:
    path = skewed(MODELS["gpt-oss-mxfp4"][0](), tmp_path / "model", 2)
    parallel = {"expert": 2, "rebalance_steps": 2, "timeout": PATIENCE, "shared_memory": shared_memory}
    job = {"model": str(path), "prompts": prompts_of(6), "max_tokens": 6, "rounds": 1, "dies": 1}
    (tmp_path / "job.json").write_text(json.dumps({**job, "arguments": {"parallel": parallel}}))
    command = [str(SCRIPT), str(tmp_path / "job.json"), str(tmp_path / "answer.json")]
    code, output = run_processes(command, 2, tmp_path)
    assert code == 1
    assert "a process of the model has died or hangs" in output
    assert not (tmp_path / "answer.json").exists()
