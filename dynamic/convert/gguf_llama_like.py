"""GGUF architectures of Llama, Mistral, Qwen and what differs from them in few places."""

from __future__ import annotations

from typing import Any

from .gguf_metadata import Metadata
from .gguf_parts import FUSED_GATE_UP, FUSED_QKV
from .gguf_settings import (
    FULL,
    PATTERN,
    TOP_K_THEN_SOFTMAX,
    Architecture,
    Tensors,
    dense_layers,
    experts_of,
    first_size,
    granite_scales,
    has_bias,
    rotations_wanted,
    routed_by,
    some_rotated,
    windows,
)


def _llama(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    """Llama, Mistral and Mixtral, and what has Llama's shape and biases."""
    window = {"sliding_window": meta.integer(".attention.sliding_window", 0) or None}
    if meta.integer(".expert_count", 0):
        return {"model_type": "mixtral", **window, **experts_of(meta, tensors, "num_local_experts", normalised=True)}
    if window["sliding_window"]:
        return {"model_type": "mistral", **window}
    if has_bias(tensors, "attn_q") and not has_bias(tensors, "attn_output"):
        return {"model_type": "qwen2", "use_sliding_window": False}
    return {
        "model_type": "llama",
        "attention_bias": has_bias(tensors, "attn_q", "attn_output"),
        "mlp_bias": has_bias(tensors, "ffn_up"),
    }


def _mistral3(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    """Ministral 3, whose queries grow with their positions, or Mistral Small 3, whose do not."""
    if not meta.number(".attention.temperature_scale", 0.0):
        return {"model_type": "mistral", "sliding_window": None}
    if (kind := meta.text(".rope.scaling.type", "")) != "yarn":
        raise meta.error(".rope.scaling.type", kind, "yarn with attention.temperature_scale")
    return {"model_type": "ministral3"}


def _growth(meta: Metadata) -> dict[str, float]:
    scale = meta.number(".attention.temperature_scale", 0.0)
    return {"llama_4_scaling_beta": scale} if scale else {}


def _granite(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    rotations_wanted(meta)
    # Files of Granite 4 without states name the width of the FFN twice.
    meta.get(".expert_shared_feed_forward_length")
    return {
        "model_type": "granite",
        "intermediate_size": first_size(tensors, "blk.0.ffn_up.weight"),
        "attention_bias": has_bias(tensors, "attn_q"),
        "mlp_bias": has_bias(tensors, "ffn_up"),
        **granite_scales(meta),
    }


def _smollm3(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    """Every fourth layer sees no positions."""
    return {
        "model_type": "smollm3",
        "attention_bias": has_bias(tensors, "attn_q"),
        "mlp_bias": has_bias(tensors, "ffn_up"),
        "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(meta.num_layers)],
    }


def _phi3(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    original = meta.integer(".rope.scaling.original_context_length", 0) or meta.integer(".context_length")
    return {
        "model_type": "phi3",
        "original_max_position_embeddings": original,
        "sliding_window": meta.integer(".attention.sliding_window", 0) or None,
    }


def _glm(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    return {"model_type": "glm", "attention_bias": has_bias(tensors, "attn_q")}


def _hunyuan(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    return {"model_type": "hunyuan_v1_dense", "attention_bias": has_bias(tensors, "attn_q")}


def _qwen2(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    return {"model_type": "qwen2", **_window(meta)}


def _qwen3(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    return {"model_type": "qwen3", "attention_bias": has_bias(tensors, "attn_q"), **_window(meta)}


def _olmoe(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    clip = meta.number(".attention.clamp_kqv", 0.0)
    return {
        "model_type": "olmoe",
        "attention_bias": has_bias(tensors, "attn_q"),
        "clip_qkv": clip or None,
        "norm_topk_prob": meta.flag(".expert_weights_norm", False),
        **experts_of(meta, tensors, "num_experts"),
    }


def _qwen2moe(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    if meta.integer(".expert_shared_count", 1) != 1:
        raise meta.error(".expert_shared_count", meta.get(".expert_shared_count"), "1")
    shared = first_size(tensors, ".ffn_up_shexp.weight")
    return {
        "model_type": "qwen2_moe",
        "qkv_bias": has_bias(tensors, "attn_q"),
        "shared_expert_intermediate_size": meta.integer(".expert_shared_feed_forward_length", shared),
        **_window(meta),
        **_sparse_qwen(meta, tensors, normalised=False),
    }


def _qwen3moe(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    window = _window(meta)
    if FULL in window.pop("layer_types", ()):
        raise meta.error(".attention.sliding_window_pattern", "some layers", "all layers, or none")
    bias = {"attention_bias": has_bias(tensors, "attn_q")}
    return {"model_type": "qwen3_moe", **bias, **window, **_sparse_qwen(meta, tensors, normalised=True)}


def _gpt_oss(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    routed_by(meta, TOP_K_THEN_SOFTMAX)
    return {
        "model_type": "gpt_oss",
        "attention_bias": has_bias(tensors, "attn_q", "attn_output"),
        "sliding_window": meta.integer(".attention.sliding_window"),
        **experts_of(meta, tensors, "num_local_experts", normalised=True),
    }


def _sparse_qwen(meta: Metadata, tensors: Tensors, *, normalised: bool) -> dict[str, Any]:
    experts = experts_of(meta, tensors, "num_experts")
    return {
        "norm_topk_prob": meta.flag(".expert_weights_norm", normalised),
        "moe_intermediate_size": experts.pop("intermediate_size"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense_layers(meta, tensors),
        **experts,
    }


def _window(meta: Metadata) -> dict[str, Any]:
    """Qwen's sliding windows, in the layers that a pattern names."""
    size = meta.integer(".attention.sliding_window", 0)
    if not size or (size >= meta.integer(".context_length") and not meta.has(PATTERN)):
        return {"use_sliding_window": False}
    # Without a pattern some layers slide and others do not, and the file does not say which.
    meta.array_of_layers(PATTERN)
    return {"use_sliding_window": True, **windows(meta, 0)}


LLAMA_LIKE: dict[str, Architecture] = {
    "llama": Architecture(settings=_llama, rotary_pairs=True),
    # Whose neighbouring channels are rotated together in the checkpoint, too.
    "ernie4_5": Architecture(settings=_llama, rotary_pairs=True),
    "mistral3": Architecture(settings=_mistral3, rotary_pairs=True, scaling=_growth),
    "granite": Architecture(settings=_granite, rotary_pairs=True),
    "smollm3": Architecture(settings=_smollm3, rotary_pairs=True),
    "phi3": Architecture(settings=_phi3, heads=some_rotated, names={**FUSED_QKV, **FUSED_GATE_UP}),
    "chatglm": Architecture(settings=_glm, heads=some_rotated, names={**FUSED_QKV, **FUSED_GATE_UP}),
    "hunyuan-dense": Architecture(settings=_hunyuan),
    "qwen2": Architecture(settings=_qwen2),
    "qwen2moe": Architecture(settings=_qwen2moe),
    "qwen3": Architecture(settings=_qwen3),
    "qwen3moe": Architecture(settings=_qwen3moe),
    "olmoe": Architecture(settings=_olmoe),
    "gpt-oss": Architecture(
        settings=_gpt_oss,
        names={"post_attention_norm.weight": "post_attention_layernorm.weight", "attn_sinks.weight": "self_attn.sinks"},
        scaling=lambda meta: {"truncate": False},  # which the files do not say
    ),
}
