"""GGUF architectures with shared experts, and routers with a selection bias."""

from __future__ import annotations

from typing import Any

from .gguf_metadata import Metadata
from .gguf_parts import fused
from .gguf_settings import (
    SIGMOID,
    SOFTMAX,
    Architecture,
    Tensors,
    experts_of,
    granite_scales,
    has_bias,
    mixture,
    mlp_types,
    rotations_wanted,
    routed_by,
    sigmoid_router,
    some_rotated,
    weights_scale,
    windows,
)


def _sigmoid(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    """DeepSeek's rule of routers and its dense layers in front."""
    return {
        "attention_bias": has_bias(tensors, "attn_q"),
        "first_k_dense_replace": meta.integer(".leading_dense_block_count", 0),
        **sigmoid_router(meta),
        **mixture(meta, tensors, "n_routed_experts", "n_shared_experts"),
    }


def _glm4moe(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    """GLM-4.5 and Solar Open."""
    return {
        "model_type": "glm4_moe",
        "use_qk_norm": any(name.endswith(".attn_q_norm.weight") for name in tensors),
        **_sigmoid(meta, tensors),
    }


def _dots1(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    full = ["full_attention"] * meta.num_layers
    return {"model_type": "dots1", "layer_types": full, **_sigmoid(meta, tensors)}


def _exaone(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    meta.integer(".attention.sliding_window")  # there in all files: layers without a window do not rotate
    return {
        "model_type": "exaone_moe",
        "first_k_dense_replace": meta.integer(".leading_dense_block_count", 0),
        **windows(meta, 4),
        **sigmoid_router(meta),
        **mixture(meta, tensors, "num_experts", "num_shared_experts"),
    }


def _ernie(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    routed_by(meta, SOFTMAX)
    found = mixture(meta, tensors, "moe_num_experts", "moe_num_shared_experts")
    return {
        "model_type": "ernie4_5_moe",
        "moe_k": found.pop("num_experts_per_tok"),
        "moe_layer_start_index": meta.integer(".leading_dense_block_count", 0),
        "moe_layer_interval": meta.integer(".interleave_moe_layer_step", 1) or 1,
        **found,
    }


def _hunyuan(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    routed_by(meta, SOFTMAX)
    found = mixture(meta, tensors, "num_experts", "num_shared_expert")
    return {
        "model_type": "hunyuan_v1_moe",
        "attention_bias": has_bias(tensors, "attn_q"),
        "moe_topk": found.pop("num_experts_per_tok"),
        "intermediate_size": found["moe_intermediate_size"],
        **found,
    }


def _hy_v3(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    routed_by(meta, SIGMOID)
    if not meta.flag(".expert_weights_norm", True):
        raise meta.error(".expert_weights_norm", False, "true")
    found = mixture(meta, tensors, "num_experts", "num_shared_experts")
    # Files have the width of all shared experts together, and not how many they are.
    width = meta.integer(".expert_shared_feed_forward_length", 0)
    if not found["num_shared_experts"] and width:
        found["num_shared_experts"], rest = divmod(width, found["moe_intermediate_size"] or 1)
        if rest:
            expected = f"a multiple of .expert_feed_forward_length={found['moe_intermediate_size']}"
            raise meta.error(".expert_shared_feed_forward_length", width, expected)
    return {
        "model_type": "hy_v3",
        "attention_bias": has_bias(tensors, "attn_q"),
        "mlp_bias": has_bias(tensors, "ffn_up"),
        "mlp_layer_types": mlp_types(meta, tensors),
        "router_scaling_factor": weights_scale(meta),
        **found,
    }


def _minimax(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    routed_by(meta, SIGMOID)
    found = some_rotated(meta)
    return {
        "model_type": "minimax_m2",
        "rotary_dim": int(found["head_dim"] * found["partial_rotary_factor"]),
        **experts_of(meta, tensors, "num_local_experts", normalised=True),
    }


def _granitemoe(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    """Granite's mixtures, with a shared expert or without."""
    rotations_wanted(meta)
    shared = meta.integer(".expert_shared_feed_forward_length", 0)
    family = {"model_type": "granitemoeshared", "shared_intermediate_size": shared}
    return {
        **(family if shared else {"model_type": "granitemoe"}),
        "attention_bias": has_bias(tensors, "attn_q"),
        **granite_scales(meta),
        **experts_of(meta, tensors, "num_local_experts", normalised=True),
    }


def _granite_swa(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    """With sinks and windows. Layers rotate by one base or not at all."""
    base, turns = meta.number(".rope.freq_base", 10000.0), [True] * meta.num_layers
    if meta.has(key := ".attention.rope_pattern"):
        turns = meta.array_of_layers(key)
    return {
        "model_type": "granitemoe_swa",
        "shared_intermediate_size": meta.integer(".expert_shared_feed_forward_length", 0),
        "attention_bias": has_bias(tensors, "attn_q"),
        "layer_rope_theta": [base if turn else 0.0 for turn in turns],
        **windows(meta, 4),
        **granite_scales(meta),
        **experts_of(meta, tensors, "num_local_experts", normalised=True),
    }


_SHARED_GATE_UP = ("shared_mlp.gate_proj.weight", "shared_mlp.up_proj.weight")
SHARED_EXPERTS: dict[str, Architecture] = {
    "granitemoe": Architecture(settings=_granitemoe, rotary_pairs=True),
    "granite_swa": Architecture(
        settings=_granite_swa,
        rotary_pairs=True,
        names={
            "attn_sinks.weight": "self_attn.sinks",
            "ffn_up_shexp.weight": fused(
                lambda config, rows: dict.fromkeys(_SHARED_GATE_UP, rows // 2), *_SHARED_GATE_UP
            ),
        },
    ),
    "glm4moe": Architecture(
        settings=_glm4moe,
        heads=some_rotated,
        names={"post_attention_norm.weight": "post_attention_layernorm.weight"},
    ),
    "dots1": Architecture(settings=_dots1),
    "exaone-moe": Architecture(settings=_exaone),
    "ernie4_5-moe": Architecture(settings=_ernie),
    "hunyuan-moe": Architecture(settings=_hunyuan),
    "hy_v3": Architecture(settings=_hy_v3, names={"exp_probs_b": "mlp.expert_bias"}),
    "minimax-m2": Architecture(settings=_minimax, heads=some_rotated),
}
