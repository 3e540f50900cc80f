"""Checkpoints of a training run: complete or absent, never half written.

A checkpoint is a directory ``step-00001234`` with the model's and the optimisers' tensors in safetensors and the rest
in JSON. It is written beside its final name, flushed to disk and renamed; older ones are removed afterwards.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...kernels.api.disk import flush

_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint below a run's directory."""
    found = sorted(p for p in directory.glob("step-*") if p.is_dir() and not p.name.endswith(".partial"))
    return found[-1] if found else None


def save_checkpoint(
    directory: Path,
    step: int,
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    state: dict[str, Any],
) -> Path:
    """Write the state after ``step`` steps, atomically, and drop older checkpoints.

    Arguments:
        state: what else a resumed run needs, as JSON values.

    Returns: the checkpoint's directory.
    """
    final = directory / f"step-{step:08d}"
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, partial / _MODEL)
    moments, groups = _flatten(optimizers)
    moments["torch_rng"] = torch.get_rng_state()
    save_file(moments, partial / _OPTIMIZER)
    (partial / _STATE).write_text(json.dumps({"step": step, "optimizers": groups, **state}))
    for path in (*partial.iterdir(), partial):
        flush(path)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    flush(directory)
    for old in directory.glob("step-*"):
        if old != final:
            shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(
    checkpoint: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Take a checkpoint's tensors into a model, its optimisers and torch's generator.

    Returns: the JSON state, with ``step``.

    Raises:
        ValueError: when the checkpoint is damaged, or belongs to another model or another set of optimisers.
    """
    try:
        weights, moments = load_file(checkpoint / _MODEL), load_file(checkpoint / _OPTIMIZER)
        state = json.loads((checkpoint / _STATE).read_text())
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{checkpoint} is damaged: {error}; remove it and start again") from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{checkpoint} does not fit this model: {error}") from error
    if len(state["optimizers"]) != len(optimizers):
        raise ValueError(f"{checkpoint} was written with {len(state['optimizers'])} optimisers, not {len(optimizers)}")
    torch.set_rng_state(moments.pop("torch_rng"))
    for number, (optimizer, groups) in enumerate(zip(optimizers, state["optimizers"], strict=True)):
        tensors: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in moments.items():
            owner, index, key = name.split(".", 2)
            if int(owner) == number:
                tensors.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": tensors, "param_groups": groups})
    return state


def _flatten(optimizers: list[torch.optim.Optimizer]) -> tuple[dict[str, torch.Tensor], list[Any]]:
    tensors, groups = {}, []
    for number, optimizer in enumerate(optimizers):
        packed = optimizer.state_dict()
        groups.append(packed["param_groups"])
        for index, entries in packed["state"].items():
            for key, value in entries.items():
                tensors[f"{number}.{index}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors, groups
