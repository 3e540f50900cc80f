"""The training loop: resumable, and interruptions do not change the loss curve.

A task defines a step's loss, which must depend on the model and the step's number alone. So a checkpoint needs only the
tensors and the number.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ...kernels.api.ranges import check_ranges
from .checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from .memory import available_memory, estimate_memory, refuse_if_too_large
from .optimizers import cosine_rate, make_optimizers
from .progress import LossLog, ProgressLine, tensorboard_writer


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How a run is optimised, logged and interrupted.

    Arguments:
        steps: optimiser steps of the whole run.
        learning_rate: peak of the cosine schedule.
        warmup_steps: steps of its linear rise.
        final_rate: its end, as a share of the peak.
        optimizer: ``muon`` or ``adamw``.
        weight_decay: decoupled, on matrices only.
        clip_norm: gradients are scaled down to this norm; 0 leaves them alone.
        seed: torch's global generator is set to it at the start.
        log_every: steps between records in ``metrics.jsonl``.
        evaluate_every: steps between evaluations; 0 evaluates at the end only.
        checkpoint_minutes: time between checkpoints; one more is written at the end.
        max_minutes: stop after this long with a checkpoint; the same call resumes it. None runs to the end.
        tensorboard: write TensorBoard events beside the checkpoints.

    Raises:
        ValueError: naming the field and the value that is out of range.
    """

    steps: int
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    final_rate: float = 0.05
    optimizer: str = "muon"
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0
    log_every: int = 10
    evaluate_every: int = 0
    checkpoint_minutes: float = 5.0
    max_minutes: float | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, "steps", "log_every", least=1)
        not_negative = ("warmup_steps", "evaluate_every", "clip_norm", "checkpoint_minutes", "weight_decay")
        check_ranges(self, *not_negative, least=0)
        check_ranges(self, "learning_rate", "max_minutes", above=0)
        check_ranges(self, "final_rate", least=0, most=1)
        check_ranges(self, "seed", least=0, below=2**63)


class Task(Protocol):
    """What is trained. Everything random must come from the step's number."""

    samples_per_step: int

    def loss(self, model: torch.nn.Module, step: int, *, samples: int | None = None) -> tuple[torch.Tensor, dict]:
        """The loss of a step, and named scalars (tensors or floats) to log.

        Arguments:
            samples: take only the first few of the step's samples (the memory estimate does).
        """
        ...

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        """Named numbers on held-out data."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Where a call of :func:`train` left the run."""

    step: int
    finished: bool
    evaluation: dict[str, float]
    seconds: float  # spent training, interruptions excluded


def check_memory(model: torch.nn.Module, task: Task, config: TrainerConfig) -> str:
    """Estimate the peak and refuse a run that cannot fit.

    Returns: the estimate as text.

    Raises:
        ValueError: when it exceeds the free memory.
    """
    moments = 2 if config.optimizer == "adamw" else 1
    # Later steps may need more than the first ones: longer sequences, exits that are trained.
    step = config.steps - 1
    estimate = estimate_memory(model, lambda: task.loss(model, step, samples=1)[0], task.samples_per_step, moments)
    refuse_if_too_large(estimate, available_memory(next(model.parameters()).device))
    return str(estimate)


