"""gpt-oss against transformers: sinks, biases, windows, the clamped activation, and experts in MXFP4."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.kernels.api.formats import MXFP4
from family_parity import Variant, check_engine, check_logits
from safetensors.torch import load_file, save_file

EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 4, "head_dim": 16}
YARN = {
    **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0},
    **{"truncate": False, "original_max_position_embeddings": 64},
}
SMALL = {**EXPERTS, "sliding_window": 12, "rope_parameters": YARN}


def prepare(model: torch.nn.Module) -> None:
    """Gates and ups that reach the limits of the activation, and sinks that take a good part of the attention."""
    for name, parameter in model.named_parameters():
        if name.endswith("gate_up_proj"):
            parameter *= 5
        if name.endswith("down_proj"):
            parameter *= 0.2
        if name.endswith("sinks"):
            parameter += 1.0


def to_mxfp4(directory: Path) -> None:
    """What published checkpoints look like: the experts' weights rounded to 4-bit floats, a power of two for 32."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        groups = tensors.pop(name).transpose(1, 2).unflatten(2, (-1, 32))
        exponent = groups.abs().amax(-1).log2().floor() - 2
        numbers = MXFP4.codes.numbers(torch.arange(16, dtype=torch.uint8)[:, None] | 0, 2)[:, 0]
        codes = ((groups * torch.exp2(-exponent)[..., None])[..., None] - numbers).abs().argmin(-1).to(torch.uint8)
        tensors[f"{name}_blocks"] = MXFP4.codes.pack(codes).contiguous()
        tensors[f"{name}_scales"] = (exponent + 127).to(torch.uint8)
    save_file(tensors, file, metadata={"format": "pt"})
    edit_config(
        directory,
        quantization_config={
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
        },
    )


def edit_config(directory: Path, **keys: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **keys}))


def variant(edit: Callable[[Path], None] | None = None, **config: Any) -> Variant:
    return Variant(family="gpt_oss", config={**SMALL, **config}, prepare=prepare, edit=edit)


def reference(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM, Mxfp4Config

    quantised = "quantization_config" in json.loads((directory / "config.json").read_text())
    settings = {"quantization_config": Mxfp4Config(dequantize=True)} if quantised else {}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager", **settings)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The directory of a variant, written once."""

    @cache
    def directory(kind: str) -> Path:
        made = VARIANTS[kind]
        return made.save(tmp_path_factory.mktemp(kind))

    return directory


VARIANTS = {
    "mxfp4": variant(to_mxfp4),
    "plain": variant(),
    "full": variant(
        layer_types=["full_attention"] * 4, rope_parameters={"rope_type": "default", "rope_theta": 150000.0}
    ),
    "unbiased": variant(attention_bias=False, tie_word_embeddings=True, num_key_value_heads=1, sliding_window=5),
}


@pytest.mark.parametrize(
    "kind", ["mxfp4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in VARIANTS if kind != "mxfp4")]
)
def test_logits_and_tokens_are_those_of_transformers(kind: str, saved: Callable[..., Path]) -> None:
    directory = saved(kind)
    model = reference(directory)
    decoder = check_logits(directory, model)
    assert decoder.stack is not None
    check_engine(directory, model, paths=("together", "chunked", "preempted", "prefix"))
