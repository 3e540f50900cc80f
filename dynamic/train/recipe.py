"""A recipe from nothing to a model with exits: text, vocabulary, training, export, exits, report.

Every stage leaves its result on disk and is skipped when it is there, so that a recipe can be run in pieces.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from ...exits.training.heads import ExitStates
from ...exits.training.objectives import ExitTraining
from ...exits.training.trainer import TrainerConfig, TrainResult, train
from ..convert.model_store import cache_home
from ..llm import LLM
from ..text.corpus import Corpus, CorpusConfig, build_corpus, load_corpus
from .exit_heads import ExitHeadsConfig, collect_states, make_exits, trained_backbone
from .expert_scales import ExpertsConfig, make_expert_scales
from .export import export_checkpoint
from .held_out import PROMPTS_FILE, held_out_prompts, write_prompts
from .language_model import LanguageModelConfig, LanguageModelTask
from .model import DecoderConfig, TrainableDecoder
from .served import blocks_from, continuations

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """Everything that a trained model depends on.

    Arguments:
        dtype: of activations while training: ``float32`` or ``bfloat16``. Weights and optimiser are float32. It is not
            chosen by the machine, so that a recipe means the same everywhere; many CPUs are slower in bfloat16.
        device: torch device.
        served_prompts: held-out prompts that the model continues, for the exits to learn from.
        prompt_tokens, new_tokens: length of these prompts and continuations.
        exit_rows: positions of held-out text that the exits learn from, beside the served ones.
        shipped_prompts: held-out prompts that are put beside the model, for ``dynamoe calibrate``.
        seed: of weights, text order and dropout.

    Raises:
        ValueError: for an unknown dtype, or parts that do not fit each other.
    """

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    text: LanguageModelConfig = field(default_factory=lambda: LanguageModelConfig(grow_from=8, grow_at=0.8))
    exits: ExitTraining = field(default_factory=lambda: ExitTraining(start=0.5, ramp=0.1, layer_dropout=0.05))
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(steps=2500, warmup_steps=200))
    heads: ExitHeadsConfig = field(default_factory=ExitHeadsConfig)
    dtype: str = "float32"
    device: str = "cpu"
    served_prompts: int = 256
    prompt_tokens: int = 64
    new_tokens: int = 128
    exit_rows: int = 65_536
    shipped_prompts: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.decoder.vocab_size != self.corpus.vocab_size:
            raise ValueError(
                f"decoder.vocab_size={self.decoder.vocab_size} and corpus.vocab_size={self.corpus.vocab_size} differ"
            )
        if self.text.window > self.decoder.max_position:
            raise ValueError(f"text.window={self.text.window} exceeds decoder.max_position={self.decoder.max_position}")


Learn = Callable[[TrainableDecoder, LanguageModelTask, Path, bool], tuple[TrainResult, TrainableDecoder]]


def run_recipe(
    config: RecipeConfig,
    output: Path,
    *,
    learn: Learn | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> TrainResult:
    """Run a recipe, or the next piece of it.

    Arguments:
        output: directory of the run: ``training/`` (checkpoints, losses), ``model/`` (the export with its exits),
            ``report.json``.
        learn: trains a model on a task, in a directory, with a progress line or without; None: in this process.
        progress: show a progress line.

    Returns: where training stands; ``finished`` says whether the model has been exported.

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
        model.silence(config.text.grow_from)
    task = LanguageModelTask(config.text, config.exits, corpus.train, corpus.held_out, config.trainer.steps)
    return model, task


def exit_states(model: TrainableDecoder, corpus: Corpus, checkpoint: Path, config: RecipeConfig) -> ExitStates:
    """Hidden states for training the exits: held-out text as it is, and what the model writes after its beginnings."""
    length = config.prompt_tokens + config.new_tokens
    # One draw of disjoint blocks for both, so that no text is on two sides of a split.
    wanted = config.served_prompts + config.exit_rows // length
    blocks = blocks_from(corpus.held_out, wanted, length, config.seed)
    prompts = [block[: config.prompt_tokens] for block in blocks[: config.served_prompts]]
    served_NL = continuations(LLM(checkpoint, progress=False, max_num_seqs=32), prompts, config.new_tokens, config.seed)

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
    """Tell glibc's allocator to reuse large blocks: returning them means a page fault for every 4 KiB of every step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def claim(output: Path, settings: dict[str, Any]) -> None:
    """A directory belongs to one run.

    Arguments:
        settings: JSON-able; what may change between the pieces of a run is not among them.

    Raises:
        ValueError: when it holds a run of another recipe, naming the keys that differ.
    """
    output.mkdir(parents=True, exist_ok=True)
    wanted = json.loads(json.dumps(settings))
    file = output / "recipe.json"
    if not file.exists():
        file.write_text(json.dumps(wanted, indent=1))
        return
    found = json.loads(file.read_text())
    different = [key for key in wanted if found.get(key) != wanted[key]]
    if different:
        changes = "; ".join(f"{key}: {found.get(key)} → {wanted[key]}" for key in different)
        raise ValueError(f"{output} holds a run of another recipe ({changes}); take another output directory")


def plot_path(output: Path) -> Path | None:
    """Where a run's plot goes; None without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return None
    return output / "risk-coverage.svg"
