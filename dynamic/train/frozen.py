"""``dynamoe exits``: early exits for a frozen model; its weights do not change.

Stages write their results to the run's directory and are skipped when these exist: the hidden states of the text, the
adapter of each exit. Probes and calibration are quick and always run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from safetensors.torch import load_file

from ...exits.segments import split_into_segments
from ...exits.sidecar import JSON_FILE, TENSOR_FILE, backbone_hash
from ...exits.training.exit_heads import Backbone, ExitHeadsConfig, exit_splits, make_exits
from ...exits.training.heads import ExitStates, HeadTraining, fit_adapter
from ...exits.training.memory import available_memory
from ...exits.training.progress import progress_line
from ...kernels.api.ranges import check_ranges
from ..checkpoint.directory import write_tensors
from ..convert.load_model import load_model
from ..convert.model_store import cache_home, resolve_model
from ..engine.config import EngineConfig
from ..engine.offline import OfflineEngine
from ..model.machine import use_threads
from ..text.calibration_text import reference_pages
from ..text.documentation_packages import SOURCES, collect, collect_folder
from .exit_states import (
    collect_served_states,
    default_exit_layers,
    load_states,
    needed_memory,
    refuse_if_too_many,
    save_states,
    served_backbone,
)
from .recipe import claim, keep_freed_memory, plot_path
from .served import blocks_from, continuations

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

TEXTS = ("python", "debian")
_STEP_ROWS = 1024  # rows that run through the model at once


@dataclass(frozen=True, kw_only=True)
class FrozenConfig:
    """``dynamoe exits``.

    Arguments:
        model: a local directory, a Hub id, or the name of a shipped model: ``default``.
        output: directory of the run; the same command resumes an interrupted run. ``model/`` in it has links to the
            checkpoint's files, and the exits.
        exit_layers: layers in front of each exit; nothing puts exits at 1/2, 2/3, 4/5 and 14/15 of the depth.
        adapter_rank: rank of the exit-head adapters.
        text: ``python`` (the language reference that every Python has) or ``debian`` (that, and documentation packages
            fetched with apt).
        text_folder: a folder of .txt and .html files instead.
        served_prompts: prompts that the model continues, for the exits to learn from.
        prompt_tokens, new_tokens: length of these prompts and continuations.
        exit_rows: positions of text that the exits learn from, beside the served ones.
        dtype: that the model runs in: ``float32``, ``bfloat16``, ``float16``, or ``auto`` (the checkpoint's own).
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        backend: which kernels compute; ``auto`` takes the fastest that run here.
        seed: of the choice of text, the continuations and the adapters.
        threads: CPU threads; null leaves torch's own choice.

    Raises:
        ValueError: naming the key and the value that is out of range.
    """

    FREE_TEXT: ClassVar[frozenset[str]] = frozenset({"output", "text_folder"})

    model: str = "default"
    output: str = "runs/exits"
    exit_layers: tuple[int, ...] = ()
    adapter_rank: int = 16
    text: str = "python"
    text_folder: str | None = None
    served_prompts: int = 128
    prompt_tokens: int = 64
    new_tokens: int = 64
    exit_rows: int = 32_768
    dtype: str = "float32"
    device: str = "auto"
    backend: str = "auto"
    seed: int = 0
    threads: int | None = None
    heads: ExitHeadsConfig = field(
        default_factory=lambda: ExitHeadsConfig(training=HeadTraining(steps=400, batch_rows=256))
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "exit_layers", tuple(self.exit_layers))
        if self.text not in TEXTS:
            raise ValueError(f"text must be one of {', '.join(TEXTS)}, not {self.text!r}")
        counts = (
            "served_prompts",
            "prompt_tokens",
            "new_tokens",
            "exit_rows",
            "adapter_rank",
            "exit_layers",
            "threads",
        )
        check_ranges(self, *counts, least=1)
        check_ranges(self, "seed", least=0, below=2**63)


def make_frozen_exits(config: FrozenConfig, *, progress: bool = True, say: Callable[[str], None] = print) -> Path:
    """Train the exits of a model, or resume a run.

    Arguments:
        progress: show bars and progress lines.

    Returns: the directory of a checkpoint with exits: links to the model's own files, and the sidecar.

    Raises:
        ValueError: for exits outside the model, text that cannot be had or is too short, too little memory, or a
            directory that holds another run.
    """
    use_threads(config.threads)
    keep_freed_memory()
    output = Path(config.output).expanduser()
    source = resolve_model(config.model, progress=progress)
    target = output / "model"
    if output.resolve() == source.resolve() or target.resolve() == source.resolve():
        raise ValueError(f"output={config.output} is the model's own directory; take another")
    model = load_model(source, dtype=config.dtype, device=config.device, backend=config.backend, progress=progress)
    llm = OfflineEngine(model, EngineConfig(max_num_seqs=32))
    spec = llm.model.spec
    layers = config.exit_layers or default_exit_layers(spec.num_layers)
    layers = tuple(segment.layers.stop for segment in split_into_segments(spec.num_layers, layers)[:-1])
    config = replace(config, exit_layers=layers)
    length = config.prompt_tokens + config.new_tokens
    if length > llm.engine.max_model_len:
        raise ValueError(f"prompt_tokens + new_tokens = {length} exceed the model's {llm.engine.max_model_len} tokens")
    training = config.heads.training
    rows = config.served_prompts * config.new_tokens + config.exit_rows
    refuse_if_too_many(needed_memory(spec, rows, len(layers), training), available_memory(torch.device("cpu")))
    settings = {k: v for k, v in asdict(config).items() if k not in ("output", "threads")}
    claim(output, {**settings, "backbone_sha256": backbone_hash(source)})
    link_checkpoint(source, target)
    blocks = text_blocks(config, llm.model.tokenizer, say)
    states = _states(config, llm, blocks, output / "states.safetensors", progress)
    backbone = served_backbone(llm.model.decoder, layers, config.adapter_rank, config.seed)
    del llm  # its cache is not needed any more
    _fit_adapters(backbone, exit_splits(states, config.heads)[0], training, output, progress)
    heads, table = make_exits(
        backbone,
        states,
        target,
        replace(config.heads, refit_adapters=False),
        stream=torch.tensor(blocks).flatten(),
        plot=plot_path(output),
        progress=progress,
    )
    (output / "report.json").write_text(json.dumps({"config": settings, "exits": heads.metrics}, indent=1))
    say(table)
    say(f"at 2 % disagreement: {heads.metrics['at_2_percent_disagreement']}")
    say(f"{target} serves with exits after {', '.join(map(str, layers))} of {spec.num_layers} layers")
    return target


def link_checkpoint(source: Path, target: Path) -> None:
    """Links to a checkpoint's weights and copies of its small files; exits that it already has are left out."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        link = target / file.name
        if not file.is_file() or file.name in (JSON_FILE, TENSOR_FILE) or link.exists():
            continue
        if file.suffix == ".safetensors":
            link.unlink(missing_ok=True)  # a link whose target has gone
            link.symlink_to(file.resolve())
        else:
            shutil.copyfile(file, link)


def text_blocks(config: FrozenConfig, tokenizer: Tokenizer, say: Callable[[str], None]) -> list[list[int]]:
    """Disjoint blocks of text as long as a prompt and its continuation; the first ones begin with the prompts.

    Raises:
        ValueError: when there is no text, or too little of it.
    """
    documents = _documents(config)
    streams = {
        name: torch.tensor([i for ids in tokenizer.encode_batch(texts, add_special_tokens=False) for i in ids])
        for name, texts in documents.items()
    }
    length = config.prompt_tokens + config.new_tokens
    wanted = config.served_prompts + max(1, config.exit_rows // length)
    blocks = blocks_from(streams, wanted, length, config.seed)
    if len(blocks) < wanted:
        raise ValueError(
            f"{wanted} pieces of {length} tokens are wanted, the text has {len(blocks)}; take fewer exit_rows or"
            " served_prompts, text=debian, or a text_folder with more text"
        )
    say(f"text: {', '.join(f'{name} ({stream.numel()} tokens)' for name, stream in streams.items())}")
    return blocks


def _documents(config: FrozenConfig) -> dict[str, list[str]]:
    if config.text_folder is not None:
        return {part.name: list(part.documents) for part in collect_folder(Path(config.text_folder).expanduser())}
    # The other pages are left for measurements.
    documents = {"python": reference_pages(held_out=False)}
    if config.text == "debian":
        cache = cache_home() / "corpora" / "packages"
        for source in SOURCES:
            if source.held_out:
                part = collect(source, cache)
                documents[part.name] = list(part.documents)
    return documents


def _states(
    config: FrozenConfig, llm: OfflineEngine, blocks: list[list[int]], file: Path, progress: bool
) -> ExitStates:
    if file.exists():
        return load_states(file)
    prompts = [block[: config.prompt_tokens] for block in blocks[: config.served_prompts]]
    served_NL = continuations(llm, prompts, config.new_tokens, config.seed, progress=progress)
    read_NL = torch.tensor(blocks[config.served_prompts :])

    def batches() -> Iterator[tuple[list[int], torch.Tensor, int]]:
        group = 0
        for tokens_NL, first in ((served_NL[:, :-1], config.prompt_tokens - 1), (read_NL, 0)):
            for part_NL in tokens_NL.split(max(1, _STEP_ROWS // tokens_NL.shape[1])):
                yield list(range(group, group + len(part_NL))), part_NL, first
                group += len(part_NL)

    rows = served_NL.shape[0] * config.new_tokens + read_NL.numel()
    with progress_line(rows, "states", progress) as watch:
        states = collect_served_states(llm.model.decoder, batches(), config.exit_layers, rows, watch)
    save_states(states, file)
    return states


def _fit_adapters(backbone: Backbone, fit: ExitStates, training: HeadTraining, output: Path, progress: bool) -> None:
    steps = training.steps * len(backbone.adapters)
    with progress_line(steps, "adapters", progress) as watch:
        for number, (layer, adapter) in enumerate(backbone.adapters.items()):
            file = output / f"adapter-{layer}.safetensors"
            if file.exists():
                adapter.load_state_dict(load_file(file))
                continue
            before = number * training.steps
            fit_adapter(adapter, layer, fit, backbone.logits, training, lambda done, b=before: watch(b + done))
            write_tensors(file, {name: tensor.detach() for name, tensor in adapter.state_dict().items()})
