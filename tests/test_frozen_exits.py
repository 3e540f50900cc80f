"""Exits for models that are served as they are: the whole command on a small random model, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.cli.main import main
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.llm import LLM
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.train.exit_states import (
    collect_served_states,
    default_exit_layers,
    load_states,
    needed_memory,
    refuse_if_too_many,
    served_backbone,
)
from dynamoe.dynamic.train.frozen import FrozenConfig, make_frozen_exits
from dynamoe.exits.sidecar import load_heads
from dynamoe.exits.training.exit_heads import ExitHeadsConfig
from dynamoe.exits.training.heads import HeadTraining
from safetensors.torch import load_file

SETTINGS: dict[str, Any] = {
    "exit_layers": (2, 4),
    "adapter_rank": 8,
    "served_prompts": 8,
    "prompt_tokens": 12,
    "new_tokens": 12,
    "exit_rows": 2400,
    "backend": "torch",
    "heads": ExitHeadsConfig(training=HeadTraining(steps=60, batch_rows=128, learning_rate=1e-2)),
}


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("qwen3_moe", num_hidden_layers=5)


@pytest.fixture(scope="module")
def run(checkpoint: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run."""
    config = config_of(checkpoint, texts, tmp_path_factory.mktemp("run"))
    make_frozen_exits(config, progress=False, say=lambda _: None)
    return Path(config.output)


def config_of(checkpoint: Path, texts: Path, output: Path, **changes: Any) -> FrozenConfig:
    settings = {"model": str(checkpoint), "text_folder": str(texts), "output": str(output), **SETTINGS, **changes}
    return FrozenConfig(**settings)


def test_the_result_serves_and_leaves(run: Path, checkpoint: Path) -> None:
    assert not (checkpoint / "exits.json").exists(), "nothing is written beside the model itself"
    assert (run / "model" / "model.safetensors").resolve() == (checkpoint / "model.safetensors").resolve()
    heads = load_heads(run / "model")
    assert heads is not None
    assert heads.exit_layers == (2, 4)
    assert heads.metrics["reports"]["linear, after 2"]["agreement"] > 0.05
    assert json.loads((run / "report.json").read_text())["exits"] == heads.metrics
    llm = LLM(run / "model", dtype="float32", backend="torch", progress=False, max_num_seqs=4)
    anywhere = SamplingParams(
        temperature=0.0, max_tokens=8, ignore_eos=True, quality=None, exit_thresholds={2: 0.0, 4: 0.0}
    )
    output = llm.generate([[5, 6, 7]], anywhere, use_tqdm=False)[0]
    assert output.outputs[0].layers == [5, *[2] * 7]


def test_the_adapters_bring_the_exits_closer(run: Path) -> None:
    decoder = load_decoder(run / "model", dtype="float32", backend="torch")
    states = load_states(run / "states.safetensors")
    backbone = served_backbone(decoder, (2, 4), 8, 0)
    final = backbone.logits(states.final_RD[:100])
    torch.testing.assert_close(final, decoder.logits(states.final_RD[:100]), rtol=1e-4, atol=1e-4)

    def divergence(x_RD: torch.Tensor) -> float:
        early = backbone.logits(x_RD).log_softmax(-1)
        return float(torch.nn.functional.kl_div(early, final.log_softmax(-1), log_target=True, reduction="batchmean"))

    adapter = backbone.adapters[2].requires_grad_(False)
    before = divergence(states.hidden_RD[2][:100])
    adapter.load_state_dict(load_file(run / "adapter-2.safetensors"))
    assert divergence(adapter(states.hidden_RD[2][:100])) < 0.9 * before


def test_states_are_those_of_the_engine_one_by_one(checkpoint: Path) -> None:
    decoder = load_decoder(checkpoint, dtype="float32", backend="cpu")
    tokens_NL = torch.randint(3, 320, (3, 20), generator=torch.Generator().manual_seed(0))
    together = collect_served_states(decoder, [([0, 1, 2], tokens_NL, 4)], (2, 4), 48)
    alone = [([n], tokens_NL[n : n + 1], 4) for n in range(3)]
    one_by_one = collect_served_states(decoder, alone, (2, 4), 48)
    assert torch.equal(together.final_RD, one_by_one.final_RD)
    assert torch.equal(together.router_entropy_R[4], one_by_one.router_entropy_R[4])
    assert together.router_entropy_R[4].min() > 0
    assert together.group_R.tolist() == [n for n in range(3) for _ in range(16)]
    assert not together.final_RD.is_inference()


