"""Splitting a dense feed-forward layer into experts: the clustering, the router, whole checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe import LLM, SamplingParams
from dynamoe.dynamic.checkpoint.directory import write_json
from dynamoe.dynamic.convert.upcycle_checkpoint import upcycle_checkpoint
from dynamoe.moe.coactivation import affinity, assign_balanced, balanced_groups
from dynamoe.moe.upcycle import UpcycleConfig, contributions, split_ffn
from safetensors.torch import load_file, save_file

GROUPS, SIZE, ALWAYS, DIM = 6, 8, 2, 24
CONFIG = UpcycleConfig(num_experts=GROUPS + ALWAYS, num_always_on=ALWAYS)


def planted_layer(tokens: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """A layer with known experts: an input direction switches each group of neurons on, some neurons always fire.

    Returns the input, the neurons' activations, the down projection and the group of each neuron (-1: always on),
    with the neurons shuffled.
    """
    generator = torch.Generator().manual_seed(seed)
    directions_GD = torch.linalg.qr(torch.randn(DIM, GROUPS, generator=torch.Generator().manual_seed(99)))[0].T
    x_TD = torch.randn(tokens, DIM, generator=generator)
    drive_TG = (x_TD @ directions_GD.T).relu()
    group_N = torch.cat((torch.arange(GROUPS).repeat_interleave(SIZE), torch.full((ALWAYS * SIZE,), -1)))
    noise_TN = torch.rand(tokens, len(group_N), generator=generator)
    hidden_TN = torch.where(group_N < 0, 4.0, drive_TG[:, group_N.clamp_min(0)]) * (0.8 + 0.4 * noise_TN)
    # The shuffle and the projection belong to the layer, not to the tokens.
    layer = torch.Generator().manual_seed(7)
    order_N = torch.randperm(len(group_N), generator=layer)
    down_DN = torch.nn.functional.normalize(torch.randn(DIM, len(group_N), generator=layer), dim=0)
    return x_TD, hidden_TN[:, order_N], down_DN, group_N[order_N]


@pytest.mark.parametrize("seed", range(5))
def test_balanced_assignment_fills_every_group_and_is_stable(seed: int) -> None:
    preference_NE = torch.randn(40, 5, generator=torch.Generator().manual_seed(seed))
    group_N = assign_balanced(preference_NE, 8)
    assert group_N.bincount(minlength=5).tolist() == [8] * 5
    mine_N = preference_NE.gather(1, group_N[:, None])[:, 0]
    weakest_E = torch.stack([mine_N[group_N == group].min() for group in range(5)])
    blocking_NE = (preference_NE > mine_N[:, None]) & (preference_NE > weakest_E)
    assert not blocking_NE.any()


def test_balanced_assignment_survives_neurons_that_are_all_alike() -> None:
    assert assign_balanced(torch.zeros(12, 4), 3).bincount().tolist() == [3] * 4
    assert balanced_groups(torch.zeros(12, 12), 4).bincount().tolist() == [3] * 4


@pytest.mark.parametrize("seed", range(3))
def test_neurons_that_fire_together_share_an_expert(seed: int) -> None:
    _, hidden_TN, _, planted_N = planted_layer(600, seed)
    routed = planted_N >= 0
    found_N = balanced_groups(affinity(hidden_TN[:, routed]), GROUPS, seed=seed)
    pairs = {(found, planted) for found, planted in zip(found_N.tolist(), planted_N[routed].tolist(), strict=True)}
    assert len(pairs) == GROUPS


def test_groups_must_divide_the_neurons() -> None:
    with pytest.raises(ValueError, match="10 neurons cannot be split into 4"):
        balanced_groups(torch.eye(10), 4)
    x_TD, hidden_TN, down_DN, _ = planted_layer(8)
    with pytest.raises(ValueError, match="64 neurons cannot be split into 7"):
        split_ffn(x_TD, hidden_TN, down_DN, UpcycleConfig(num_experts=7, num_always_on=1))


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"num_experts": 0}, "num_experts"), ({"num_always_on": 16}, "num_always_on"), ({"ridge": 0.0}, "ridge")],
)
def test_settings_out_of_range_are_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UpcycleConfig(**setting)


def test_the_split_is_a_permutation_with_the_always_firing_neurons_first_and_repeats_exactly() -> None:
    x_TD, hidden_TN, down_DN, planted_N = planted_layer(400)
    split = split_ffn(x_TD, hidden_TN, down_DN, CONFIG)
    assert split.order_N.sort().values.equal(torch.arange(hidden_TN.shape[1]))
    assert (planted_N[split.order_N[: ALWAYS * SIZE]] == -1).all()
    assert split.router_ED.shape == (GROUPS, DIM)
    again = split_ffn(x_TD, hidden_TN, down_DN, CONFIG)
    assert split.order_N.equal(again.order_N)
    assert split.router_ED.equal(again.router_ED)


def lost_share(hidden_TN: torch.Tensor, down_DN: torch.Tensor, order_N: torch.Tensor, score_TE: torch.Tensor) -> float:
    """Squared length of what is lost with half of the routed experts, as a share of the layer's output."""
    keep_TE = torch.zeros_like(score_TE, dtype=torch.bool).scatter(1, score_TE.topk(GROUPS // 2).indices, True)
    parts_TEF = hidden_TN[:, order_N].unflatten(1, (-1, SIZE))
    parts_TEF = torch.cat((torch.zeros_like(parts_TEF[:, :ALWAYS]), parts_TEF[:, ALWAYS:] * ~keep_TE[:, :, None]), 1)
    lost_TD = parts_TEF.flatten(1) @ down_DN[:, order_N].T
    return float(lost_TD.square().sum() / (hidden_TN @ down_DN.T).square().sum())


def test_the_router_beats_chance_and_comes_close_to_the_oracle_on_unseen_tokens() -> None:
    x_TD, hidden_TN, down_DN, _ = planted_layer(800)
    split = split_ffn(x_TD, hidden_TN, down_DN, CONFIG)
    x_TD, hidden_TN, _, _ = planted_layer(800, seed=1)
    oracle_TE = contributions(hidden_TN.abs() * down_DN.norm(dim=0), split.order_N, CONFIG)
    random_TE = torch.rand(oracle_TE.shape, generator=torch.Generator().manual_seed(0))
    oracle, learned, random = (
        lost_share(hidden_TN, down_DN, split.order_N, score_TE)
        for score_TE in (oracle_TE, x_TD @ split.router_ED.T, random_TE)
    )
    assert oracle <= learned < 0.3 * random
    assert learned < 2 * oracle + 0.01


@pytest.fixture(scope="module")
def upcycled(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny dense Llama and what became of it: (dense directory, directory with 8 experts of 12, 2 always on)."""
    dense = make_checkpoint("llama")
    target = tmp_path_factory.mktemp("upcycled")
    ids = torch.randint(3, 320, (8, 64), generator=torch.Generator().manual_seed(0))
    upcycle_checkpoint(dense, target, ids, UpcycleConfig(num_experts=8), progress=False)
    return dense, target


def test_an_upcycled_checkpoint_is_the_dense_one_with_its_neurons_reordered(upcycled: tuple[Path, Path]) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in upcycled)
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp"
        stacks = [
            torch.cat(
                (w[f"{prefix}.gate_proj.weight"], w[f"{prefix}.up_proj.weight"], w[f"{prefix}.down_proj.weight"].T), 1
            )
            for w in (before, after)
        ]
        order = [next(i for i, row in enumerate(stacks[0]) if row.equal(mine)) for mine in stacks[1]]
        assert sorted(order) == list(range(96))
        assert order != list(range(96))
        assert after.pop(f"{prefix}.router.weight").shape == (6, 64)
    untouched = [name for name in before if ".mlp." not in name]
    assert all(before[name].equal(after[name]) for name in untouched)
    assert before.keys() == after.keys()
    config = json.loads((upcycled[1] / "config.json").read_text())
    wanted = {"model_type": "dynamoe", "num_experts": 8, "num_always_on_experts": 2, "num_experts_per_tok": 6}
    assert {**config, **wanted, "expert_size": 12} == config


def test_with_all_experts_on_it_generates_what_the_dense_model_does(
    upcycled: tuple[Path, Path], reference_model: Callable[[Path], Any]
) -> None:
    dense, target = upcycled
    prompts = [[5, 9, 33], [7, 100, 200, 300, 12], [44] * 9]
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    settings = {"dtype": "float32", "progress": False}
    ours = LLM(target, **settings).generate(prompts, params, use_tqdm=False)
    fewer = LLM(target, **settings, experts_per_token=2).generate(prompts, params, use_tqdm=False)
    model = reference_model(dense)
    for prompt, output in zip(prompts, ours, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(32):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert list(output.outputs[0].token_ids) == ids[len(prompt) :]
    assert [o.outputs[0].token_ids for o in ours] != [o.outputs[0].token_ids for o in fewer]


def test_upcycling_repeats_exactly(upcycled: tuple[Path, Path], tmp_path: Path) -> None:
    ids = torch.randint(3, 320, (8, 64), generator=torch.Generator().manual_seed(0))
    upcycle_checkpoint(upcycled[0], tmp_path, ids, UpcycleConfig(num_experts=8), progress=False)
    first, second = (load_file(folder / "model.safetensors") for folder in (upcycled[1], tmp_path))
    assert all(first[name].equal(second[name]) for name in first)


def test_only_llama_checkpoints_are_split(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only llama checkpoints"):
        upcycle_checkpoint(make_checkpoint("mixtral"), tmp_path, torch.ones(1, 8, dtype=torch.int64), UpcycleConfig())
    biased = tmp_path / "biased"
    biased.mkdir()
    write_json(biased / "config.json", {"model_type": "llama", "mlp_bias": True})
    save_file({}, biased / "model.safetensors")
    with pytest.raises(ValueError, match="without biases"):
        upcycle_checkpoint(biased, tmp_path, torch.ones(1, 8, dtype=torch.int64), UpcycleConfig())
