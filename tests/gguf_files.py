"""Writes GGUF files of tiny checkpoints, for tests: as llama.cpp's converter does, by names of its own."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf_converters import CONVERTERS, as_converted
from k_blocks import k_blocks
from safetensors.torch import load_file, save_file

ARCHITECTURES = {
    "ernie4_5_moe": "ernie4_5-moe",
    "glm4_moe": "glm4moe",
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite"), "deepseek2"),
    **{"deepseek_v32": "deepseek32", "glm_moe_dsa": "glm-dsa"},
    "gpt_oss": "gpt-oss",
    "granitemoeshared": "granitemoe",
    "hunyuan_v1_moe": "hunyuan-moe",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
MERGED_ROTARY = ("llama", "granitemoe")  # architectures whose rotary pairs lie next to each other
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    **{
        f"mlp.{module}.{part}_proj": f"ffn_{part}_shexp"
        for module in ("shared_experts", "shared_mlp")
        for part in ("gate", "up", "down")
    },
    "shared_mlp.output_linear": "ffn_down_shexp",
    "self_attn.query_layernorm": "attn_q_norm",
    "self_attn.key_layernorm": "attn_k_norm",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    **dict.fromkeys(
        (
            *("mlp.gate", "mlp.gate.wg", "mlp.router", "block_sparse_moe.gate"),
            *("block_sparse_moe.router.layer", "block_sparse_moe.router"),
        ),
        "ffn_gate_inp",
    ),
}
ROUTERS = ("gate", "wg", "router.layer", "router", "shared_expert_gate")
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # bytes of float16 scales
FLOATS = ("F16", "BF16")
GENERAL = {
    **{"general.type": "model", "general.name": "tiny", "general.quantization_version": 2},
    "quantize.imatrix.file": "somewhere",
}
Blocks = dict[bytes, bytes]
Edit = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


def write_gguf(
    checkpoint: Path,
    file: Path,
    kinds: Mapping[str, str] | str | None = None,
    *,
    blocks: Blocks | None = None,
    pre: str = "smollm",
    edit: Edit | None = None,
    architecture: str = "",
    one_each: bool = False,
    **writing: Any,
) -> Path:
    """A tiny checkpoint as a GGUF file.

    Arguments:
        kinds: by GGUF's names of projections, what they are quantised to; one for all; None: float32.
        blocks: from :func:`rounded_checkpoint`; None: the library quantises.
        architecture: another than the usual one for the checkpoint.
        pre: ``tokenizer.ggml.pre``.
        edit: changes metadata (see :func:`metadata`) and tensors before they are written.
        one_each: experts are written one by one, as the first converters of Mixtral did.
        writing: for the writer, such as ``split_max_tensors``.
    """
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    config = json.loads((checkpoint / "config.json").read_text())
    weights = load_file(checkpoint / "model.safetensors")
    if config["model_type"] in CONVERTERS:
        architecture, own, tensors = as_converted(config, weights)
        values = {**GENERAL, **{f"{architecture}.{key}": value for key, value in own.items()}}
    else:
        architecture = architecture or ARCHITECTURES.get(config["model_type"], config["model_type"])
        values, tensors = metadata(config, architecture), gguf_tensors(weights, config, architecture)
    values |= tokenizer_metadata(checkpoint, pre)
    if edit is not None:
        edit(values, tensors)
    if one_each:
        for name in [name for name in tensors if "_exps" in name]:
            for number, expert in enumerate(tensors.pop(name)):
                tensors[name.replace("_exps", f".{number}")] = expert
    writer = GGUFWriter(file, values.pop("general.architecture", architecture), **writing)
    types = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_key_value(key, value, types[type(value)])
    for name, weight in tensors.items():
        part = name.split(".")[2] if name.startswith("blk.") else name.split(".")[0]
        kind = kinds if isinstance(kinds, str) else (kinds or {}).get(part)
        array = weight.contiguous().float().numpy()
        raw = GGMLQuantizationType[kind] if kind and is_quantised(name, weight, kind) else None
        if raw is None or "ffn_gate_inp" in name:
            writer.add_tensor(name, array)
        else:
            data = rounded(array, kind) if blocks is None or kind in FLOATS else blocks_of(array, blocks)
            writer.add_tensor(name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def is_quantised(name: str, weight: torch.Tensor, kind: str) -> bool:
    """Whether a tensor is one that llama.cpp quantises."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return weight.dim() > 1 and "norm" not in name and not name.endswith(".bias") and weight.shape[-1] % block == 0


