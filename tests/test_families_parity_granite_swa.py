"""granitemoe_swa against transformers: sinks, windows, and a base of the rotations for every layer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.checkpoint.weights import CheckpointError
from dynamoe.dynamic.model.loader import load_decoder
from family_parity import Variant, check_variant
from test_decoder import PagedSequences, error, random_prompts

SIZES = {
    **{"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 40, "num_hidden_layers": 5},
    **{"embedding_multiplier": 3.0, "attention_multiplier": 0.35, "residual_multiplier": 0.6, "logits_scaling": 1.7},
}


def prepare(model: torch.nn.Module) -> None:
    """Sinks that take a good part of the attention."""
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter += 1.0


def variant(**config: Any) -> Variant:
    return Variant(family="granitemoe_swa", config={**SIZES, "sliding_window": 9, **config}, prepare=prepare)


THETAS = [10000.0, 0, 500.0, 0.0, 10000.0]
FIRST = variant(shared_intermediate_size=72, layer_rope_theta=THETAS)
MORE = [
    variant(attention_bias=True, tie_word_embeddings=True, num_key_value_heads=1),
    variant(shared_intermediate_size=24, layer_types=["sliding_attention", "full_attention"] * 2 + ["full_attention"]),
]


@pytest.mark.parametrize("variant", [FIRST, *(pytest.param(v, marks=pytest.mark.slow) for v in MORE)], ids=str)
def test_logits_and_tokens_equal_transformers(
    variant: Variant, tmp_path: Path, reference_model: Callable[[Path], Any]
) -> None:
    check_variant(variant, tmp_path, reference_model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FIRST.save(tmp_path_factory.mktemp("granite"))


def edited(saved: Path, folder: Path, **keys: Any) -> Path:
    shutil.copytree(saved, folder / "edited")
    config = json.loads((saved / "config.json").read_text())
    (folder / "edited" / "config.json").write_text(json.dumps({**config, **keys}))
    return folder / "edited"


@pytest.mark.parametrize(
    "change",
    [
        {"layer_rope_theta": [10000.0] * 5},
        {"layer_rope_theta": [10000.0, 0, 10000.0, 0, 10000.0]},
        {"sliding_window": 100},
        {"layer_types": ["full_attention"] * 5},
    ],
    ids=str,
)
def test_every_setting_matters(change: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    prompt = random_prompts([40])
    first, other = (
        PagedSequences(load_decoder(path, dtype="float32", device="cpu"), 1).run(prompt)
        for path in (saved, edited(saved, tmp_path, **change))
    )
    assert error(first, other) > 1e-3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_rope_theta", [0] * 4),
        ("layer_rope_theta", [10000.0, 0, -3.0, 0, 10000.0]),
        ("layer_rope_theta", ["x"] * 5),
        ("layer_types", ["chunked_attention"] * 5),
        ("sliding_window", None),
    ],
)
def test_a_value_that_cannot_be_honoured_is_refused(key: str, value: object, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=key):
        load_decoder(edited(saved, tmp_path, **{key: value}), device="cpu")
