"""A study of probes: exits of one model, made alike but for the kind of probe, each measured through the engine.

States and exit-head adapters are made once, by ``dynamoe exits``; every kind of probe learns on the same states.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from filelock import FileLock

from ...exits.sidecar import JSON_FILE
from ...exits.training.exit_heads import ExitHeadsConfig
from ...exits.training.heads import HeadTraining
from ..convert.model_store import resolve_model
from ..text.prompt_file import read_prompts
from ..text.tokenizer import Tokenizer
from ..train.frozen import FrozenConfig, make_frozen_exits
from ..train.held_out import PROMPTS_FILE
from .records import job_key
from .requests import draw
from .sweep_config import SweepConfig

_PROMPTS_PER_FILE = 40
_PREPARED = "linear"  # the kind that states and adapters are made with; any would do


def with_probes(config: SweepConfig) -> SweepConfig:
    """The same study on a copy of the model whose exits have probes of the wanted kind; made when it is not there.

    The exits learn from prompts beside the model that the study does not run on, or from the pages of Python's language
    reference that it does not run on, where the model has no prompts.

    Raises:
        ValueError: see :func:`make_frozen_exits`.
    """
    root = Path(config.output).expanduser().resolve() / "probes" / _exits_key(config)
    root.mkdir(parents=True, exist_ok=True)
    source = resolve_model(config.model, progress=False)
    kind = str(config.probes.kind)
    with FileLock(root / ".lock"):
        made = root / kind.replace(" + ", "-") / "model"
        if not (root / f"{made.parent.name}.done").exists():
            base = root / "base"
            if not (root / "base.done").exists():
                make_frozen_exits(_exits_config(config, source, base, _PREPARED), progress=False, say=lambda _: None)
                (root / "base.done").touch()
            made.parent.mkdir(exist_ok=True)
            for file in base.glob("*.safetensors"):
                shutil.copyfile(file, made.parent / file.name)
            make_frozen_exits(_exits_config(config, source, made.parent, kind), progress=False, say=lambda _: None)
            (root / f"{made.parent.name}.done").touch()
    return replace(config, model=str(made))


def _exits_config(config: SweepConfig, source: Path, output: Path, kind: str) -> FrozenConfig:
    study = config.probes
    layers: tuple[int, ...] = ()
    if (source / JSON_FILE).is_file():  # exits where the model has them
        layers = tuple(exit["after_layers"] for exit in json.loads((source / JSON_FILE).read_text())["exits"])
    return FrozenConfig(
        model=str(source),
        output=str(output),
        exit_layers=layers,
        text_folder=_text_folder(config, source, output.parent / "text"),
        served_prompts=study.served_prompts,
        exit_rows=study.exit_rows,
        prompt_tokens=32,
        new_tokens=32,
        dtype=config.dtype,
        device=config.device,
        backend=config.backend,
        seed=config.seed,
        threads=config.threads,
        heads=ExitHeadsConfig(probe=kind, training=HeadTraining(steps=study.steps, batch_rows=256)),
    )


def _text_folder(config: SweepConfig, source: Path, folder: Path) -> str | None:
    """The model's prompts without those that the study runs on, as text files; None for a model without prompts."""
    if not (source / PROMPTS_FILE).is_file():
        return None
    if not folder.is_dir():
        tokenizer = Tokenizer.from_directory(source)
        prompts = read_prompts(source / PROMPTS_FILE, tokenizer)
        rest = draw(prompts, len(prompts), config.seed, PROMPTS_FILE)[max(config.requests, config.texts) :]
        folder.mkdir()
        for first in range(0, len(rest), _PROMPTS_PER_FILE):
            texts = [tokenizer.decode(tokens) for tokens in rest[first : first + _PROMPTS_PER_FILE]]
            (folder / f"{first:05}.txt").write_text("\n\n".join(texts), encoding="utf-8")
    return str(folder)


def _exits_key(config: SweepConfig) -> str:
    """What states and adapters depend on; settings of the study that come later do not."""
    plain = asdict(config)
    kept = {name: plain[name] for name in ("model", "dtype", "device", "backend", "seed", "requests", "texts")}
    study = {name: value for name, value in plain["probes"].items() if name != "kind"}
    nothing = {"prompts": None, "text": None, "reference": {"model": None}, "quality": {"certificates": None}}
    nothing |= {"engine": {"logits_processors": (), "cache_policy": None}}
    return job_key({**nothing, **kept, "probes": study})
