"""Writes GGUF files of tiny checkpoints, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def write_gguf(checkpoint: Path, file: Path, architecture: str, kinds: dict[str, str] | None = None) -> None:
    """A tiny checkpoint as llama.cpp's converter would write it, its weights in float32.

    Arguments:
        kinds: by GGUF's names of projections, what they are quantised to.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, quantize

    config = json.loads((checkpoint / "config.json").read_text())
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    writer = GGUFWriter(file, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if index < 3 else 1 for _, index in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    for name, token in (("bos", 1), ("eos", 2), ("pad", 0)):
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    if "num_local_experts" in config:
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if architecture == "granitemoe":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, weight in gguf_tensors(load_file(checkpoint / "model.safetensors")).items():
        part, kind = name.split(".")[-2:]
        if architecture != "qwen2" and kind == "weight" and part in heads:
            weight = weight.unflatten(0, (heads[part], 2, -1)).transpose(1, 2).flatten(0, 2)
        array = weight.contiguous().numpy()
        if part in (kinds or {}):
            raw_type = GGMLQuantizationType[(kinds or {})[part]]
            writer.add_tensor(name, quantize(array, raw_type), raw_dtype=raw_type)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By GGUF's names; the experts of a layer in one tensor."""
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
        "self_attn.o_proj": "attn_output",
        **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
        **dict.fromkeys(("mlp.gate", "block_sparse_moe.gate", "block_sparse_moe.router.layer"), "ffn_gate_inp"),
        "block_sparse_moe.router": "ffn_gate_inp",
    }
    parts = {"w1": "gate", "w3": "up", "w2": "down", **{f"{part}_proj": part for part in ("gate", "up", "down")}}
    out, experts = {}, dict[str, dict[int, torch.Tensor]]()
    for name, weight in weights.items():
        stem, kind = name.removesuffix(".weight"), "bias" if name.endswith(".bias") else "weight"
        stem, block = stem.removesuffix(".bias"), ""
        if stem.startswith("model.layers."):
            _, _, number, stem = stem.split(".", 3)
            block = f"blk.{number}."
        if ".experts." in stem and stem.split(".")[-2].isdigit():
            expert, part = stem.split(".")[-2:]
            experts.setdefault(f"{block}ffn_{parts[part]}_exps.weight", {})[int(expert)] = weight
        elif stem.endswith(("experts.gate_up_proj", "input_linear")):
            gate, up = weight.chunk(2, 1)
            out |= {f"{block}ffn_gate_exps.weight": gate, f"{block}ffn_up_exps.weight": up}
        elif stem.endswith(("experts.down_proj", "output_linear")):
            out[f"{block}ffn_down_exps.weight"] = weight
        else:
            out[f"{block}{names[stem]}.{kind}"] = weight
    return out | {name: torch.stack([e for _, e in sorted(of.items())]) for name, of in experts.items()}
