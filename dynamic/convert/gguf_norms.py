"""GGUF architectures whose norms differ from Llama's: behind blocks as well, around 1, with means."""

from __future__ import annotations

from typing import Any

from .gguf_metadata import Metadata
from .gguf_parts import FUSED_GATE_UP, FUSED_QKV
from .gguf_settings import (
    FULL,
    KV_HEADS,
    SIGMOID,
    SLIDING,
    Architecture,
    Tensors,
    experts_of,
    has_bias,
    head_dim_of,
    heads_of,
    mixture,
    routed_by,
    some_rotated,
    weights_scale,
    windows,
)


def _caps(meta: Metadata, **defaults: float) -> dict[str, float | None]:
    """Of scores and logits, by what is taken where the file does not say; a cap of 0 is none."""
    return {
        f"{of}_logit_softcapping": meta.number(f".{of}_logit_softcapping", default) or None
        for of, default in defaults.items()
    }


def _width_of_scores(meta: Metadata, largest: int) -> int:
    """Whose root divides the scores: the largest model of a family takes other heads than it has."""
    hidden = meta.integer(".embedding_length")
    return hidden // heads_of(meta) if meta.num_layers == largest else head_dim_of(meta)


def _gemma(meta: Metadata, tensors: Tensors, period: int, window: int = 0) -> dict[str, Any]:
    return {
        "attention_bias": has_bias(tensors, "attn_q"),
        "hidden_activation": "gelu_pytorch_tanh",
        **windows(meta, period, window),
    }


def _gemma2(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    """The first files have neither caps nor a window, which are the same in all published models."""
    return {
        "model_type": "gemma2",
        "query_pre_attn_scalar": _width_of_scores(meta, 46),
        **_caps(meta, attn=50.0, final=30.0),
        **_gemma(meta, tensors, 2, 4096),
    }


def _gemma3(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    return {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": _width_of_scores(meta, 62),
        **_caps(meta, final=0.0),
        **_gemma(meta, tensors, 6),
    }


def _gemma4_heads(meta: Metadata) -> dict[str, Any]:
    """Layers that see all have heads of their own."""
    kinds, counts = windows(meta, 6)["layer_types"], meta.by_layer(KV_HEADS)
    sizes = {FULL: "", SLIDING: "_swa"}
    width: dict[str, int] = {}
    for kind, ending in sizes.items():
        width[kind] = meta.integer(f".attention.key_length{ending}")
        for key in (f".attention.value_length{ending}", f".rope.dimension_count{ending}"):
            if (value := meta.integer(key, width[kind])) != width[kind]:
                raise meta.error(key, value, f"the width of a head, {width[kind]}")
    entries = {
        str(layer): {"head_dim": width[FULL], "num_key_value_heads": count}
        for layer, (kind, count) in enumerate(zip(kinds, counts, strict=True))
        if kind == FULL
    }
    own = {count for count, kind in zip(counts, kinds, strict=True) if kind == SLIDING} or set(counts)
    if len(own) != 1:
        raise meta.error(KV_HEADS, counts, "the same in all layers with a window")
    return {
        "num_attention_heads": heads_of(meta),
        "num_key_value_heads": own.pop(),
        "head_dim": width[SLIDING],
        "per_layer_config": entries,
    }


def _gemma4(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    for key in (".embedding_length_per_layer_input", ".attention.shared_kv_layers"):
        if (value := meta.integer(key, 0)) != 0:
            raise meta.error(key, value, "0; nothing else is supported")
    full = [layer for layer, kind in enumerate(windows(meta, 6)["layer_types"]) if kind == FULL]
    without = [layer for layer in range(meta.num_layers) if f"blk.{layer}.attn_v.weight" not in tensors]
    if without not in ([], full):
        raise meta.error(".attention.sliding_window_pattern", without, "that of the layers without attn_v")
    experts: dict[str, Any] = {}
    if meta.integer(".expert_count", 0):
        experts = experts_of(meta, tensors, "num_experts", normalised=True)
        experts["moe_intermediate_size"] = experts.pop("intermediate_size")
        experts |= {"enable_moe_block": True, "top_k_experts": experts.pop("num_experts_per_tok")}
    return {
        "model_type": "gemma4_text",
        "attention_k_eq_v": bool(without),
        "hidden_size_per_layer_input": 0,
        **_caps(meta, final=0.0),
        **_gemma(meta, tensors, 6),
        **experts,
    }


def _olmo2(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    """Olmo 2, or with windows Olmo 3."""
    bias = {"attention_bias": has_bias(tensors, "attn_q")}
    found = windows(meta, 4)
    return {"model_type": "olmo3" if found["sliding_window"] else "olmo2", **bias, **found}


def _glm4(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    return {"model_type": "glm4", "attention_bias": has_bias(tensors, "attn_q")}


def _afmoe(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    routed_by(meta, SIGMOID)
    if not meta.flag(".expert_weights_norm", True):
        raise meta.error(".expert_weights_norm", False, "true")
    return {
        "model_type": "afmoe",
        "attention_bias": has_bias(tensors, "attn_q"),
        "mup_enabled": True,
        "num_dense_layers": meta.integer(".leading_dense_block_count", 0),
        "route_scale": weights_scale(meta),
        **windows(meta, 4),
        **mixture(meta, tensors, "num_experts", "num_shared_experts"),
    }


def _phimoe(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    original = meta.integer(".rope.scaling.original_context_length", 0) or meta.integer(".context_length")
    return {
        "model_type": "phimoe",
        "attention_bias": has_bias(tensors, "attn_q"),
        "lm_head_bias": "output.bias" in tensors,
        "original_max_position_embeddings": original,
        "sliding_window": meta.integer(".attention.sliding_window", 0) or None,
        **experts_of(meta, tensors, "num_local_experts", normalised=True),
    }


def _factor_of_both(meta: Metadata) -> dict[str, float]:
    """Files name one factor for short and long contexts."""
    factor = meta.number(".rope.scaling.attn_factor", 0.0) or 1.0
    return {"short_mscale": factor, "long_mscale": factor}


NORMS: dict[str, Architecture] = {
    "gemma2": Architecture(settings=_gemma2, norm_offset=1.0),
    "gemma3": Architecture(settings=_gemma3, norm_offset=1.0, window_theta=10000.0),
    "gemma4": Architecture(
        settings=_gemma4,
        heads=_gemma4_heads,
        window_theta=10000.0,
        names={
            "post_ffw_norm_1.weight": "post_feedforward_layernorm_1.weight",
            "pre_ffw_norm_2.weight": "pre_feedforward_layernorm_2.weight",
            "post_ffw_norm_2.weight": "post_feedforward_layernorm_2.weight",
            "layer_output_scale.weight": "layer_scalar",
            "ffn_gate_inp.scale": "router.scale",
            "ffn_down_exps.scale": "router.per_expert_scale",
        },
    ),
    "olmo2": Architecture(settings=_olmo2),
    "glm4": Architecture(settings=_glm4, heads=some_rotated, names={**FUSED_QKV, **FUSED_GATE_UP}),
    "afmoe": Architecture(settings=_afmoe, names={"attn_gate.weight": "self_attn.gate_proj.weight"}),
    "phimoe": Architecture(
        settings=_phimoe,
        others={"output_norm.bias": "model.norm.bias", "output.bias": "lm_head.bias"},
        scaling=_factor_of_both,
    ),
}
