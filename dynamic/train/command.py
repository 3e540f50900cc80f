"""``dynamoe train``: run a recipe; on several processes that a launcher started all train, rank 0 does the rest."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist

from ...exits.training.trainer import TrainResult, evaluate
from ...kernels.api.ranges import check_ranges
from ..convert.model_store import cache_home
from ..model.machine import use_threads
from ..parallel.config import launched_rank, launched_size
from ..text.corpus import build_corpus, load_corpus
from .deepspeed import ZeroConfig, gathered, join, leave, train_with_deepspeed
from .language_model import LanguageModelTask
from .model import TrainableDecoder
from .recipe import build_task, run_recipe
from .recipe_config import RecipeConfig


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

    def __post_init__(self) -> None:
        check_ranges(self, "threads", least=1)
        check_ranges(self, "max_minutes", above=0)
        if self.max_minutes is not None:
            trainer = replace(self.recipe.trainer, max_minutes=self.max_minutes)
            object.__setattr__(self, "recipe", replace(self.recipe, trainer=trainer))


def train(config: TrainConfig) -> None:
    """Train a model by a recipe, export it, and train its exits.

    Raises:
        ValueError: see :func:`.recipe.run_recipe` and :func:`.deepspeed.train_with_deepspeed`.
    """
    use_threads(config.threads)
    recipe, output = config.recipe, Path(config.output).expanduser()
    config.zero.check(launched_size(), recipe.decoder.num_experts)
    if launched_size() > 1:
        run_recipe_together(recipe, output, config.zero)
    else:
        run_recipe(recipe, output)


def run_recipe_together(config: RecipeConfig, output: Path, zero: ZeroConfig) -> None:
    """As :func:`.recipe.run_recipe`, the training itself under DeepSpeed."""
    rank = launched_rank()

    def learn(
        model: TrainableDecoder, task: LanguageModelTask, directory: Path, progress: bool
    ) -> tuple[TrainResult, TrainableDecoder]:
        if rank == 0:
            dist.barrier()  # the others wait until the text is there and the directory is known to be this run's
        result = train_with_deepspeed(model, task, config.trainer, directory, zero, progress=progress)
        whole = gathered(model, zero)
        leave(model)
        if rank == 0:  # which from here on runs alone: the launcher's variables are removed
            for name in ("RANK", "WORLD_SIZE"):
                os.environ.pop(name, None)
            if result.finished:
                result = replace(result, evaluation=evaluate(whole, task))
        return result, whole

    join(torch.device(config.device))
    if rank == 0:
        run_recipe(config, output, learn=learn)
    else:
        dist.barrier()
        corpus = load_corpus(build_corpus(config.corpus, cache_home() / "corpora"))
        learn(*build_task(config, corpus), output / "training", False)