def test_a_seed_decides_everything_and_an_interrupted_run_goes_on(
    run: Path, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    config = config_of(checkpoint, texts, tmp_path / "again")
    make_frozen_exits(config, progress=False, say=lambda _: None)
    again = Path(config.output)
    expected = (run / "model" / "exits.safetensors").read_bytes()
    assert (again / "model" / "exits.safetensors").read_bytes() == expected
    # Killed behind the first adapter: that one is taken as it is, the second is trained again.
    written = (again / "adapter-2.safetensors").stat().st_mtime_ns
    for file in (
        again / "adapter-4.safetensors",
        again / "model" / "exits.json",
        again / "model" / "exits.safetensors",
    ):
        file.unlink()
    make_frozen_exits(config, progress=False, say=lambda _: None)
    assert (again / "adapter-2.safetensors").stat().st_mtime_ns == written
    assert (again / "model" / "exits.safetensors").read_bytes() == expected
    with pytest.raises(ValueError, match="holds a run of another recipe \\(seed: 0 → 1\\)"):
        make_frozen_exits(replace(config, seed=1), progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exit_layers": (2, 5)}, "an exit must lie after layer 1 … 4, not 5"),
        ({"text_folder": "/nowhere"}, "is not a folder"),
        ({"exit_rows": 10**6}, "pieces of 24 tokens are wanted"),
        ({"exit_rows": 10**12}, "GiB beside the model"),
        ({"prompt_tokens": 600}, "exceed the model's 512 tokens"),
        ({"model": "nothing"}, "no model 'nothing'"),
    ],
)
def test_what_cannot_be_made_is_refused(
    checkpoint: Path, texts: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_frozen_exits(config_of(checkpoint, texts, tmp_path, **changes), progress=False, say=lambda _: None)


def test_settings_and_keys_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="text must be one of python, debian, not 'latin'"):
        FrozenConfig(text="latin")
    with pytest.raises(ValueError, match="served_prompts must be at least 1, not 0"):
        FrozenConfig(served_prompts=0)
    assert main(["exits", "exit_layer=[3]"]) == 2
    assert "there is no key exit_layer; did you mean exit_layers?" in capsys.readouterr().err


def test_depths_and_memory() -> None:
    assert default_exit_layers(30) == (15, 20, 24, 28)
    assert default_exit_layers(2) == (1,)
    with pytest.raises(ValueError, match="no room for an exit"):
        default_exit_layers(1)
    with pytest.raises(ValueError, match=r"2\.00 GiB beside the model, 1\.00 GiB are free"):
        refuse_if_too_many(2 << 30, 1 << 30)


def test_a_dense_model_has_no_entropy_to_look_at(make_checkpoint: Callable[..., Path]) -> None:
    decoder = load_decoder(make_checkpoint("llama"), dtype="float32", backend="torch")
    assert not served_backbone(decoder, (1,), 4, 0).routes
    assert needed_memory(decoder.spec, 1000, 1, HeadTraining()) > 2 * 1000 * 3 * 64 * 4
    layer = decoder.spec.layers[0]
    assert decoder.spec.layer_flops(layer) == 2 * 64 * (2 * 16 * 6 + 3 * 96)


def test_the_curve_counts_launched_layers_and_scores_served_prefixes(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location("exits_curve", folder / "exits_curve.py")
    assert spec is not None
    assert spec.loader is not None
    curve = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "exits_curve", curve)
    spec.loader.exec_module(curve)
    llm = LLM(run / "model", dtype="float32", progress=False, max_num_seqs=4, enable_prefix_caching=False)
    halves = curve.halves([curve.Prompt(genre, [n]) for n, genre in enumerate(["a", "b"] * 4)])
    assert [[prompt.genre for prompt in half] for half in halves] == [["a", "a", "b", "b"]] * 2
    prompts = [curve.Prompt("one", [5, 6, 7, 8]), curve.Prompt("other", [9, 10, 11, 12])]
    settings = [{"threshold": threshold} for threshold in (None, 1.0, 0.0)]
    full, never, always = curve.measure(llm, prompts, settings, 10)
    assert full["disagreement"] == 0
    assert full["executed_layer_share"] == 1
    assert never["executed_layer_share"] <= 1
    assert always["executed_layer_share"] == pytest.approx(2 / 5)
    assert always["projected_layer_share"] == pytest.approx(3 / 5)
    assert 0 < always["disagreement"] <= 0.9  # the first token of ten comes from the prompt
    assert set(always["by_genre"]) == {"one", "other"}
    assert curve.choose([full, never, always], 0.0) in (None, 1.0)
    assert curve.choose([full, never, always], 1.0) == 0.0
    low, high = always["interval_95"]
    assert low <= always["disagreement"] <= high
