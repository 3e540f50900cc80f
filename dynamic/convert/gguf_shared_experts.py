"""GGUF architectures with shared experts: what their metadata say as a ``config.json``."""

from __future__ import annotations

from typing import Any

from .gguf_metadata import Metadata
from .gguf_settings import SIGMOID, SOFTMAX, Architecture, Tensors, experts_of, has_bias, head_dim_of

_GRANITE_SCALES = {
    "embedding_multiplier": ".embedding_scale",
    "residual_multiplier": ".residual_scale",
    "logits_scaling": ".logit_scale",
}


def shared_names(module: str, selection_bias: str = "mlp.gate.e_score_correction_bias") -> dict[str, str]:
    """Tensors of shared experts and of a selection bias."""
    names = {f"ffn_{part}_shexp.weight": f"{module}.{part}_proj.weight" for part in ("gate", "up", "down")}
    return {**names, "exp_probs_b.bias": selection_bias}


def _rule(meta: Metadata, wanted: int) -> None:
    if (rule := meta.integer(".expert_gating_func", wanted)) not in (0, wanted):
        raise meta.error(".expert_gating_func", rule, f"{wanted}, or left away")


def _mixture(meta: Metadata, tensors: Tensors, count_key: str, shared_key: str) -> dict[str, Any]:
    """Experts of a width of their own, and shared ones of the same width."""
    experts = experts_of(meta, tensors, count_key)
    size, shared = experts.pop("intermediate_size"), meta.integer(".expert_shared_count", 0)
    # Some converters write another number here; the tensors' shapes are checked.
    meta.get(".expert_shared_feed_forward_length")
    return {**experts, "moe_intermediate_size": size, shared_key: shared}


def _sigmoid(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    """DeepSeek's rule of routers and its dense layers in front."""
    _rule(meta, SIGMOID)
    return {
        "attention_bias": has_bias(tensors, "attn_q"),
        "first_k_dense_replace": meta.integer(".leading_dense_block_count", 0),
        "routed_scaling_factor": meta.number(".expert_weights_scale", 0.0) or 1.0,
        "norm_topk_prob": meta.flag(".expert_weights_norm", False),
        "n_group": meta.integer(".expert_group_count", 0) or 1,
        "topk_group": meta.integer(".expert_group_used_count", 0) or 1,
        **_mixture(meta, tensors, "n_routed_experts", "n_shared_experts"),
    }


def _glm4moe(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    head_dim = head_dim_of(meta)
    return {
        "model_type": "glm4_moe",
        "use_qk_norm": any(name.endswith(".attn_q_norm.weight") for name in tensors),
        "partial_rotary_factor": meta.integer(".rope.dimension_count", head_dim) / head_dim,
        **_sigmoid(meta, tensors),
    }


def _dots1(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    full = ["full_attention"] * meta.integer(".block_count")
    return {"model_type": "dots1", "layer_types": full, **_sigmoid(meta, tensors)}


def _ernie(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    _rule(meta, SOFTMAX)
    mixture = _mixture(meta, tensors, "moe_num_experts", "moe_num_shared_experts")
    return {
        "model_type": "ernie4_5_moe",
        "moe_k": mixture.pop("num_experts_per_tok"),
        "moe_layer_start_index": meta.integer(".leading_dense_block_count", 0),
        "moe_layer_interval": meta.integer(".interleave_moe_layer_step", 1) or 1,
        **mixture,
    }


def _hunyuan(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    _rule(meta, SOFTMAX)
    mixture = _mixture(meta, tensors, "num_experts", "num_shared_expert")
    return {
        "model_type": "hunyuan_v1_moe",
        "attention_bias": has_bias(tensors, "attn_q"),
        "moe_topk": mixture.pop("num_experts_per_tok"),
        "intermediate_size": mixture["moe_intermediate_size"],
        **mixture,
    }


def _granitemoe(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    """Granite's mixtures, with a shared expert or without."""
    shared = meta.integer(".expert_shared_feed_forward_length", 0)
    family = {"model_type": "granitemoeshared", "shared_intermediate_size": shared}
    return {
        **(family if shared else {"model_type": "granitemoe"}),
        "attention_bias": has_bias(tensors, "attn_q"),
        # 0 is a scale that is not there.
        "attention_multiplier": meta.number(".attention.scale", 0.0) or head_dim_of(meta) ** -0.5,
        **{ours: value for ours, theirs in _GRANITE_SCALES.items() if (value := meta.number(theirs, 0.0))},
        **experts_of(meta, tensors, "num_local_experts", normalised=True),
    }


SHARED_EXPERTS: dict[str, Architecture] = {
    "granitemoe": Architecture(
        settings=_granitemoe,
        rotary_pairs=True,
        names={**shared_names("shared_mlp"), "ffn_down_shexp.weight": "shared_mlp.output_linear.weight"},
    ),
    "glm4moe": Architecture(
        settings=_glm4moe,
        partial_rotary=True,
        further_tokens=True,
        names={
            **shared_names("mlp.shared_experts"),
            "post_attention_norm.weight": "post_attention_layernorm.weight",
        },
    ),
    "dots1": Architecture(settings=_dots1, names=shared_names("mlp.shared_experts")),
    "ernie4_5-moe": Architecture(
        settings=_ernie, names=shared_names("mlp.shared_experts", "mlp.moe_statics.e_score_correction_bias")
    ),
    "hunyuan-moe": Architecture(settings=_hunyuan, names=shared_names("mlp.shared_mlp")),
}
