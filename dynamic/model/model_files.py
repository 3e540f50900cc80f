"""A checkpoint's directory, read as far as its headers: what the model is, and where its tensors are."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.config_reader import ConfigReader
from ..checkpoint.quantized_checkpoint import open_checkpoint, split_config
from ..checkpoint.stored_layout import StoredLayout
from ..checkpoint.weights import Checkpoint, CheckpointError, read_json
from .families import family_of, model_spec, mtp_layer_specs
from .family import Family
from .layout import Layout, layers_in, plan_layout
from .mtp_layers import layers_found, mtp_names
from .spec import LayerSpec, ModelSpec
from .tensor_names import family_names
from .text_part import text_config, text_names

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """What a directory holds.

    Arguments:
        path: the directory.
        config: ``config.json`` of the text model, without the settings of its quantisation.
        stored: how the weights are quantised; None: they are not.
        mtp: the layers that predict further tokens, where they were asked for; see :attr:`.Layout.mtp`.
    """

    path: Path
    config: Mapping[str, Any]
    stored: StoredLayout | None
    spec: ModelSpec
    family: Family
    checkpoint: Checkpoint
    layout: Layout
    mtp: tuple[LayerSpec, ...] = ()


def open_files(path: Path, mtp: bool = False) -> ModelFiles:
    """Read ``config.json`` and the headers of all weights, and check each against the other. No weight is read.

    Arguments:
        path: a directory in Hugging Face layout.
        mtp: with the layers that predict further tokens, if there are any.

    Raises:
        CheckpointError: naming the file, key or tensor that is missing, wrong, not understood or left over.
    """
    if (adapter := path / "adapter_config.json").exists():
        raise CheckpointError(f"{adapter}: adapters are not supported, and ignoring it would give another model")
    whole = read_json(path / "config.json")
    config, stored = split_config(text_config(whole))
    family = family_of(config)
    config = family.settings(config)
    if config.get("auto_map"):
        logger.warning(
            "%s names code of its own (auto_map), which is never run: the model runs as transformers' %s",
            *(path / "config.json", config["model_type"]),
        )
    names = mtp_names(family_names(family, text_names(whole)), config, keep=mtp)
    checkpoint = open_checkpoint(path, stored, names, family.divide)
    # Before anything is made for each of the layers: there may be 2³¹ of them.
    reader, there = ConfigReader(config), layers_in(checkpoint)
    if (layers := reader.integer("num_hidden_layers")) and layers != there:
        raise reader.error("num_hidden_layers", layers, f"{there}, which is how many layers the files hold")
    spec = model_spec(config)
    further = mtp_layer_specs(config, layers_found(checkpoint)) if mtp else ()
    layout = plan_layout(spec, family, checkpoint, further)
    return ModelFiles(
        path=path,
        config=config,
        stored=stored,
        spec=spec,
        family=family,
        checkpoint=checkpoint,
        layout=layout,
        mtp=further,
    )