def rounded(array: Any, kind: str) -> Any:
    """Rounded to blocks of a type, uint8 (…, bytes of a row); K-quants, which the library only reads, by us."""
    from gguf import GGMLQuantizationType, quantize

    if not kind.endswith("_K"):
        return quantize(array, GGMLQuantizationType[kind])
    rows = k_blocks(kind, torch.from_numpy(array).flatten(0, -2))
    return rows.view(*array.shape[:-1], -1).numpy()


def rounded_checkpoint(checkpoint: Path, target: Path, kind: str) -> Blocks:
    """Write a checkpoint with the weights that its GGUF file stands for, and return the blocks of every row.

    The library writes only some types; of others come random blocks.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize, quantize

    shutil.copytree(checkpoint, target)
    raw_type = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[raw_type]
    generator = torch.Generator().manual_seed(0)
    weights, blocks = load_file(checkpoint / "model.safetensors"), Blocks()
    for name, weight in weights.items():
        if weight.dim() < 2 or "norm" in name or any(f"{small}.weight" in name for small in ROUTERS):
            continue
        rows = weight.float().flatten(0, -2).contiguous()
        if kind in FLOATS:
            weights[name] = weight.to(torch.float16 if kind == "F16" else torch.bfloat16).float()
            continue
        try:
            raw = quantize(rows.numpy(), raw_type)
        except NotImplementedError:
            shape = (rows.shape[0], rows.shape[1] // block, size)
            bytes_OGX = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            for at in SCALES.get(kind, (0,)):
                scale = torch.rand((*shape[:2], 1), generator=generator) * 1e-4 + 1e-4
                bytes_OGX[..., at : at + 2] = scale.half().view(torch.uint8)
            raw = bytes_OGX.flatten(1).numpy()
        numbers = torch.tensor(dequantize(raw, raw_type))
        blocks.update({row.numpy().tobytes(): data.tobytes() for row, data in zip(numbers, raw, strict=True)})
        weights[name] = numbers.view(weight.shape).contiguous()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return blocks


def blocks_of(array: Any, blocks: Blocks) -> Any:
    """The blocks of a tensor whose rows are known."""
    rows = [np.frombuffer(blocks[row.tobytes()], np.uint8) for row in array.reshape(-1, array.shape[-1])]
    return np.stack(rows).reshape(*array.shape[:-1], -1)


def metadata(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """What a converter writes of a model's configuration, by key."""
    rope = config.get("rope_parameters") or {}
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    own: dict[str, Any] = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "attention.key_length": config.get("head_dim"),
        "attention.value_length": config.get("head_dim"),
        "attention.sliding_window": window,
        "attention.scale": config.get("attention_multiplier"),
        "attention.clamp_kqv": config.get("clip_qkv"),
        "embedding_scale": config.get("embedding_multiplier"),
        "residual_scale": config.get("residual_multiplier"),
        "logit_scale": config.get("logits_scaling"),
        "rope.freq_base": float(rope["rope_theta"]),
        "expert_count": first_of(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
        "expert_used_count": first_of(config, "num_experts_per_tok", "moe_k", "moe_topk"),
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
        "expert_shared_feed_forward_length": first_of(
            config, "shared_expert_intermediate_size", "shared_intermediate_size"
        ),
        "vocab_size": config["vocab_size"],
    }
    own |= shared_metadata(config, architecture)
    if architecture in LATENT:
        own |= deepseek2_metadata(config)
    if rope.get("rope_type") in ("linear", "yarn"):
        own |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope.get("rope_type") == "yarn":
        own["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return {
        **GENERAL,
        **{f"{architecture}.{key}": value for key, value in own.items() if value is not None},
    }


def first_of(config: dict[str, Any], *keys: str) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), None)


