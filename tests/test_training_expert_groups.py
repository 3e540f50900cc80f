"""Experts spread over ranks while training: the same losses, norms and model as one process, also after a restart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dynamoe.dynamic.train.deepspeed import ZeroConfig
from dynamoe.exits.training.progress import read_losses

pytest.importorskip("deepspeed", reason="DeepSpeed is optional")

LAUNCH = Path(__file__).with_name("parallel_launch.py")
SCRIPT = """
import json
import sys
from pathlib import Path
import torch
from dynamoe.dynamic.train.deepspeed import ZeroConfig, gathered, leave, train_with_deepspeed
from dynamoe.dynamic.train.language_model import LanguageModelConfig, LanguageModelTask
from dynamoe.dynamic.train.model import DecoderConfig, TrainableDecoder
from dynamoe.exits.training.objectives import ExitTraining
from dynamoe.exits.training.trainer import TrainerConfig

torch.set_num_threads(1)
settings = json.loads(sys.argv[1])
directory = Path(settings["directory"])
shape = DecoderConfig(
    vocab_size=64, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=4, expert_size=16,
    exit_layers=(1, 2), adapter_rank=4, max_position=64,
)
text = LanguageModelConfig(batch_tokens=256, sequence_length=32, window=64, balance_weight=0.0, z_weight=0.0)
stream = torch.arange(3000, dtype=torch.int16) * 7 % 61
exits = ExitTraining(layer_dropout=settings["dropout"], ramp=0.1)
task = LanguageModelTask(text, exits, stream, {}, 6)
config = TrainerConfig(
    steps=6, warmup_steps=2, optimizer="adamw", log_every=1, clip_norm=0.5,
    max_minutes=1e-9 if settings["piece"] else None,
)
zero = ZeroConfig(stage=settings["stage"], expert=settings["expert"], bf16=settings["bf16"])
model = TrainableDecoder(shape, dtype=torch.bfloat16 if zero.bf16 else torch.float32)
train_with_deepspeed(model, task, config, directory, zero, progress=False)
held = sum(p.numel() for name, p in model.named_parameters() if name.endswith(("gate_up_EGFD", "down_EDF")))
rank = torch.distributed.get_rank()
(directory / f"held-{rank}.json").write_text(json.dumps(held))
whole = gathered(model, zero)
if rank == 0:
    torch.save(whole.state_dict(), directory / "whole.pt")
leave(model)
"""
EXPERTS_IN_ALL = 4 * 4 * 3 * 32 * 16  # layers, experts, matrices, their sides


def run(
    directory: Path,
    processes: int,
    expert: int,
    stage: int,
    *,
    dropout: float = 0.0,
    bf16: bool = False,
    piece: bool = False,
) -> subprocess.CompletedProcess[str]:
    """A run, or its next piece."""
    directory.mkdir(exist_ok=True)
    script = directory / "run.py"
    script.write_text(SCRIPT)
    settings = {"directory": str(directory), "stage": stage, "expert": expert, "dropout": dropout, "bf16": bf16}
    command = [sys.executable, str(LAUNCH), str(processes), str(script), json.dumps({**settings, "piece": piece})]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    if processes == 1:
        environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def trained(*arguments, **settings) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cross-entropies and gradient norms of a run, (steps, 2), and the whole model that it leaves."""
    done = run(*arguments, **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    directory = arguments[0]
    rows = [[r["cross_entropy"], r["gradient_norm"]] for r in read_losses(directory / "metrics.jsonl")]
    return torch.tensor(rows), torch.load(directory / "whole.pt")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("processes", "stage", "dropout"), [(2, 0, 0.0), (2, 1, 0.9), (2, 2, 0.0), (4, 0, 0.0), (4, 1, 0.0), (4, 2, 0.9)]
)
def test_experts_on_two_ranks_train_as_on_one(processes: int, stage: int, dropout: float, tmp_path: Path) -> None:
    one, weights = trained(tmp_path / "one", 1, 1, 0, dropout=dropout)
    spread, others = trained(tmp_path / "spread", processes, 2, stage, dropout=dropout)
    assert len(one) == 6
    assert one[:, 1].max() > 0.5  # gradients were clipped
    torch.testing.assert_close(spread, one, rtol=2e-4, atol=2e-4)
    assert others.keys() == weights.keys()
    for name, weight in weights.items():
        # As a whole: AdamW makes much of single gradients that are all rounding, a step moves each by up to 3e-3.
        assert (others[name] - weight).norm() <= 2e-3 * weight.norm(), name
    held = [json.loads((tmp_path / "spread" / f"held-{rank}.json").read_text()) for rank in range(processes)]
    assert held == [EXPERTS_IN_ALL // 2] * processes


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("processes", "stage", "bf16"), [(2, 0, False), (2, 1, False), (2, 2, True), (4, 0, False), (4, 2, False)]
)
def test_a_run_goes_on_as_if_uninterrupted(processes: int, stage: int, bf16: bool, tmp_path: Path) -> None:
    whole, weights = trained(tmp_path / "whole", processes, 2, stage, bf16=bf16)
    for _ in range(2):
        done = run(tmp_path / "pieces", processes, 2, stage, bf16=bf16, piece=True)
        assert done.returncode == 0, done.stderr[-3000:]
    pieces, others = trained(tmp_path / "pieces", processes, 2, stage, bf16=bf16)
    assert torch.equal(pieces, whole)
    for name, weight in weights.items():
        assert torch.equal(others[name], weight), name


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_does_not_go_on_with_other_groups(tmp_path: Path) -> None:
    assert run(tmp_path / "run", 2, 2, 1, piece=True).returncode == 0
    done = run(tmp_path / "run", 2, 1, 1)
    assert done.returncode != 0
    assert "was written with zero.expert=2, not 1" in done.stderr


def test_groups_that_do_not_fit_are_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"zero\.expert=3 does not divide the 4 ranks"):
        ZeroConfig(expert=3).check(4, 6)
    with pytest.raises(ValueError, match=r"zero\.expert=4 does not divide the 6 experts"):
        ZeroConfig(expert=4).check(4, 6)
    ZeroConfig(expert=2).check(4, 6)
    with pytest.raises(ValueError, match="not 0"):
        ZeroConfig(expert=0)


def test_stages_that_cannot_have_expert_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"zero\.stage=3 .* zero\.expert=2 needs stage 0, 1 or 2"):
        ZeroConfig(stage=3, expert=2)
    with pytest.raises(ValueError, match="needs stage 1 or 2"):
        ZeroConfig(stage=0, bf16=True, expert=2)


def test_one_process_cannot_share_experts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dynamoe", "train", "recipe=smoke", "zero.expert=2", f"output={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "zero.expert=2 does not divide the 1 ranks" in done.stderr