def train(
    model: torch.nn.Module, task: Task, config: TrainerConfig, directory: Path, *, progress: bool = True
) -> TrainResult:
    """Train, from the latest checkpoint in ``directory`` if there is one.

    Arguments:
        model: holds the initial weights; afterwards the trained ones.
        directory: of this run; holds checkpoints, ``run.json`` and ``metrics.jsonl``.
        progress: write a progress line to standard error.

    Raises:
        ValueError: when the run cannot fit in memory, or ``directory`` belongs to a run with other settings.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _check_settings(directory, config)
    torch.manual_seed(config.seed)
    optimizers = make_optimizers(model, config.optimizer, config.learning_rate, config.weight_decay)
    step, seconds_before = 0, 0.0
    if checkpoint := latest_checkpoint(directory):
        state = load_checkpoint(checkpoint, model, optimizers)
        step, seconds_before = state["step"], state["seconds"]
    if step < config.steps:
        check_memory(model, task, config)
    started = saved = time.monotonic()
    evaluation: dict[str, float] = {}
    with ExitStack() as stack:
        log = stack.enter_context(closing(LossLog(directory / "metrics.jsonl", step)))
        line = stack.enter_context(closing(ProgressLine(config.steps, step))) if progress else None
        writer = stack.enter_context(closing(tensorboard_writer(directory))) if config.tensorboard else None
        while step < config.steps:
            values = optimizer_step(model, task, config, optimizers, step)
            step += 1
            if step % config.log_every == 0 or step == config.steps:
                numbers = {name: float(value) for name, value in values.items()}
                _record(log, writer, step, numbers)
                if line:
                    line.update(step, numbers)
            if config.evaluate_every and step % config.evaluate_every == 0 and step < config.steps:
                _record(log, writer, step, evaluate(model, task))
            now = time.monotonic()
            stop, save = due(config, step, now - started, now - saved)
            if save:
                save_checkpoint(directory, step, model, optimizers, {"seconds": seconds_before + now - started})
                saved = time.monotonic()
            if stop:
                break
        if step == config.steps:
            evaluation = evaluate(model, task)
            _record(log, writer, step, evaluation)
    seconds = seconds_before + time.monotonic() - started
    return TrainResult(step=step, finished=step == config.steps, evaluation=evaluation, seconds=seconds)


def due(config: TrainerConfig, step: int, running: float, unsaved: float) -> tuple[bool, bool]:
    """Whether to stop and whether to save after a step.

    Arguments:
        running, unsaved: seconds since the start and since the last checkpoint.
    """
    stop = config.max_minutes is not None and running >= 60 * config.max_minutes
    return stop, stop or step == config.steps or unsaved >= 60 * config.checkpoint_minutes


def optimizer_step(
    model: torch.nn.Module, task: Task, config: TrainerConfig, optimizers: list[torch.optim.Optimizer], step: int
) -> dict[str, float | torch.Tensor]:
    """Loss, gradients, clipping, update. Returns the named scalars of the step."""
    rate = config.learning_rate * cosine_rate(step, config.steps, config.warmup_steps, config.final_rate)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    model.train()
    loss, values = task.loss(model, step)
    loss.backward()
    parameters = [p for p in model.parameters() if p.grad is not None]
    limit = config.clip_norm or float("inf")
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit, error_if_nonfinite=True)
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **values, "gradient_norm": norm, "learning_rate": rate}


def evaluate(model: torch.nn.Module, task: Task) -> dict[str, float]:
    """The task's numbers on held-out data, without gradients."""
    model.eval()
    with torch.no_grad():
        return task.evaluate(model)


def _record(log: LossLog, writer: Any, step: int, numbers: dict[str, float]) -> None:
    log.add({"step": step, **numbers})
    if writer:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)


def _check_settings(directory: Path, config: TrainerConfig) -> None:
    """A resumed run must have the same settings, except those that do not affect the loss curve."""
    shown = replace(config, max_minutes=None, checkpoint_minutes=0.0, tensorboard=False, evaluate_every=0, log_every=1)
    changed = changed_settings(directory / "run.json", asdict(shown))
    if changed:
        changes = ", ".join(f"{name}={new} (was {old})" for name, (old, new) in changed.items())
        raise ValueError(f"{directory} holds a run with other settings: {changes}; take another directory")


def changed_settings(file: Path, settings: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Write a new run's settings to a file, or return those that differ from it: name → (old, new).

    Arguments:
        settings: JSON values.
    """
    if not file.exists():
        file.write_text(json.dumps(settings, indent=1))
        return {}
    found = json.loads(file.read_text())
    return {name: (found.get(name), new) for name, new in settings.items() if found.get(name) != new}