def shared_metadata(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """What converters write of routers beyond the plain ones, and of shared experts."""
    if architecture in ("glm4moe", "dots1"):
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        factor = config["rope_parameters"].get("partial_rotary_factor", 1.0)
        return {
            "rope.dimension_count": int(head_dim * factor),
            "attention.key_length": head_dim,
            "attention.value_length": head_dim,
            "leading_dense_block_count": config["first_k_dense_replace"],
            "expert_shared_count": config["n_shared_experts"],
            "expert_weights_scale": float(config["routed_scaling_factor"]),
            "expert_weights_norm": config["norm_topk_prob"],
            "expert_gating_func": 2,
            "expert_group_count": config["n_group"],
            "expert_group_used_count": config["topk_group"],
            "attention.sliding_window": None,
        }
    if architecture == "ernie4_5-moe":
        return {
            "leading_dense_block_count": config["moe_layer_start_index"],
            "interleave_moe_layer_step": config["moe_layer_interval"],
            "expert_shared_count": config["moe_num_shared_experts"],
            "expert_shared_feed_forward_length": 7,  # a number of no meaning
        }
    if architecture == "hunyuan-moe":
        size = config["intermediate_size"]
        sizes = {"expert_feed_forward_length": size, "expert_shared_feed_forward_length": size}
        return {**sizes, "expert_shared_count": 1}
    return {}


def tokenizer_metadata(checkpoint: Path, pre: str) -> dict[str, Any]:
    """What a converter writes of a byte-level tokenizer."""
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in vocabulary],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }


def gguf_tensors(
    weights: dict[str, torch.Tensor], config: dict[str, Any], architecture: str
) -> dict[str, torch.Tensor]:
    """By GGUF's names; the experts of a layer in one tensor, queries and keys in the file's order."""
    parts = {"w1": "gate", "w3": "up", "w2": "down", **{f"{part}_proj": part for part in ("gate", "up", "down")}}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    out, experts = {}, dict[str, dict[int, torch.Tensor]]()
    for name, weight in weights.items():
        kind = "bias" if name.endswith(".bias") else "weight"
        stem, block = name.removesuffix(f".{kind}"), ""
        if stem.startswith("model.layers."):
            _, _, number, stem = stem.split(".", 3)
            block = f"blk.{number}."
        if found := OWN_TENSORS.get(architecture, nothing)(block, stem, kind, weight, config):
            out |= found
        elif ".experts." in stem and stem.split(".")[-2].isdigit():
            expert, part = stem.split(".")[-2:]
            experts.setdefault(f"{block}ffn_{parts[part]}_exps.weight", {})[int(expert)] = weight
        elif stem.endswith("e_score_correction_bias"):
            out[f"{block}exp_probs_b.bias"] = weight.flatten()
        elif stem == "shared_mlp.input_linear":
            out |= {
                f"{block}ffn_{part}_shexp.weight": w for part, w in zip(("gate", "up"), weight.chunk(2), strict=True)
            }
        elif architecture == "glm4moe" and stem == "post_attention_layernorm":
            out[f"{block}post_attention_norm.weight"] = weight
        elif stem.endswith(("experts.gate_up_proj", "input_linear")):
            gate, up = weight.chunk(2, 1)
            out |= {f"{block}ffn_gate_exps.weight": gate, f"{block}ffn_up_exps.weight": up}
        elif stem.endswith((".experts.down_proj", "block_sparse_moe.output_linear")):
            out[f"{block}ffn_down_exps.weight"] = weight
        else:
            part = NAMES[stem]
            if part in heads and architecture in MERGED_ROTARY:
                weight = weight.unflatten(0, (heads[part], 2, -1)).transpose(1, 2).flatten(0, 2)
            out[f"{block}{part}.{kind}"] = weight.squeeze(0) if part == "ffn_gate_inp_shexp" else weight
    out |= {name: torch.stack([e for _, e in sorted(of.items())]) for name, of in experts.items()}
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "llama3":
        out["rope_freqs.weight"] = llama3_factors(rope, config)
    return out


