"""Families whose layers differ in how they see positions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ...checkpoint.config_reader import ConfigReader
from ...checkpoint.fused import gate_and_up, rows_of
from ...checkpoint.weights import Piece, TensorInfo
from ..attention.extended import ExtendedGqaSpec, QueryGrowth
from ..blocks import SANDWICH
from ..family import Family, blocks_of
from ..rope_config import rope_values
from .rules import ATTENTION_BIAS, FULL, SLIDING, flag_of, layer_type, positive_window, window_everywhere


def rope_by_flags(interval: int) -> Callable[[ConfigReader, int], str | None]:
    """``no_rope_layers`` has a 1 for each layer that rotates; without it one in ``no_rope_layer_interval`` does not."""

    def rule(config: ConfigReader, layer: int) -> str | None:
        flags, step = config.integers("no_rope_layers"), config.integer("no_rope_layer_interval", interval)
        if not flags:
            if step < 1:
                raise config.error("no_rope_layer_interval", step, "at least 1")
            return "" if (layer + 1) % step else None
        if len(flags) < config.integer("num_hidden_layers"):
            raise config.error("no_rope_layers", list(flags), "a list with a number for every layer")
        return "" if flags[layer] else None

    return rule


_EMBEDDING = "model.embed_tokens.weight"
HUNYUAN_ROPE = frozenset({"alpha"})
_SMOLLM3_ROPE = rope_by_flags(4)


def _smollm3_window(config: ConfigReader, layer: int) -> int | None:
    """Layers that do not rotate have windows, where the model has any."""
    size, enabled = config.get("sliding_window"), config.flag("use_sliding_window", False)
    slides = enabled and size is not None and _SMOLLM3_ROPE(config, layer) is None
    if layer_type(config, layer, SLIDING if slides else FULL) == FULL:
        return None
    if not enabled or size is None:
        raise config.error("layer_types", SLIDING, f"{FULL} or, with use_sliding_window, {SLIDING}")
    return positive_window(config, size)


def extended(config: ConfigReader, layer: int) -> str:
    """The kind of attention whose ``attention_parts`` are those of :class:`.ExtendedGqaSpec`."""
    return ExtendedGqaSpec.kind


def _divide_fused(tensors: Mapping[str, TensorInfo]) -> dict[str, Piece]:
    """Queries, keys and values; gate and up."""
    hidden = tensors[_EMBEDDING].shape[-1] if _EMBEDDING in tensors else 0
    pieces = gate_and_up(tensors, r"(.*\.mlp\.)gate_up_proj")
    for name in tensors:
        if match := re.fullmatch(r"(.*\.self_attn\.)qkv_proj\.(?:weight|weight_packed)", name):
            keys = (tensors[name].shape[0] - hidden) // 2
            parts = {"q_proj": hidden, "k_proj": keys, "v_proj": keys}
            pieces |= rows_of(tensors, name, {match[1] + part: size for part, size in parts.items()})
    return pieces


def norms_behind_rotation(config: ConfigReader, layer: int) -> dict[str, Any]:
    return {"norm_after_rotation": True}


def _ministral3_growth(config: ConfigReader, layer: int) -> dict[str, Any]:
    rope = rope_values(config, MINISTRAL3, "")
    period = rope.integer("original_max_position_embeddings", config.integer("max_position_embeddings"))
    return {"growth": QueryGrowth(rate=rope.number("llama_4_scaling_beta"), period=period)}


MINISTRAL3 = Family(
    kv_heads=8,
    head_dim=128,
    norm_eps=1e-5,
    default_rope={
        **{"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384},
        **{"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
    },
    rope_keys=frozenset({"llama_4_scaling_beta", "max_position_embeddings"}),
    window=window_everywhere(None),
    attention=extended,
    attention_parts=_ministral3_growth,
)
_GLM = Family(
    kv_heads=2,
    head_dim=128,
    norm_eps=1.5625e-7,
    rope_interleaved=True,
    partial_rotary=lambda config: 0.5,
    qkv_bias=flag_of("attention_bias", True),
    divide=_divide_fused,
)
ATTENTION_VARIANTS: dict[str, Family] = {
    "glm": _GLM,
    "glm4": replace(
        _GLM,
        blocks=blocks_of(SANDWICH),
        norm_modules={
            **{"attention": "input_layernorm", "attention_out": "post_self_attn_layernorm"},
            **{"ffn": "post_attention_layernorm", "ffn_out": "post_mlp_layernorm"},
        },
    ),
    "ministral3": MINISTRAL3,
    "phi3": Family(
        norm_eps=1e-5,
        partial_rotary=lambda config: 1.0,
        rope_types={"su": "longrope", "yarn": "longrope"},
        defaults={"original_max_position_embeddings": 4096},
        window=window_everywhere(None),
        divide=_divide_fused,
    ),
    "hunyuan_v1_dense": Family(
        norm_eps=1e-5,
        rope_keys=HUNYUAN_ROPE,
        qkv_bias=ATTENTION_BIAS,
        o_bias=ATTENTION_BIAS,
        qk_norm="head",
        attention=extended,
        attention_parts=norms_behind_rotation,
        ignored=frozenset({"eod_token_id"}),
    ),
    "smollm3": Family(
        kv_heads=4,
        theta=2e6,
        rope=_SMOLLM3_ROPE,
        window=_smollm3_window,
        qkv_bias=ATTENTION_BIAS,
        o_bias=ATTENTION_BIAS,
        mlp_bias=flag_of("mlp_bias", False),
        tie_embeddings=True,
    ),
}
