"""GGUF architectures whose layers differ in windows, rotations and heads."""

from __future__ import annotations

from typing import Any

from .gguf_metadata import Metadata
from .gguf_parts import Config, fused
from .gguf_settings import (
    FULL,
    KV_HEADS,
    SIGMOID,
    SLIDING,
    SOFTMAX,
    TOP_K_THEN_SOFTMAX,
    Architecture,
    Tensors,
    experts_of,
    first_size,
    has_bias,
    head_dim_of,
    heads_of,
    mlp_types,
    rotated_part,
    routed_by,
    sigmoid_router,
    windows,
)

_CHUNK = 8192  # positions, which files do not name
_QK_NORM_UNLESS = 128  # experts: Llama 4 Maverick has none


def _llama4(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    if (window := meta.integer(".attention.sliding_window", _CHUNK)) != _CHUNK:
        raise meta.error(".attention.sliding_window", window, f"{_CHUNK}, or left away")
    routed_by(meta, SIGMOID)
    experts = experts_of(meta, tensors, "num_local_experts")
    return {
        "model_type": "llama4_text",
        "attention_bias": has_bias(tensors, "attn_q"),
        "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(meta.num_layers)],
        "interleave_moe_layer_step": meta.integer(".interleave_moe_layer_step"),
        "intermediate_size_mlp": meta.of_all_layers(".feed_forward_length", 0),
        "use_qk_norm": experts["num_local_experts"] != _QK_NORM_UNLESS,
        **{"attention_chunk_size": _CHUNK, "floor_scale": _CHUNK, "attn_scale": 0.1, "attn_temperature_tuning": True},
        **experts,
    }


def _mimo2_heads(meta: Metadata) -> dict[str, Any]:
    """Layers with windows have twice the keys."""
    kinds, counts = windows(meta, 6)["layer_types"], meta.by_layer(KV_HEADS)
    keys = next((count for count, kind in zip(counts, kinds, strict=True) if kind == FULL), 0)
    if counts != [keys * (2 if kind == SLIDING else 1) for kind in kinds]:
        raise meta.error(KV_HEADS, counts, "twice as large where layers have a window")
    head_dim = head_dim_of(meta)
    return {
        "num_attention_heads": heads_of(meta),
        "num_key_value_heads": keys,
        "head_dim": head_dim,
        "v_head_dim": meta.integer(".attention.value_length", head_dim),
        "partial_rotary_factor": rotated_part(meta, head_dim),
    }


def _mimo2(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    experts = experts_of(meta, tensors, "n_routed_experts", normalised=True)
    scale = meta.number(".attention.value_scale", 0.0)
    return {
        "model_type": "mimo_v2_flash",
        "attention_bias": has_bias(tensors, "attn_q"),
        "attention_value_scale": scale or None,
        "mlp_layer_types": mlp_types(meta, tensors),
        "moe_intermediate_size": experts.pop("intermediate_size"),
        **windows(meta, 6),
        **experts,
        **{**sigmoid_router(meta), "norm_topk_prob": True},
    }


def _mimo2_qkv(config: Config, rows: int) -> dict[str, int]:
    """Of a layer with as many keys as are left: their number is the layer's own."""
    queries, key, value = config["num_attention_heads"], config["head_dim"], config["v_head_dim"]
    groups = max(rows - queries * key, 0) // (key + value)
    sizes = {"q": queries * key, "k": groups * key, "v": groups * value}
    return {f"self_attn.{part}_proj.weight": size for part, size in sizes.items()}


def _mellum(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    routed_by(meta, SOFTMAX)
    experts = experts_of(meta, tensors, "num_experts", normalised=True)
    return {
        "model_type": "mellum",
        "attention_bias": has_bias(tensors, "attn_q"),
        "norm_topk_prob": True,
        "moe_intermediate_size": experts.pop("intermediate_size"),
        **windows(meta, 4),
        **experts,
    }


def _cohere2moe(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    rule = meta.integer(".expert_gating_func", 0) or SIGMOID
    if rule not in (SIGMOID, TOP_K_THEN_SOFTMAX):
        raise meta.error(".expert_gating_func", rule, f"{SIGMOID} (sigmoid) or {TOP_K_THEN_SOFTMAX}")
    shared = meta.integer(".expert_shared_count", 0)
    meta.get(".expert_shared_feed_forward_length")  # the tensors' shapes are checked
    return {
        "model_type": "cohere2_moe",
        "attention_bias": has_bias(tensors, "attn_q"),
        "mlp_layer_types": mlp_types(meta, tensors),
        "prefix_dense_intermediate_size": first_size(tensors, ".ffn_up.weight") or None,
        "prefix_dense_sliding_window_pattern": 1,  # dense layers rotate
        "expert_selection_fn": "sigmoid" if rule == SIGMOID else "softmax",
        "norm_topk_prob": meta.flag(".expert_weights_norm", False),
        "num_shared_experts": shared,
        "shared_expert_combination_strategy": "average",
        "logit_scale": meta.number(".logit_scale"),
        **windows(meta, 4),
        **experts_of(meta, tensors, "num_experts"),
    }


LAYER_TYPES: dict[str, Architecture] = {
    "llama4": Architecture(settings=_llama4),
    "mimo2": Architecture(
        settings=_mimo2,
        heads=_mimo2_heads,
        names={
            "attn_sinks.weight": "self_attn.sinks",
            "attn_qkv.weight": fused(_mimo2_qkv, *(f"self_attn.{part}_proj.weight" for part in "qkv")),
        },
    ),
    "mellum": Architecture(settings=_mellum),
    "cohere2moe": Architecture(
        settings=_cohere2moe,
        epsilons={
            ".attention.layer_norm_rms_epsilon": "rms_norm_eps",
            ".attention.layer_norm_epsilon": "layer_norm_eps",
        },
    ),
}
