"""The text part of models for images and text: the same logits as transformers, and nothing left out in silence."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COMMON, randomize, write_tokenizer
from dynamoe.dynamic.checkpoint.weights import CheckpointError
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.model.prompt_pass import fresh_cache
from dynamoe.dynamic.model.text_part import _DEFAULTS, _SIZES, text_config
from dynamoe.exits.segments import Segment
from safetensors.torch import load_file, save_file

IDS = torch.randint(3, 320, (17,), generator=torch.Generator().manual_seed(5))
TEXT: dict[str, Any] = {**COMMON, "num_hidden_layers": 2}
CLIP = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14}  # fmt: skip
QWEN = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
ROTATIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
MODELS: dict[str, dict[str, Any]] = {
    "llava": {"text_config": {"model_type": "llama", **TEXT},
              "vision_config": {"model_type": "clip_vision_model", **CLIP}},
    "mistral3": {"text_config": {"model_type": "mistral", **TEXT, "sliding_window": 8},
                 "vision_config": {"model_type": "pixtral", **CLIP}},
    "qwen2_5_vl": {"text_config": {**TEXT, "rope_parameters": ROTATIONS}, "vision_config": QWEN},
    "gemma3": {"text_config": {**TEXT, "head_dim": 24, "sliding_window": 8, "num_hidden_layers": 3,
                               "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
               "vision_config": {"model_type": "siglip_vision_model", **CLIP}},
    "gemma4": {"text_config": {**TEXT, "head_dim": 24, "global_head_dim": 32, "sliding_window": 8,
                               "hidden_size_per_layer_input": 0, "attention_k_eq_v": True,
                               "layer_types": ["sliding_attention", "full_attention"]},
               "vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
                                 "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
               "audio_config": None},
    "qwen3_vl": {"text_config": {**TEXT, "head_dim": 16, "rope_parameters": ROTATIONS},
                 "vision_config": {**QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}},
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def multimodal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A checkpoint as transformers writes it, and its logits for text."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    path = tmp_path_factory.mktemp(request.param)
    config = AutoConfig.for_model(request.param, **MODELS[request.param], image_token_id=300, image_token_index=300)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    randomize(model, 3)
    with torch.no_grad():
        expected = model(input_ids=IDS[None]).logits[0]
    model.save_pretrained(path)
    write_tokenizer(path)
    return path, expected


def logits_of(path: Path) -> torch.Tensor:
    decoder = load_decoder(path, dtype="float32", device="cpu")
    kv, batch = fresh_cache(decoder, [len(IDS)])
    whole = Segment(index=0, layers=range(decoder.spec.num_layers))
    return decoder.logits(decoder.run_segment(whole, decoder.embed(IDS), kv, batch))


def test_the_text_part_is_the_model_for_text(
    multimodal: tuple[Path, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    path, expected = multimodal
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(logits_of(path), expected, rtol=1e-3, atol=1e-3)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "served for text alone" in said[0]
    assert "vi" in said[0]  # vision_tower, visual


def test_other_parts_are_left_out_only_where_the_configuration_has_them(
    multimodal: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    path = shutil.copytree(multimodal[0], tmp_path / "copy")
    whole = json.loads((path / "config.json").read_text())

    def changed(**changes: Any) -> None:
        (path / "config.json").write_text(json.dumps({**whole, **changes}))

    for changes, message in (
        ({"vision_config": None}, "belongs to no part of the model"),
        ({"made_up": 1}, "made_up=1 is not supported"),
        ({"text_config": {**whole["text_config"], "made_up": 1}}, "made_up=1 is not supported"),
        (
            {"text_config": {**whole["text_config"], "model_type": "mllama_text_model"}},
            "'mllama_text_model' is not supp",
        ),
        ({"text_config": [1]}, "text_config must be an object"),
        ({"text_config": {**whole["text_config"], "text_config": {"rms_norm_eps": 1}}}, "text_config must be absent"),
        ({"quantization_config": {"quant_method": "odd"}}, "quant_method must be one of"),
        (
            {"text_config": {**whole["text_config"], "quantization_config": {"quant_method": "odd"}}},
            "quant_method must",
        ),
    ):
        changed(**changes)
        with pytest.raises(CheckpointError, match=message):
            load_decoder(path, dtype="float32", device="cpu")
    changed()
    weights = load_file(path / "model.safetensors")
    save_file({**weights, "model.made_up.weight": torch.ones(2)}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'model\..*made_up.weight' in model.safetensors belongs to no part"):
        load_decoder(path, dtype="float32", device="cpu")


@pytest.mark.parametrize("family", _DEFAULTS)
def test_sizes_that_a_text_config_leaves_out_are_those_of_transformers(family: str) -> None:
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(family)
    ours = text_config({"model_type": "llava", "text_config": {"model_type": family}, "vision_config": {"a": 1}})
    for key in (*_SIZES, "max_position_embeddings"):
        assert ours[key] == getattr(theirs, key), key


def test_the_older_flat_configuration_of_qwen(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = make_checkpoint("qwen2")
    plain = json.loads((source / "config.json").read_text())
    path = shutil.copytree(source, tmp_path / "flat")
    extra = {"vision_config": {"depth": 1}, "image_token_id": 5, "vision_start_token_id": 6}
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "rope_parameters": None}
    theta = plain.get("rope_parameters", {}).get("rope_theta", 10000.0)
    flat = {**plain, "model_type": "qwen2_5_vl", **extra, **rope, "rope_theta": theta}
    (path / "config.json").write_text(json.dumps(flat))
    weights = load_file(path / "model.safetensors")
    save_file({**weights, "visual.merger.weight": torch.ones(2)}, path / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits_of(path), logits_of(source))
