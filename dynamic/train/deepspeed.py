"""The same training under DeepSpeed: data parallel, with optimiser states, gradients and weights divided among ranks.

ZeRO stage 1 divides the first, 2 the first two, 3 all of them. Started with ``torchrun`` or the ``deepspeed`` launcher.
With ``expert`` ranks in a group, each holds a part of every mixture's experts, and rows are exchanged.

The objective, the data order and the schedule are those of the plain loop; one process and several see the same tokens
in the same step. Checkpoints are DeepSpeed's own and need the same number of ranks to resume.
"""

from __future__ import annotations

import gc
import os
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...exits.training.optimizers import cosine_rate, make_optimizers
from ...exits.training.progress import LossLog, ProgressLine
from ...exits.training.trainer import TrainerConfig, TrainResult, due
from ...kernels.api.ranges import check_ranges
from .deepspeed_experts import ExpertGroups, clip_gradients, refuse_other_groups
from .expert_groups import collect_experts
from .language_model import LanguageModelTask
from .model import TrainableDecoder

_LATEST = "latest"  # DeepSpeed's own file; it names the newest complete checkpoint


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """How DeepSpeed divides a run.

    Arguments:
        stage: 0 (plain data parallel) to 3.
        bf16: keep the weights in bfloat16 and their float32 copies in the optimiser.
        expert: ranks that share the experts of every mixture; each holds an equal part. 1: every rank holds all.

    Raises:
        ValueError: for a stage that does not exist, or one that cannot run with ``expert``.
    """

    stage: int = 2
    bf16: bool = False
    expert: int = 1

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise ValueError(f"ZeRO stage must be 0, 1, 2 or 3, not {self.stage}")
        check_ranges(self, "expert", where="zero.", least=1)
        if self.expert > 1 and self.stage == 3:
            raise ValueError(f"zero.stage=3 divides experts itself; zero.expert={self.expert} needs stage 0, 1 or 2")
        if self.expert > 1 and self.stage == 0 and self.bf16:
            raise ValueError(f"zero.expert={self.expert} with zero.bf16=true needs stage 1 or 2, not 0")

    def check(self, ranks: int, num_experts: int) -> None:
        """
        Raises:
            ValueError: when so many ranks cannot share so many experts in groups of ``expert``.
        """
        for number, what in ((ranks, "ranks"), (num_experts, "experts of a layer")):
            if number % self.expert:
                raise ValueError(f"zero.expert={self.expert} does not divide the {number} {what}")


class _Loss(nn.Module):
    """Loss as a module's output, which is where DeepSpeed gathers divided weights."""

    def __init__(self, decoder: TrainableDecoder, task: LanguageModelTask, experts: ExpertGroups | None) -> None:
        super().__init__()
        self.decoder, self.task = decoder, task
        if experts is not None:
            self.announcement = experts.announcement()

    def forward(self, step: int, shard: tuple[int, int]) -> tuple[torch.Tensor, dict]:
        return self.task.loss(self.decoder, step, shard=shard)


def join(device: torch.device) -> None:
    """Join the other processes, if that has not been done.

    Raises:
        ValueError: when DeepSpeed is not installed.
    """
    _deepspeed().init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")


def leave(model: TrainableDecoder) -> None:
    """Leave the process group, all ranks at once; a model whose experts are spread cannot be used afterwards."""
    torch.distributed.barrier()
    for layer in model.layers:
        layer.mlp.group = None  # type: ignore[union-attr]
    gc.collect()  # so that nothing holds a group when it ends
    _deepspeed().comm.destroy_process_group()


def gathered(model: TrainableDecoder, zero: ZeroConfig) -> TrainableDecoder:
    """A trained model with all of its weights, in float32. All ranks call this."""
    whole = TrainableDecoder(model.config, dtype=model.dtype).to(model.embedding.device)
    parameters = list(model.parameters())
    together = _deepspeed().zero.GatheredParameters(parameters) if zero.stage == 3 else nullcontext()
    with together, torch.no_grad():
        for target, source in zip(whole.parameters(), parameters, strict=True):
            spread = source.shape != target.shape
            target.copy_(collect_experts(source, model.expert_group) if spread else source)
    return whole


