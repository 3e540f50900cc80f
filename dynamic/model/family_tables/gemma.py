"""Gemma: norms with weights around 1 in front of and behind each block, scaled embeddings, capped scores and logits."""

from __future__ import annotations

from typing import Any

from ...checkpoint.config_reader import ConfigReader
from ..blocks import SANDWICH
from ..family import ACTIVATIONS, Family, norm_of
from .rules import ATTENTION_BIAS, FULL, SLIDING, full_every, maybe_number, windows

GEMMA_NORMS = {
    "attention": "input_layernorm",
    "attention_out": "post_attention_layernorm",
    "ffn": "pre_feedforward_layernorm",
    "ffn_out": "post_feedforward_layernorm",
}


def activation(config: ConfigReader) -> str:
    return config.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh")


def scales(config: ConfigReader, logits_cap: float | None = None) -> dict[str, Any]:
    """Embeddings and logits.

    Arguments:
        logits_cap: default of ``final_logit_softcapping``.
    """
    if config.flag("use_bidirectional_attention", False):
        raise config.error("use_bidirectional_attention", True, "false: rows see what is in front of them")
    return {
        "embedding_scale": config.integer("hidden_size") ** 0.5,
        "rounded_embedding_scale": True,
        "logits_cap": maybe_number(config, "final_logit_softcapping", logits_cap),
    }


def score_scale(config: ConfigReader) -> dict[str, Any]:
    width = config.number("query_pre_attn_scalar", 256)
    if width <= 0:
        raise config.error("query_pre_attn_scalar", width, "greater than 0")
    return {"scale": width**-0.5}


_GEMMA: dict[str, Any] = {
    "kv_heads": 4,
    "head_dim": 256,
    "tie_embeddings": True,
    "activation": activation,
    "norm": norm_of("rms_offset"),
    "blocks": SANDWICH,
    "norm_modules": GEMMA_NORMS,
    "qkv_bias": ATTENTION_BIAS,
    "o_bias": ATTENTION_BIAS,
    # Published files have these beside those that count.
    "ignored": frozenset({"hidden_act", "cache_implementation"}),
}

_GEMMA3_LAYERS = full_every(6, "sliding_window_pattern")

GEMMA: dict[str, Family] = {
    "gemma2": Family(
        window=windows(full_every(2), 4096),
        scales=lambda config: scales(config, 30.0),
        attention_numbers=lambda config: {
            **score_scale(config),
            "softcap": maybe_number(config, "attn_logit_softcapping", 50.0),
        },
        **_GEMMA,
    ),
    "gemma3_text": Family(
        qk_norm="head",
        window=windows(_GEMMA3_LAYERS, 4096),
        rope=_GEMMA3_LAYERS,
        thetas={FULL: ("rope_theta", 1e6), SLIDING: ("rope_local_base_freq", 1e4)},
        scales=scales,
        attention_numbers=score_scale,
        **_GEMMA,
    ),
}
