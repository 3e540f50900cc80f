"""``dynamoe train``: run a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch

from ..parallel.config import launched_size
from .deepspeed import ZeroConfig
from .recipe import run_recipe
from .recipe_config import RecipeConfig
from .together import run_recipe_together


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """``dynamoe train``.

    Arguments:
        output: directory of the run; the same command resumes an interrupted run.
        max_minutes: stop after about this long, with a checkpoint to resume from; null takes
            ``recipe.trainer.max_minutes``, which is null as well unless set: run to the end.
        threads: CPU threads; null leaves torch's own choice.
        zero: how DeepSpeed divides the run where a launcher started several processes.
    """

    FREE_TEXT: ClassVar[frozenset[str]] = frozenset({"output"})

    output: str = "runs/tiny"
    max_minutes: float | None = None
    threads: int | None = None
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)


def train(config: TrainConfig) -> None:
    """Train a model by a recipe, export it, and train its exits.

    Raises:
        ValueError: see :func:`.recipe.run_recipe` and :func:`.deepspeed.train_with_deepspeed`.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    recipe, output = config.recipe, Path(config.output).expanduser()
    if config.max_minutes is not None:
        recipe = replace(recipe, trainer=replace(recipe.trainer, max_minutes=config.max_minutes))
    config.zero.check(launched_size(), recipe.decoder.num_experts)
    if launched_size() > 1:
        run_recipe_together(recipe, output, config.zero)
    else:
        run_recipe(recipe, output)
