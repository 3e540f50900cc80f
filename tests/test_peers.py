"""The benchmark against peers: our engine alone, a small checkpoint, the whole way to the results file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "peers.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A narrow model of the benchmark's family, with its vocabulary and a real tokenizer."""
    import shutil

    import torch
    from dynamoe.dynamic.convert.model_store import resolve_model
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2}
    config = GraniteMoeConfig(
        vocab_size=49152, max_position_embeddings=1024, tie_word_embeddings=True, **sizes, **experts
    )
    GraniteMoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    source = resolve_model("default", progress=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path / "model" / name)
    return tmp_path / "model"


@pytest.mark.slow
def test_every_cell_is_measured_and_priced(checkpoint: Path, tmp_path: Path) -> None:
    results = tmp_path / "peers.json"
    methods = ("--quantization", "none", "int8")
    done = run("--model", str(checkpoint), *methods, "--repetitions", "1", "--json", str(results), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(results.read_text())
    assert list(report["cells"]) == ["prefill", "decode 1", "decode 4", "decode 16"]
    for cell, row in report["cells"].items():
        assert list(row["ours"]) == ["dynamoe", "dynamoe int8"]
        for name, ours in row["ours"].items():
            assert row["tokens_per_second"][name]["median"] > 0, cell
            assert cell == "prefill" or ours["fraction_of_limit"] > 0, cell
            assert ours["best_peer"] is None, cell
    plain, int8 = (report["engines"][name] for name in ("dynamoe", "dynamoe int8"))
    assert plain["expert_bytes"] == 2 * 2 * 8 * 3 * 64 * 32
    assert 0.5 < int8["expert_bytes"] / plain["expert_bytes"] < 0.6
    # One row hits exactly its top 2 of 8 experts; more rows hit more.
    assert report["experts_hit"]["decode 1"] == pytest.approx(0.25)
    assert 0.25 < report["experts_hit"]["decode 4"] < report["experts_hit"]["decode 16"] <= 1.0
    assert report["engines"]["dynamoe"]["peak_resident_gib"] > 0


def test_without_a_checkpoint_it_says_how_to_make_one(tmp_path: Path) -> None:
    done = run("--model", str(tmp_path / "nothing"), cwd=tmp_path)
    assert done.returncode == 2
    assert "--make" in done.stderr
