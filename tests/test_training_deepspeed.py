"""ZeRO: two processes and one see the same losses, a run goes on from DeepSpeed's checkpoint, and recipes scale out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from dynamoe.dynamic.train.deepspeed import ZeroConfig
from dynamoe.exits.training.progress import read_losses
from safetensors.torch import load_file

pytest.importorskip("deepspeed", reason="DeepSpeed is optional")

LAUNCH = Path(__file__).with_name("parallel_launch.py")
SCRIPT = """
import sys
from pathlib import Path
import torch
from dynamoe.dynamic.train.deepspeed import ZeroConfig, train_with_deepspeed
from dynamoe.dynamic.train.language_model import LanguageModelConfig, LanguageModelTask
from dynamoe.dynamic.train.model import DecoderConfig, TrainableDecoder
from dynamoe.exits.training.objectives import ExitTraining
from dynamoe.exits.training.trainer import TrainerConfig

torch.set_num_threads(1)
directory, stage, bf16, steps_now = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "bf16", sys.argv[4]
shape = DecoderConfig(
    vocab_size=64, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=4, expert_size=16,
    exit_layers=(1, 2), adapter_rank=4, max_position=64,
)
text = LanguageModelConfig(
    batch_tokens=256, sequence_length=32, window=64, balance_weight=0.0, grow_from=int(sys.argv[5]), grow_at=0.5
)
stream = torch.arange(3000, dtype=torch.int16) * 7 % 61
exits = ExitTraining(layer_dropout=0.0 if stage == 3 else 0.2, ramp=0.1)
task = LanguageModelTask(text, exits, stream, {}, 6)
config = TrainerConfig(
    steps=6, warmup_steps=2, optimizer="adamw", log_every=1, max_minutes=1e-9 if steps_now == "piece" else None
)
dtype = torch.bfloat16 if bf16 else torch.float32
train_with_deepspeed(
    TrainableDecoder(shape, dtype=dtype), task, config, directory, ZeroConfig(stage=stage, bf16=bf16), progress=False
)
torch.distributed.destroy_process_group()
"""


def losses(
    tmp_path: Path, name: str, ranks: int, stage: int, kind: str = "fp32", pieces: int = 0, grow: int = 0
) -> list[float]:
    """Cross-entropies of a run with so many processes."""
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0", "--local_addr", "127.0.0.1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    for piece in [*(["piece"] * pieces), "end"]:
        arguments = [str(script), str(tmp_path / name), str(stage), kind, piece, str(grow)]
        done = subprocess.run([*launcher, *arguments], env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    return [r["cross_entropy"] for r in read_losses(tmp_path / name / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_equal_one(stage: int, tmp_path: Path) -> None:
    one = losses(tmp_path, "one", 1, 0 if stage < 3 else 3)
    two = losses(tmp_path, "two", 2, stage)
    assert len(one) == 6
    assert one[-1] < one[0]
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=2e-4, atol=2e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_model_that_grows_is_the_same_on_two_processes(stage: int, tmp_path: Path) -> None:
    one = losses(tmp_path, "one", 1, 0 if stage < 3 else 3, grow=2)
    two = losses(tmp_path, "two", 2, stage, grow=2)
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=2e-4, atol=2e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_zero_two_resumes_in_pieces_with_bfloat16_weights(tmp_path: Path) -> None:
    whole = losses(tmp_path, "whole", 2, 2, "bf16")
    pieces = losses(tmp_path, "pieces", 2, 2, "bf16", pieces=1)
    assert pieces == whole


SHAPE = [
    *("recipe.corpus.vocab_size=320", "recipe.decoder.vocab_size=320", "recipe.decoder.hidden_size=32"),
    *("recipe.decoder.num_layers=4", "recipe.decoder.num_heads=4", "recipe.decoder.head_dim=8"),
    *("recipe.decoder.expert_size=16", "recipe.decoder.exit_layers=[1,2]", "recipe.decoder.max_position=64"),
    *("recipe.text.window=64", "recipe.text.sequence_length=32", "recipe.text.batch_tokens=256"),
    *("recipe.text.grow_from=0", "recipe.text.balance_weight=0", "recipe.text.evaluation_tokens=512"),
    *("recipe.trainer.optimizer=adamw", "recipe.exits.layer_dropout=0"),
]


def train_by_recipe(tmp_path: Path, name: str, processes: int, *settings: str) -> subprocess.CompletedProcess[str]:
    """``dynamoe train``, on the descriptions of statements that come with Python."""
    texts = tmp_path / "texts" / "topics"
    if not texts.exists():
        texts.mkdir(parents=True)
        for topic, text in sorted(topics.items()):
            (texts / f"{topic}.txt").write_text(text)
    environment = {**os.environ, "DYNAMOE_HOME": str(tmp_path / "home"), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(LAUNCH), str(processes), "-m", "dynamoe", "train", "recipe=smoke"]
    command += [f"output={tmp_path / name}", f"recipe.corpus.text_folder={texts.parent}", *SHAPE, *settings]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("stage", "expert"), [(2, 1), (3, 1), (2, 2)])
def test_a_recipe_makes_the_same_model_on_two_processes(stage: int, expert: int, tmp_path: Path) -> None:
    short = ["recipe.trainer.steps=8", "recipe.exits.loss_weight=0", f"zero.stage={stage}"]
    found = []
    for name, processes, groups in (("one", 1, 1), ("two", 2, expert)):
        done = train_by_recipe(tmp_path, name, processes, *short, f"zero.expert={groups}")
        assert done.returncode == 0, done.stderr[-3000:]
        report = json.loads((tmp_path / name / "report.json").read_text())
        found.append((report["evaluation"]["perplexity"], load_file(tmp_path / name / "model" / "model.safetensors")))
    (one, weights), (two, others) = found
    assert two == pytest.approx(one, rel=1e-3)
    assert one < 300  # of 320 tokens: something was learned
    for name, weight in weights.items():
        torch.testing.assert_close(others[name].float(), weight.float(), rtol=0.02, atol=2e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_exits_come_after_training_on_two_processes(tmp_path: Path) -> None:
    few = ["recipe.trainer.steps=8", "recipe.served_prompts=8", "recipe.prompt_tokens=16", "recipe.new_tokens=16"]
    few += ["recipe.exit_rows=4096", "recipe.shipped_prompts=8", "recipe.heads.training.steps=20"]
    few += ["recipe.decoder.hidden_size=128", "recipe.decoder.expert_size=128"]  # probes may cost 1 % of a layer
    done = train_by_recipe(tmp_path, "two", 2, *few)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("perplexity") == 1  # rank 0 alone
    assert (tmp_path / "two" / "model" / "exits.safetensors").is_file()


def test_what_runs_in_one_process_is_refused_under_a_launcher(tmp_path: Path) -> None:
    environment = {**os.environ, "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "dynamoe", "experts", "model=tiny"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "dynamoe experts: it runs in one process; the launcher started 2" in done.stderr


def test_a_stage_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="not 4"):
        ZeroConfig(stage=4)
