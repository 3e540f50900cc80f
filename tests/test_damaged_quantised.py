"""Quantised checkpoints that are damaged: whichever layout, one error that names what is wrong, and no model.

Every tensor of one weight is taken away, cut short, given another dtype or made not finite, one at a time.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.checkpoint.compressed_writer import compressed
from dynamoe.dynamic.checkpoint.weights import CheckpointError
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.kernels.api import rounding
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
MODULE = "model.layers.1.self_attn.k_proj"
INT4_OFFSETS = {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True, "type": "int"}


def int32(*shape: int) -> torch.Tensor:
    return torch.full(shape, 0x77777777, dtype=torch.int32)


def gptq(outputs: int, inputs: int) -> Tensors:
    groups = -(-inputs // 32)
    order = (torch.arange(inputs) // 32).int()
    scales = torch.ones(groups, outputs).half() / 64
    return {
        "qweight": int32(inputs // 8, outputs),
        "qzeros": int32(groups, outputs // 8),
        "scales": scales,
        "g_idx": order,
    }


def awq(outputs: int, inputs: int) -> Tensors:
    groups = -(-inputs // 32)
    return {
        "qweight": int32(inputs, outputs // 8),
        "qzeros": int32(groups, outputs // 8),
        "scales": torch.ones(groups, outputs).half() / 64,
    }


def block_fp8(outputs: int, inputs: int) -> Tensors:
    codes = torch.randn(outputs, inputs).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": torch.full((-(-outputs // 128), -(-inputs // 128)), 0.05)}


def ours(quantize: Callable[..., Any], outputs: int, inputs: int) -> Tensors:
    """As compressed-tensors lays it out."""
    tensors = compressed("weight", quantize(torch.randn(outputs, inputs) / inputs**0.5))
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def fp8(outputs: int, inputs: int) -> Tensors:
    weight = rounding.quantize_fp8(torch.randn(outputs, inputs) / inputs**0.5)
    return {"weight": weight.data, "weight_scale": weight.scale}


def settings(*weights: dict[str, Any]) -> dict[str, Any]:
    groups = {str(number): {"targets": ["Linear"], "weights": w} for number, w in enumerate(weights)}
    return {"quant_method": "compressed-tensors", "config_groups": groups}


LAYOUTS: dict[str, tuple[dict[str, Any], Callable[[int, int], Tensors]]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}, gptq),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq),
    "fp8 blocks": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, block_fp8),
    "int4": (settings(INT4_OFFSETS), partial(ours, partial(rounding.quantize_int4, group=32))),
    "int4 with zero points": (
        settings({**INT4_OFFSETS, "symmetric": False}),
        partial(ours, partial(rounding.quantize_int4, group=32, symmetric=False)),
    ),
    "int8": (settings({"num_bits": 8, "strategy": "channel"}), partial(ours, rounding.quantize_int8)),
    "int8 in groups": (
        settings({"num_bits": 8, "strategy": "group", "group_size": 32}),
        partial(ours, partial(rounding.quantize_int8, group=32)),
    ),
    "fp8": (settings({"num_bits": 8, "type": "float", "strategy": "channel"}), fp8),
}


def damages(part: str, tensor: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Each way to spoil a tensor, by name; None: it is gone."""
    other = tensor.float() if not tensor.dtype.is_floating_point or part == "weight" else tensor.to(torch.int64)
    out: dict[str, torch.Tensor | None] = {"gone": None, "of another dtype": other}
    out["short"] = tensor[:-1].clone()
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
        out["not finite"] = tensor.clone()
        out["not finite"].view(-1)[0] = math.inf
    if tensor.dtype == torch.float8_e4m3fn:
        out["not finite"] = tensor.clone()
        out["not finite"].view(torch.uint8)[0, 0] = 0x7F
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_damage_is_named(make_checkpoint: Callable[..., Path], tmp_path: Path, layout: str) -> None:
    config, store = LAYOUTS[layout]
    source = make_checkpoint("llama", intermediate_size=128)
    whole = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            whole |= {f"{module}.{part}": tensor for part, tensor in store(*weight.shape).items()}
        else:
            whole[name] = weight
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    described = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**described, "quantization_config": config}))

    def load(tensors: Tensors) -> None:
        save_file(tensors, tmp_path / "model.safetensors")
        load_decoder(tmp_path, dtype="float32", backend="torch", device="cpu")

    load(whole)
    answers = {}
    for part in store(8, 64):
        for how, tensor in damages(part, whole[f"{MODULE}.{part}"]).items():
            spoilt = {name: t for name, t in whole.items() if name != f"{MODULE}.{part}"}
            if tensor is not None:
                spoilt[f"{MODULE}.{part}"] = tensor
            try:
                load(spoilt)
                answers[part, how] = "it loads"
            except CheckpointError as error:
                answers[part, how] = str(error)
    # An order that is not stored is the plain one; and either width of integers will do.
    fine = {("g_idx", "gone"), ("g_idx", "of another dtype"), ("weight_shape", "of another dtype")}
    assert {what: answer for what, answer in answers.items() if MODULE not in answer and what not in fine} == {}
