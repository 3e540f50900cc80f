"""GGUF architectures with multi-head latent attention.

Newer files have the weights that make keys and values of a latent apart and by head, and name the sizes of heads under
keys of their own; older ones have them together, as Hugging Face does.
"""

from __future__ import annotations

from typing import Any

from .gguf_metadata import Metadata
from .gguf_settings import (
    KV_HEADS,
    SIGMOID,
    SOFTMAX,
    Architecture,
    Settings,
    Tensors,
    heads_of,
    mixture,
    sigmoid_router,
    weights_scale,
)

_ATTENTION = {
    **{"attn_q_a": "q_a_proj", "attn_q_a_norm": "q_a_layernorm", "attn_q_b": "q_b_proj"},
    **{"attn_kv_a_mqa": "kv_a_proj_with_mqa", "attn_kv_a_norm": "kv_a_layernorm"},
    **{"attn_kv_b": "kv_b_proj", "attn_k_b": "k_b_proj", "attn_v_b": "v_b_proj"},
}
KEYS_AND_VALUES = {f"{theirs}.weight": f"self_attn.{ours}.weight" for theirs, ours in _ATTENTION.items()}
_INDEXER = {"proj.weight": "weights_proj.weight", "attn_k.weight": "wk.weight", "attn_q_b.weight": "wq_b.weight"}
_INDEXER |= {name: name for name in ("k_norm.weight", "k_norm.bias")}
_INDEXED_NAMES = {
    **KEYS_AND_VALUES,
    **{f"indexer.{ours}": f"self_attn.indexer.{theirs}" for ours, theirs in _INDEXER.items()},
}
# What nothing runs quantised.
SMALL = ("attn_kv_b.weight", "attn_k_b.weight", "attn_v_b.weight")


def _deepseek2(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    """DeepSeek, Kimi-K2 and GLM-4.7-Flash."""
    # Files of GLM-4.7-Flash do not name the rule; only one of them has a bias.
    biased = any(name.endswith(".exp_probs_b.bias") for name in tensors)
    rule = meta.integer(".expert_gating_func", 0) or (SIGMOID if biased else SOFTMAX)
    if rule not in (SOFTMAX, SIGMOID):
        raise meta.error(".expert_gating_func", rule, f"{SOFTMAX} (softmax) or {SIGMOID} (sigmoid)")
    groups = {
        "n_group": meta.integer(".expert_group_count", 0) or 1,
        "topk_group": meta.integer(".expert_group_used_count", 0) or 1,
    }
    normalised = meta.flag(".expert_weights_norm", False)
    family: dict[str, Any] = {"model_type": "deepseek_v3", "norm_topk_prob": normalised}
    if rule == SOFTMAX:
        # A group counts as much as its best expert, which files do not say: llama.cpp takes the best two, as in V3.
        method = "group_limited_greedy" if groups["n_group"] > 1 else "greedy"
        family = {"model_type": "deepseek_v2", "topk_method": method}
        if normalised:
            raise meta.error(".expert_weights_norm", normalised, "false where scores are a softmax")
    return {**_latent(meta, tensors), **groups, **family}


def _latent(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    return {
        **mixture(meta, tensors, "n_routed_experts", "n_shared_experts"),
        "q_lora_rank": meta.integer(".attention.q_lora_rank", 0) or None,
        "first_k_dense_replace": meta.integer(".leading_dense_block_count", 0),
        "routed_scaling_factor": weights_scale(meta),
    }


def _indexed(family: str) -> Settings:
    """Attention whose indexer chooses positions where there are many."""

    def settings(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
        meta.get(".attention.indexer.types")  # which layers share an indexer matters only where it chooses
        return {
            "model_type": family,
            **_latent(meta, tensors),
            **sigmoid_router(meta),
            "index_topk": meta.integer(".attention.indexer.top_k"),
            "index_n_heads": meta.integer(".attention.indexer.head_count"),
            "index_head_dim": meta.integer(".attention.indexer.key_length"),
        }

    return settings


def latent_heads(meta: Metadata) -> dict[str, int]:
    """Sizes of heads."""
    heads, rank = heads_of(meta), meta.integer(".attention.kv_lora_rank")
    rotated = meta.integer(".rope.dimension_count")
    stored = {"key": meta.integer(".attention.key_length"), "value": meta.integer(".attention.value_length")}
    own, caches = dict(stored), stored
    if meta.has(".attention.key_length_mla"):  # the keys without it are sizes of the cache
        own = {part: meta.integer(f".attention.{part}_length_mla") for part in stored}
        # Files of Kimi Linear have a number of no meaning in place of that of the values.
        caches = {"key": rank + rotated} | ({} if meta.has(".kda.head_dim") else {"value": rank})
    for part, size in caches.items():
        if stored[part] != size:
            raise meta.error(f".attention.{part}_length", stored[part], str(size))
    if own["key"] <= rotated:
        raise meta.error(".attention.key_length", own["key"], f"more than .rope.dimension_count={rotated}")
    # Layers with states have none.
    if (groups := meta.of_all_layers(KV_HEADS, heads, zeros=True)) not in (1, heads):
        raise meta.error(KV_HEADS, groups, f"1 or {heads}")
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": rotated,
        "kv_lora_rank": rank,
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": own["key"] - rotated,
        "v_head_dim": own["value"],
    }


LATENT: dict[str, Architecture] = {
    "deepseek2": Architecture(settings=_deepseek2, heads=latent_heads, names=KEYS_AND_VALUES, latent=True),
    "deepseek32": Architecture(
        settings=_indexed("deepseek_v32"), heads=latent_heads, names=_INDEXED_NAMES, latent=True
    ),
    "glm-dsa": Architecture(settings=_indexed("glm_moe_dsa"), heads=latent_heads, names=_INDEXED_NAMES, latent=True),
}
