"""A recipe from nothing to a model with exits: text, vocabulary, training, export, exits, report.

Every stage writes its result to disk and is skipped when that exists, so that a recipe can be interrupted and resumed.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from ...exits.training.exit_heads import make_exits
from ...exits.training.heads import ExitStates
from ...exits.training.trainer import TrainResult, changed_settings, train
from ..convert.load_model import load_model
from ..convert.model_store import cache_home
from ..engine.config import EngineConfig
from ..engine.offline import OfflineEngine
from ..text.corpus import Corpus, build_corpus, load_corpus
from .exit_states import collect_states, trained_backbone
from .expert_scales import ExpertsConfig, make_expert_scales
from .export import export_checkpoint
from .held_out import PROMPTS_FILE, held_out_prompts, write_prompts
from .language_model import LanguageModelTask
from .model import TrainableDecoder
from .recipe_config import DTYPES, RecipeConfig
from .served import blocks_from, continuations

_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1

Learn = Callable[[TrainableDecoder, LanguageModelTask, Path, bool], tuple[TrainResult, TrainableDecoder]]


def run_recipe(
    config: RecipeConfig,
    output: Path,
    *,
    learn: Learn | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> TrainResult:
    """Run a recipe, or resume it.

    Arguments:
        output: directory of the run: ``training/`` (checkpoints, losses), ``model/`` (the export with its exits),
            ``report.json``.
        learn: trains a model on a task, in a directory, with a progress line or without; None: in this process.
        progress: show a progress line.

    Returns: the state of training; ``finished``: whether the model has been exported.

    Raises:
        ValueError: for text that cannot be had, a run that cannot fit, or settings that differ from the run's own.
    """
    keep_freed_memory()
    corpus = load_corpus(build_corpus(config.corpus, cache_home() / "corpora", say=say))
    model, task = build_task(config, corpus)
    claim(output, {k: v for k, v in asdict(config).items() if k not in ("trainer", "heads")})
    if learn is None:
        result = train(model, task, config.trainer, output / "training", progress=progress)
    else:
        result, model = learn(model, task, output / "training", progress)
    if not result.finished:
        say(f"step {result.step} of {config.trainer.steps}; the same command goes on from here")
        return result
    target = output / "model"
    export_checkpoint(model, corpus.tokenizer_file, target)
    report: dict[str, Any] = {
        "config": asdict(config),
        "seconds": result.seconds,
        "threads": torch.get_num_threads(),
        "layers_share_of_flops": config.decoder.layers_share,
        "evaluation": result.evaluation,
        "known_streams": corpus.known,
    }
    if config.decoder.exit_layers and config.exits.loss_weight > 0:
        as_exported(model)
        states = exit_states(model, corpus, target, config)
        heads, table = make_exits(
            trained_backbone(model),
            states,
            target,
            config.heads,
            stream=corpus.train,
            plot=plot_path(output),
            progress=progress,
        )
        report["exits"] = heads.metrics
        prompts = held_out_prompts(corpus, config, config.shipped_prompts, config.prompt_tokens, strict=False)
        write_prompts(prompts, Tokenizer.from_file(str(corpus.tokenizer_file)), target / PROMPTS_FILE)
        window = min(ExpertsConfig.window_tokens, config.decoder.max_position)
        make_expert_scales(ExpertsConfig(model=str(target), window_tokens=window), progress=progress, say=say)
        say(table)
        say(f"at 2 % disagreement: {heads.metrics['at_2_percent_disagreement']}")
    (output / "report.json").write_text(json.dumps(report, indent=1))
    size = sum(f.stat().st_size for f in target.iterdir())
    say(f"{target}: {size / 1e6:.1f} MB, perplexity {result.evaluation.get('perplexity', float('nan')):.2f}")
    return result


def build_task(config: RecipeConfig, corpus: Corpus) -> tuple[TrainableDecoder, LanguageModelTask]:
    """The untrained model of a recipe, and its task."""
    model = TrainableDecoder(config.decoder, dtype=DTYPES[config.dtype], seed=config.seed).to(config.device)
    if config.text.grow_from:
        model.zero_outputs(config.text.grow_from)
    task = LanguageModelTask(config.text, config.exits, corpus.train, corpus.held_out, config.trainer.steps)
    return model, task


def exit_states(model: TrainableDecoder, corpus: Corpus, checkpoint: Path, config: RecipeConfig) -> ExitStates:
    """Hidden states for training the exits: held-out text as it is, and the model's continuations of its beginnings."""
    length = config.prompt_tokens + config.new_tokens
    # One draw of disjoint blocks for both, so that no text is on two sides of a split.
    wanted = config.served_prompts + config.exit_rows // length
    blocks = blocks_from(corpus.held_out, wanted, length, config.seed)
    prompts = [block[: config.prompt_tokens] for block in blocks[: config.served_prompts]]
    engine = OfflineEngine(load_model(checkpoint, progress=False), EngineConfig(max_num_seqs=32))
    served_NL = continuations(engine, prompts, config.new_tokens, config.seed)

    def sequences() -> Iterator[tuple[int, torch.Tensor, int]]:
        group = 0
        for row_L in served_NL:
            yield group, row_L[None, :-1], config.prompt_tokens - 1
            group += 1
        for block in blocks[config.served_prompts :]:
            yield group, torch.tensor(block)[None], 0
            group += 1

    return collect_states(model, sequences())


@torch.no_grad()
def as_exported(model: TrainableDecoder, dtype: torch.dtype = torch.bfloat16) -> None:
    """Round a model's weights to what its export holds; exits must learn from the model that will be served."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def keep_freed_memory() -> None:
    """Make glibc's allocator reuse large blocks: returning them means a page fault for every 4 KiB of every step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def claim(output: Path, settings: dict[str, Any]) -> None:
    """Make a run's directory, or check that it holds a run with the same settings.

    Arguments:
        settings: JSON-able, without those that may change when a run is resumed.

    Raises:
        ValueError: when it holds a run of another recipe, naming the keys that differ.
    """
    output.mkdir(parents=True, exist_ok=True)
    changed = changed_settings(output / "recipe.json", json.loads(json.dumps(settings)))
    if changed:
        changes = "; ".join(f"{key}: {old} → {new}" for key, (old, new) in changed.items())
        raise ValueError(f"{output} holds a run of another recipe ({changes}); take another output directory")


def plot_path(output: Path) -> Path | None:
    """Where a run's plot goes; None without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return None
    return output / "risk-coverage.svg"