LATENT_NAMES = {
    **{"self_attn.q_a_proj": "attn_q_a", "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_b_proj": "attn_q_b"},
    **{"self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm"},
    **{f"mlp.shared_experts.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
    **{"self_attn.indexer.wq_b": "indexer.attn_q_b", "self_attn.indexer.wk": "indexer.attn_k"},
    **{"self_attn.indexer.k_norm": "indexer.k_norm", "self_attn.indexer.weights_proj": "indexer.proj"},
}
LATENT = ("deepseek2", "deepseek32", "glm-dsa")


def deepseek2_tensors(
    block: str, stem: str, kind: str, weight: torch.Tensor, config: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Of those that other architectures do not have: keys and values are made of a latent head by head."""
    if stem in LATENT_NAMES:
        return {f"{block}{LATENT_NAMES[stem]}.{kind}": weight}
    if stem.endswith("e_score_correction_bias"):
        return {f"{block}exp_probs_b.bias": weight}
    if stem != "self_attn.kv_b_proj":
        return {}
    key_HNZ, value_HVZ = weight.unflatten(0, (config["num_attention_heads"], -1)).split(
        (config["qk_nope_head_dim"], config["v_head_dim"]), 1
    )
    return {f"{block}attn_k_b.weight": key_HNZ.transpose(1, 2).contiguous(), f"{block}attn_v_b.weight": value_HVZ}


def deepseek2_metadata(config: dict[str, Any]) -> dict[str, Any]:
    rank, rotated = config["kv_lora_rank"], config["qk_rope_head_dim"]
    sigmoid, rope = config["model_type"] != "deepseek_v2", config["rope_parameters"]
    dense = (config.get("mlp_layer_types") or []).count("dense")
    own = {
        "attention.head_count_kv": 1,
        "attention.key_length": rank + rotated,
        "attention.value_length": rank,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rotated,
        "attention.value_length_mla": config["v_head_dim"],
        "attention.kv_lora_rank": rank,
        "attention.q_lora_rank": config["q_lora_rank"],
        "rope.dimension_count": rotated,
        "leading_dense_block_count": config.get("first_k_dense_replace", dense),
        "expert_count": config["n_routed_experts"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_weights_norm": config["norm_topk_prob"],
        "expert_gating_func": None if config["model_type"] == "glm4_moe_lite" else 2 if sigmoid else 1,
        "attention.indexer.head_count": config.get("index_n_heads"),
        "attention.indexer.key_length": config.get("index_head_dim"),
        "attention.indexer.top_k": config.get("index_topk"),
    }
    own |= {"expert_group_count": config["n_group"], "expert_group_used_count": config["topk_group"]}
    if rope["rope_type"] == "yarn":
        own["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    return own


def gpt_oss_tensors(
    block: str, stem: str, kind: str, weight: torch.Tensor, config: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Of those that other architectures do not have: outputs come first, and gate and up apart."""
    if stem.endswith("sinks"):
        return {f"{block}attn_sinks.weight": weight}
    if stem == "post_attention_layernorm":
        return {f"{block}post_attention_norm.weight": weight}
    if ".experts." not in stem:
        return {}
    part, biased = stem.split(".")[-1].removesuffix("_bias"), stem.endswith("_bias")
    weight, kind = (weight, "bias") if biased else (weight.transpose(1, 2), "weight")
    if part == "down_proj":
        return {f"{block}ffn_down_exps.{kind}": weight}
    return {f"{block}ffn_{name}_exps.{kind}": weight[:, first::2] for first, name in enumerate(("gate", "up"))}


def llama3_factors(rope: dict[str, Any], config: dict[str, Any]) -> torch.Tensor:
    """The divisor of every frequency."""
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    factors = []
    for exponent in torch.arange(0, dim, 2) / dim:
        wavelength = 2 * math.pi * rope["rope_theta"] ** float(exponent)
        turns = rope["original_max_position_embeddings"] / wavelength
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors)


def nothing(*_: Any) -> dict[str, torch.Tensor]:
    """Of an architecture whose tensors others have too."""
    return {}


OWN_TENSORS = {**dict.fromkeys(LATENT, deepseek2_tensors), "gpt-oss": gpt_oss_tensors}