def train_with_deepspeed(
    model: TrainableDecoder,
    task: LanguageModelTask,
    config: TrainerConfig,
    directory: Path,
    zero: ZeroConfig,
    *,
    progress: bool = True,
) -> TrainResult:
    """Train under DeepSpeed, from its latest checkpoint in ``directory`` if there is one.

    Arguments:
        model: on every rank with the same weights. After a run with stage 0-2 it holds the trained ones, of the
            experts this rank's part.
        config: ``optimizer`` must be ``adamw``: ZeRO cuts matrices into flat parts, which Muon cannot orthogonalise.

    Raises:
        ValueError: when DeepSpeed is not installed, for another optimiser, a batch or experts that the ranks cannot
            share, or a checkpoint of other groups of experts.
    """
    deepspeed = _deepspeed()
    if config.optimizer != "adamw":
        raise ValueError(f"ZeRO needs optimizer=adamw, not {config.optimizer!r}")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if task.samples_per_step % world:
        raise ValueError(f"{task.samples_per_step} windows per step cannot be shared by {world} ranks")
    zero.check(world, model.config.num_experts)
    latest = directory / _LATEST
    tag = latest.read_text().strip() if latest.is_file() else None
    if tag:
        refuse_other_groups(directory / tag, zero.expert)
    device = model.embedding.device
    join(device)
    rank = torch.distributed.get_rank()
    experts = ExpertGroups(model, zero.expert) if zero.expert > 1 else None
    module = _Loss(model, task, experts)
    if zero.stage == 3:
        # Used by the LM head, outside of the module that owns it.
        deepspeed.zero.register_external_parameter(module, model.embedding)
    (optimizer,) = make_optimizers(model, "adamw", config.learning_rate, config.weight_decay)
    if experts:
        experts.split(optimizer)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=_settings(task.samples_per_step, world, config, zero)
    )
    directory.mkdir(parents=True, exist_ok=True)
    found, client = engine.load_checkpoint(str(directory), tag=tag) if tag else (None, {})
    if experts and tag:
        experts.load(directory / tag)
    step, before = (client["step"], client["seconds"]) if found and client else (0, 0.0)
    groups: list[dict[str, Any]] = engine.optimizer.param_groups  # type: ignore[union-attr]
    log = LossLog(directory / "metrics.jsonl", step) if rank == 0 else None
    line = ProgressLine(config.steps, step) if progress and rank == 0 else None
    clips = _clips(zero)
    started = saved = time.monotonic()
    while step < config.steps:
        rate = config.learning_rate * cosine_rate(step, config.steps, config.warmup_steps, config.final_rate)
        for group in groups:
            group["lr"] = rate
        loss, values = engine(step, (rank, world))
        engine.backward(loss)
        if clips:
            values["gradient_norm"] = clip_gradients(model, config.clip_norm, experts and experts.group)
        engine.step()
        if not clips and (norm := engine.get_global_grad_norm()) is not None:
            values["gradient_norm"] = norm
        step += 1
        if step % config.log_every == 0 or step == config.steps:
            numbers = _mean_over_ranks({"loss": loss.detach(), **values}, world)
            if log:
                log.add({"step": step, **numbers})
            if line:
                line.update(step, numbers)
        stop, save = _agree(config, started, saved, step, device)
        if save:
            state = {"step": step, "seconds": before + time.monotonic() - started}
            tag = f"step-{step:08d}"
            if experts:
                experts.save(directory / tag)
            engine.save_checkpoint(str(directory), tag=tag, client_state=state)
            _drop_older(directory, step, rank)
            saved = time.monotonic()
        if stop:
            break
    for closable in (log, line):
        if closable:
            closable.close()
    seconds = before + time.monotonic() - started
    return TrainResult(step=step, finished=step == config.steps, evaluation={}, seconds=seconds)


def _deepspeed() -> Any:
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError("training with ZeRO needs the package deepspeed (pip install deepspeed)") from error
    return deepspeed


def _clips(zero: ZeroConfig) -> bool:
    """Whether gradients are clipped here and not by the engine."""
    return zero.stage == 0 and not zero.bf16


def _settings(samples: int, world: int, config: TrainerConfig, zero: ZeroConfig) -> dict[str, Any]:
    return {
        "train_batch_size": samples,
        "train_micro_batch_size_per_gpu": samples // world,
        "gradient_clipping": 0.0 if _clips(zero) else config.clip_norm,
        "zero_optimization": {"stage": zero.stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": zero.bf16},
        "steps_per_print": 2**31,
    }


def _mean_over_ranks(values: dict[str, Any], world: int) -> dict[str, float]:
    row = torch.tensor([float(v) for v in values.values()], dtype=torch.float64)
    torch.distributed.all_reduce(row)
    return dict(zip(values, (row / world).tolist(), strict=True))


def _drop_older(directory: Path, step: int, rank: int) -> None:
    """Remove checkpoints before a step's, once every rank has written its part of that."""
    torch.distributed.barrier()
    if rank == 0:
        for old in directory.glob("step-*"):
            if old.name != f"step-{step:08d}":
                shutil.rmtree(old)


def _agree(config: TrainerConfig, started: float, saved: float, step: int, device: torch.device) -> tuple[bool, bool]:
    """Whether to stop and whether to save: rank 0's clock decides, so that all ranks agree."""
    now = time.monotonic()
    flags = torch.tensor(due(config, step, now - started, now - saved), dtype=torch.int32, device=device)
    torch.distributed.broadcast(flags, 0)
    return bool(flags[0]), bool(flags[1])
