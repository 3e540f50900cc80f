"""ZeRO: two processes and one see the same losses, and a run goes on from DeepSpeed's checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dynamoe.dynamic.train.deepspeed import ZeroConfig
from dynamoe.exits.training.progress import read_losses

pytest.importorskip("deepspeed", reason="DeepSpeed is optional")

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


def test_a_stage_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="not 4"):
        ZeroConfig(stage=4)
