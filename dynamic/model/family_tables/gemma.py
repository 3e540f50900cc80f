"""Gemma: norms with weights around 1 in front of and behind each block, scaled embeddings, capped scores and logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...checkpoint.config_reader import ConfigReader
from ..blocks import GEMMA4, GEMMA4_DENSE, SANDWICH
from ..family import ACTIVATIONS, ExpertNames, Family, blocks_of, norm_of
from ..moe_spec import MoESpec
from .attention_variants import extended
from .mixtures import ffn_names, router
from .rules import ATTENTION_BIAS, FULL, SLIDING, full_every, maybe_number, windows

_GEMMA_NORMS = {
    "attention": "input_layernorm",
    "attention_out": "post_attention_layernorm",
    "ffn": "pre_feedforward_layernorm",
    "ffn_out": "post_feedforward_layernorm",
}


def _activation(config: ConfigReader) -> str:
    return config.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh")


def _scaled(config: ConfigReader, logits_cap: float | None = None) -> dict[str, Any]:
    """Embeddings and logits.

    Arguments:
        logits_cap: default of ``final_logit_softcapping``.
    """
    return {
        "embedding_scale": config.integer("hidden_size") ** 0.5,
        "rounded_embedding_scale": True,
        "logits_cap": maybe_number(config, "final_logit_softcapping", logits_cap),
    }


def _scales(logits_cap: float | None = None) -> Callable[[ConfigReader], dict[str, Any]]:
    def rule(config: ConfigReader) -> dict[str, Any]:
        if config.flag("use_bidirectional_attention", False):
            raise config.error("use_bidirectional_attention", True, "false: rows see what is in front of them")
        return _scaled(config, logits_cap)

    return rule


def _score_scale(config: ConfigReader, layer: int) -> dict[str, Any]:
    width = config.number("query_pre_attn_scalar", 256)
    if width <= 0:
        raise config.error("query_pre_attn_scalar", width, "greater than 0")
    return {"scale": width**-0.5}


def _gemma4_layers(config: ConfigReader, layer: int) -> str:
    """The last layer always sees all."""
    kind = full_every(6)(config, layer)
    return FULL if layer + 1 == config.integer("num_hidden_layers") else kind


def _gemma4_attention(config: ConfigReader, layer: int) -> dict[str, Any]:
    """Layers that see all have heads of their own; older files say so for all of them together."""
    one_projection = config.flag("attention_k_eq_v", False)
    entries, full = config.get("per_layer_config"), _gemma4_layers(config, layer) == FULL
    width, heads = config.integer("global_head_dim", 512), config.get("num_global_key_value_heads")
    own: Any = {}
    if entries is not None:
        own = entries.get(str(layer), {}) if isinstance(entries, dict) else None
    elif full:
        own = {"head_dim": width, **({"num_key_value_heads": heads} if one_projection and heads is not None else {})}
    if not isinstance(own, dict):
        raise config.error("per_layer_config", entries, "an object for each layer that differs")
    reader = ConfigReader(own, f"config.json: per_layer_config: {layer}")
    parts: dict[str, Any] = {"scale": 1.0, "value_norm": True, "values_are_keys": one_projection and full}
    for key, field in (("head_dim", "head_dim"), ("num_key_value_heads", "num_kv_heads")):
        if key in own:
            parts[field] = reader.integer(key)
    reader.refuse_unread(frozenset())
    return parts


def _gemma4_moe(config: ConfigReader, layer: int) -> MoESpec | None:
    if not config.flag("enable_moe_block", False):
        return None
    size = config.integer("moe_intermediate_size")
    return MoESpec(router=router(config, layer), expert_size=size, shared_size=config.integer("intermediate_size"))


def _gemma4_scales(config: ConfigReader) -> dict[str, Any]:
    config.choice("use_bidirectional_attention", {"vision": "vision"}, "vision")  # which is no matter of text
    return _scaled(config)


_GEMMA: dict[str, Any] = {
    "kv_heads": 4,
    "head_dim": 256,
    "tie_embeddings": True,
    "activation": _activation,
    "norm": norm_of("rms_offset"),
    "blocks": blocks_of(SANDWICH),
    "norm_modules": _GEMMA_NORMS,
    "qkv_bias": ATTENTION_BIAS,
    "o_bias": ATTENTION_BIAS,
    # Published files have these beside those that count.
    "ignored": frozenset({"hidden_act", "cache_implementation"}),
}

_GEMMA3_LAYERS = full_every(6, "sliding_window_pattern")

GEMMA: dict[str, Family] = {
    "gemma2": Family(
        window=windows(full_every(2), 4096),
        scales=_scales(30.0),
        attention_parts=lambda config, layer: {
            **_score_scale(config, layer),
            "softcap": maybe_number(config, "attn_logit_softcapping", 50.0),
        },
        **_GEMMA,
    ),
    "gemma3_text": Family(
        qk_norm="head",
        window=windows(_GEMMA3_LAYERS, 4096),
        rope=_GEMMA3_LAYERS,
        thetas={FULL: ("rope_theta", 1e6), SLIDING: ("rope_local_base_freq", 1e4)},
        scales=_scales(),
        attention_parts=_score_scale,
        **_GEMMA,
    ),
    "gemma4_text": Family(
        **{
            **_GEMMA,
            "norm": norm_of("rms_float32"),
            # What only mixtures, embeddings for each layer, or layers without keys of their own look at.
            "ignored": _GEMMA["ignored"]
            | {"use_double_wide_mlp", "vocab_size_per_layer_input"}
            | {"top_k_experts", "moe_intermediate_size", "num_experts"},
            "blocks": lambda config, layer: GEMMA4 if config.flag("enable_moe_block", False) else GEMMA4_DENSE,
            "norm_modules": {
                **_GEMMA_NORMS,
                **{"shared_out": "post_feedforward_layernorm_1", "mixture": "pre_feedforward_layernorm_2"},
                **{"mixture_out": "post_feedforward_layernorm_2", "layer_scale": "layer_scalar"},
            },
        },
        attention=extended,
        attention_parts=_gemma4_attention,
        qk_norm="head",
        window=windows(_gemma4_layers, 512),
        rope=_gemma4_layers,
        thetas={FULL: ("", 1e6), SLIDING: ("", 1e4)},
        default_rope={
            FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        },
        scales=_gemma4_scales,
        moe=_gemma4_moe,
        shared=ffn_names("mlp"),
        experts=(
            ExpertNames(gate_up="experts.gate_up_proj", down="experts.down_proj"),
            *ffn_names("experts.{e}"),  # as GGUF files' experts become
        ),
        router=("router.proj.weight",),
        router_tensors={"router_norm_D": ("router.scale",), "expert_scale_E": ("router.per_expert_scale",)},
        defaults={"hidden_size_per_layer_input": 256},
        # Embeddings for each layer, layers without keys of their own, and their wider FFNs are not supported.
        fixed={"hidden_size_per_layer_input": (0,), "num_kv_shared_layers": (0,)},
    ),
}
