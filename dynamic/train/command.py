"""``dynamoe train``: run a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch

from .recipe import RecipeConfig, run_recipe


@dataclass(kw_only=True)
class TrainConfig:
    """``dynamoe train``.

    Arguments:
        output: directory of the run; the same command goes on where it was interrupted.
        max_minutes: stop after about this long, with a checkpoint to go on from; null runs to the end.
        threads: CPU threads; null leaves torch's own choice.
    """

    FREE_TEXT: ClassVar[frozenset[str]] = frozenset({"output"})

    output: str = "runs/tiny"
    max_minutes: float | None = None
    threads: int | None = None
    recipe: RecipeConfig = field(default_factory=RecipeConfig)


def train(config: TrainConfig) -> None:
    """Train a model by a recipe, export it, give it exits.

    Raises:
        ValueError: see :func:`.recipe.run_recipe`.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    trainer = replace(config.recipe.trainer, max_minutes=config.max_minutes)
    run_recipe(replace(config.recipe, trainer=trainer), Path(config.output).expanduser())
