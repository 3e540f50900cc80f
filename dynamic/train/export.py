"""A trained decoder as an ordinary Qwen3-MoE checkpoint, which this framework's loader and transformers both read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from ...exits.sidecar import JSON_FILE, TENSOR_FILE
from ...moe.sidecar import JSON_FILE as EXPERTS_FILE
from ..text.corpus import END_OF_TEXT
from .model import Attention, DecoderConfig, SparseMLP, TrainableDecoder

# The model continues text; a conversation reaches it as the text of its messages.
_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"


def model_config(config: DecoderConfig, dtype: torch.dtype) -> dict:
    """``config.json`` of the export."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.expert_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": config.expert_size,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": True,
        "output_router_logits": False,
        "tie_word_embeddings": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def checkpoint_tensors(model: TrainableDecoder, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All tensors under Qwen3-MoE's names; the exits' adapters are not among them."""
    tensors: dict[str, torch.Tensor] = {
        "model.embed_tokens.weight": model.embedding,
        "model.norm.weight": model.norm.weight,
    }
    config = model.config
    sizes = [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    for number, layer in enumerate(model.layers):
        prefix = f"model.layers.{number}."
        attention, mlp = layer.attention, layer.mlp
        assert isinstance(attention, Attention)
        assert isinstance(mlp, SparseMLP)
        tensors[prefix + "input_layernorm.weight"] = layer.input_norm.weight  # type: ignore[union-attr,assignment]
        tensors[prefix + "post_attention_layernorm.weight"] = layer.post_norm.weight  # type: ignore[union-attr,assignment]
        for name, part in zip("qkv", attention.qkv_proj.weight.split(sizes), strict=True):
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = part
        tensors[prefix + "self_attn.o_proj.weight"] = attention.o_proj.weight
        tensors[prefix + "self_attn.q_norm.weight"] = attention.q_norm.weight
        tensors[prefix + "self_attn.k_norm.weight"] = attention.k_norm.weight
        tensors[prefix + "mlp.gate.weight"] = mlp.router.weight
        for expert in range(config.num_experts):
            here = f"{prefix}mlp.experts.{expert}."
            tensors[here + "gate_proj.weight"], tensors[here + "up_proj.weight"] = mlp.gate_up_EGFD[expert].unbind(0)
            tensors[here + "down_proj.weight"] = mlp.down_EDF[expert]
    return {name: t.detach().cpu().to(dtype).clone().contiguous() for name, t in tensors.items()}


def export_checkpoint(
    model: TrainableDecoder, tokenizer_file: Path, target: Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write weights, configuration and tokenizer into a directory, which is made.

    Arguments:
        tokenizer_file: a ``tokenizer.json`` whose id 0 ends a text.
        dtype: of the stored weights.
    """
    target.mkdir(parents=True, exist_ok=True)
    for stale in (JSON_FILE, TENSOR_FILE, EXPERTS_FILE):  # what belongs to an earlier export does not fit these weights
        (target / stale).unlink(missing_ok=True)
    save_file(checkpoint_tensors(model, dtype), target / "model.safetensors", metadata={"format": "pt"})
    (target / "model.safetensors").chmod(0o644)  # safetensors lets nobody else read what it writes
    shutil.copyfile(tokenizer_file, target / "tokenizer.json")
    files = {
        "config.json": model_config(model.config, dtype),
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 0, "do_sample": False, "max_new_tokens": 128},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "model_max_length": model.config.max_position,
            "clean_up_tokenization_spaces": False,
            "chat_template": _CHAT_TEMPLATE,
        },
    }
    for name, content in files.items():
        (target / name).write_text(json.dumps(content, indent=1))
