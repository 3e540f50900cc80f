"""What no family may pass over: keys and tensors that it does not know, lacks, or that have another shape or type."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import test_families_parity_attention as attention
import test_families_parity_nemotron as nemotron
import test_families_parity_norms as norms
import test_families_parity_shared as shared
import torch
from conftest import COMMON
from dynamoe.dynamic.checkpoint.weights import CheckpointError
from dynamoe.dynamic.model.families import FAMILIES, family_of, model_spec
from dynamoe.dynamic.model.model_files import open_files
from safetensors.torch import load_file, save_file
from test_file_fuzz import check

ALL = {v.family: v for v in (*shared.VARIANTS, *norms.FIRST, *attention.VARIANTS, *nemotron.VARIANTS)}


@pytest.fixture(params=ALL.values(), ids=ALL)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return request.param.save(tmp_path / "model")


def change_config(path: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def test_every_tensor_is_needed_and_no_other_is(checkpoint: Path) -> None:
    """Each one missing, each one of another shape, and one more beside it."""
    open_files(checkpoint)
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    names = [name for name in weights if ".layers.0." in name or ".layers.1." in name or ".layers." not in name]
    for name in names:
        for wrong in (
            {other: weight for other, weight in weights.items() if other != name},
            {**weights, name: torch.ones(*weights[name].shape[:-1], weights[name].shape[-1] + 1)},
        ):
            save_file(wrong, file)
            # What is missing, and a part of a fused tensor, is called by its usual name.
            with pytest.raises(CheckpointError, match=f"{re.escape(name)}|lacks the tensor|config.json implies"):
                open_files(checkpoint)
    for extra in ("model.layers.1.made_up.weight", "model.layers.1.self_attn.made_up", "made_up"):
        save_file({**weights, extra: torch.ones(3)}, file)
        with pytest.raises(CheckpointError, match=re.escape(extra)):
            open_files(checkpoint)


def test_unknown_keys_layer_types_and_rotations_are_refused(checkpoint: Path) -> None:
    before = (checkpoint / "config.json").read_text()
    family = family_of(json.loads(before))
    layers, ignored = family.settings(json.loads(before))["num_hidden_layers"], family.ignored
    for key, value in (
        ("made_up", 1),
        ("layer_types", ["made_up"] * layers),
        ("rope_parameters", {"rope_type": "made_up", "rope_theta": 1e4}),
        ("hidden_act", "made_up"),
        ("hidden_activation", "made_up"),
    ):
        if key in ignored:
            continue
        change_config(checkpoint, lambda config, key=key, value=value: config.update({key: value}))
        with pytest.raises(CheckpointError, match=rf"{key}|made_up"):
            open_files(checkpoint)
        (checkpoint / "config.json").write_text(before)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_damaged_configurations(checkpoint: Path) -> None:
    check(60, [checkpoint / "config.json"])


def test_some_damage_of_each_kind(tmp_path: Path) -> None:
    check(2, [variant.save(tmp_path / name) / "config.json" for name, variant in ALL.items()])


def test_every_other_language_model_of_transformers_is_refused_by_name() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    others = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in FAMILIES]
    assert {"bailing_hybrid", "deepseek_v4", "jetmoe", "longcat_flash", "minimax"} <= set(others)
    for name in others:
        with pytest.raises(CheckpointError, match=f"model_type '{re.escape(name)}' is not supported; supported: llama"):
            model_spec({**COMMON, "model_type": name, "num_local_experts": 4, "num_experts_per_tok": 2})
