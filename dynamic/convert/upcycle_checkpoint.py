"""A dense Llama checkpoint on disk turned into one of ours whose feed-forward layers are mixtures of experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ...moe.upcycle import ExpertSplit, UpcycleConfig, split_ffn
from ..checkpoint.directory import copy_tokenizer, write_json, write_tensors

_FFN_PARTS = ("gate_proj", "up_proj", "down_proj")


def upcycle_checkpoint(
    source: Path, target: Path, calibration_BL: torch.Tensor, config: UpcycleConfig, *, progress: bool = True
) -> None:
    """Split every feed-forward layer of a dense checkpoint into experts and store the result.

    Arguments:
        source: directory in Hugging Face layout, ``model_type`` llama.
        target: a directory that exists and is empty.
        calibration_BL: token ids, (windows, length), int64: the text on which neurons are compared.
        config: how to split.

    Raises:
        ValueError: when the source is not a Llama model, or its width is not a multiple of the number of experts.
    """
    dense_config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if dense_config["model_type"] != "llama" or dense_config.get("mlp_bias"):
        raise ValueError(
            f"only llama checkpoints without biases in the feed-forward layers can be split into experts;"
            f" {source} is {dense_config['model_type']!r}"
        )
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    splits = plan_splits(model, calibration_BL, config, progress=progress)
    weights = dict(model.state_dict())
    if dense_config.get("tie_word_embeddings"):
        weights.pop("lm_head.weight", None)
    for layer, split in enumerate(splits):
        prefix = f"model.layers.{layer}.mlp"
        for part in _FFN_PARTS:
            name = f"{prefix}.{part}.weight"
            weights[name] = weights[name].index_select(1 if part == "down_proj" else 0, split.order_N)
        weights[f"{prefix}.router.weight"] = split.router_ED

    write_tensors(target / "model.safetensors", weights)
    write_json(target / "config.json", _expert_config(dense_config, config))
    copy_tokenizer(source, target)


@torch.no_grad()
def plan_splits(
    model: Any, calibration_BL: torch.Tensor, config: UpcycleConfig, *, progress: bool = True
) -> list[ExpertSplit]:
    """Run the calibration text through a transformers Llama model once and plan each layer during the pass."""
    from tqdm import tqdm

    splits: list[ExpertSplit] = []
    bar = tqdm(total=len(model.model.layers), desc="Splitting into experts", unit="layer", disable=not progress or None)
    hooks = []
    for layer in model.model.layers:
        inputs: list[torch.Tensor] = []

        def on_ffn(_: Any, args: tuple[torch.Tensor, ...], inputs: list[torch.Tensor] = inputs) -> None:
            inputs.append(args[0].flatten(0, 1))

        def on_down(module: Any, args: tuple[torch.Tensor, ...], inputs: list[torch.Tensor] = inputs) -> None:
            splits.append(split_ffn(inputs.pop(), args[0].flatten(0, 1), module.weight, config))
            bar.update()

        hooks.append(layer.mlp.register_forward_pre_hook(on_ffn))
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(on_down))
    try:
        # Without the LM head: a fifth of this model's work, and not needed here.
        model.model(input_ids=calibration_BL, use_cache=False)
    finally:
        bar.close()
        for hook in hooks:
            hook.remove()
    return splits


def _expert_config(dense: dict[str, Any], config: UpcycleConfig) -> dict[str, Any]:
    return {
        **dense,
        "architectures": ["DynamoeForCausalLM"],
        "model_type": "dynamoe",
        "num_experts": config.num_experts,
        "num_always_on_experts": config.num_always_on,
        "num_experts_per_tok": config.num_experts - config.num_always_on,
        "expert_size": dense["intermediate_size"] // config.num_experts,
    }
