"""A recipe on several processes that a launcher started: all of them train, rank 0 does the rest."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from ...exits.training.trainer import TrainResult
from ..convert.model_store import cache_home
from ..parallel.config import launched_rank
from ..text.corpus import build_corpus, load_corpus
from .deepspeed import ZeroConfig, gathered, join, leave, train_with_deepspeed
from .language_model import LanguageModelTask
from .model import TrainableDecoder
from .recipe import build_task, run_recipe
from .recipe_config import RecipeConfig


def run_recipe_together(config: RecipeConfig, output: Path, zero: ZeroConfig) -> None:
    """As :func:`.recipe.run_recipe`, the training itself under DeepSpeed.

    Arguments:
        zero: how DeepSpeed divides it.

    Raises:
        ValueError: see :func:`.recipe.run_recipe` and :func:`.deepspeed.train_with_deepspeed`.
    """
    join(torch.device(config.device))
    if launched_rank() == 0:

        def learn(
            model: TrainableDecoder, task: LanguageModelTask, directory: Path, progress: bool
        ) -> tuple[TrainResult, TrainableDecoder]:
            dist.barrier()
            return _evaluated(_train(config, model, task, directory, zero, progress), task)

        run_recipe(config, output, learn=learn)
        return
    dist.barrier()  # until the text is there and the directory is known to be this run's
    corpus = load_corpus(build_corpus(config.corpus, cache_home() / "corpora"))
    _train(config, *build_task(config, corpus), output / "training", zero, progress=False)


def _train(
    config: RecipeConfig,
    model: TrainableDecoder,
    task: LanguageModelTask,
    directory: Path,
    zero: ZeroConfig,
    progress: bool,
) -> tuple[TrainResult, TrainableDecoder]:
    """On every rank; on rank 0 the model comes back whole."""
    result = train_with_deepspeed(model, task, config.trainer, directory, zero, progress=progress)
    whole = gathered(model, zero)
    leave(model)
    return result, whole


def _evaluated(
    trained: tuple[TrainResult, TrainableDecoder], task: LanguageModelTask
) -> tuple[TrainResult, TrainableDecoder]:
    """Evaluate on rank 0, which from here on runs alone: the launcher's variables are removed."""
    result, model = trained
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    if result.finished:
        model.eval()
        with torch.no_grad():
            result = replace(result, evaluation=task.evaluate(model))
    return result, model
