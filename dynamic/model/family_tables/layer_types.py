"""Mixtures whose layers differ in windows, rotations and heads."""

from __future__ import annotations

from typing import Any

from ...checkpoint.config_reader import ConfigReader
from ..attention.extended import QueryGrowth
from ..family import ExpertNames, Family
from ..moe_spec import MoESpec
from .attention_variants import extended, rope_by_flags
from .mixtures import DEEPSEEK_RULES, SIGMOID, ffn_names, mlp_type, router
from .rules import ATTENTION_BIAS, FULL, SLIDING, layer_type, positive_window

CHUNKED = "chunked_attention"


def _mimo_kind(config: ConfigReader, layer: int) -> str:
    return layer_type(config, layer, FULL if layer == 0 or (layer + 1) % 6 == 0 else SLIDING)


def _mimo_moe(config: ConfigReader, layer: int) -> MoESpec | None:
    mixture = MoESpec(router=router(config, layer), expert_size=config.integer("moe_intermediate_size"))
    return mixture if mlp_type(config, layer, "sparse" if layer else "dense") == "sparse" else None


def _mimo_window(config: ConfigReader, layer: int) -> int | None:
    """The published size counts the positions before a row's own."""
    size = config.get("sliding_window", 129)
    if config.get("sliding_window_size") is not None:
        size = config.integer("sliding_window_size") + 1
    return positive_window(config, size) if _mimo_kind(config, layer) == SLIDING else None


def _mimo_parts(config: ConfigReader, layer: int) -> dict[str, Any]:
    """Layers with windows have twice the keys, and sinks. The published configuration says so in words of its own."""
    slides, sparse = _mimo_kind(config, layer) == SLIDING, _mimo_moe(config, layer) is not None
    keys, values = config.integer("num_key_value_heads", 4), config.integer("v_head_dim", 128)
    _agree(config, "swa_num_key_value_heads", 2 * keys)
    _agree(config, "swa_num_attention_heads", config.integer("num_attention_heads"))
    _agree(config, "swa_head_dim", config.integer("head_dim", 192))
    _agree(config, "swa_v_head_dim", values)
    for key, wanted in (("hybrid_layer_pattern", slides), ("moe_layer_freq", sparse)):
        if (found := config.integers(key)) and found[layer : layer + 1] != (int(wanted),):
            raise config.error(key, list(found), f"{int(wanted)} for layer {layer}, as its type says")
    scale = config.values.get("attention_value_scale", 0.707)
    return {
        "num_kv_heads": keys * (2 if slides else 1),
        "values": values,
        "value_scale": 1.0 if scale is None else config.number("attention_value_scale", 0.707),
        "sinks": slides,
    }


def _agree(config: ConfigReader, key: str, value: int) -> None:
    if config.integer(key, value) != value:
        raise config.error(key, config.get(key), str(value))


_LLAMA4_ROPE = rope_by_flags(4)


def _llama4_kind(config: ConfigReader, layer: int) -> str:
    return layer_type(config, layer, FULL if _LLAMA4_ROPE(config, layer) is None else CHUNKED, (FULL, CHUNKED))


def _llama4_moe(config: ConfigReader, layer: int) -> MoESpec | None:
    step, listed = config.integer("interleave_moe_layer_step", 1), config.integers("moe_layers")
    size = config.integer("intermediate_size")
    mixture = MoESpec(router=router(config, layer), expert_size=size, shared_size=size)
    if config.get("moe_layers") is not None:
        return mixture if layer in listed else None
    if step < 1:
        raise config.error("interleave_moe_layer_step", step, "at least 1")
    return None if (layer + 1) % step else mixture


def _llama4_parts(config: ConfigReader, layer: int) -> dict[str, Any]:
    """Layers that rotate norm their queries and keys; in the others queries grow with their position."""
    rotates = _LLAMA4_ROPE(config, layer) is not None
    growth = QueryGrowth(rate=config.number("attn_scale", 0.1), period=config.integer("floor_scale", 8192), offset=1)
    tuned = config.get("attn_temperature_tuning", True)
    if not isinstance(tuned, bool | int):
        raise config.error("attn_temperature_tuning", tuned, "true or false")
    chunk = config.integer("attention_chunk_size", 8192)
    return {
        "unit_norm": config.flag("use_qk_norm", True) and rotates,
        "growth": growth if tuned and not rotates else None,
        "chunk": chunk if _llama4_kind(config, layer) == CHUNKED else None,
    }


LAYER_TYPES: dict[str, Family] = {
    "mimo_v2_flash": Family(
        qkv_bias=ATTENTION_BIAS,
        fixed={
            **{**SIGMOID, "add_full_attention_sink_bias": (False,), "add_swa_attention_sink_bias": (True,)},
            "layernorm_epsilon": (1e-5,),
        },
        ignored=frozenset({"attention_chunk_size"}),
        mtp={
            **{"layer_types": SLIDING, "mlp_layer_types": "dense"},
            **{"hybrid_layer_pattern": None, "moe_layer_freq": None},
        },
        head_dim=192,
        norm_eps=1e-5,
        rope=_mimo_kind,
        thetas={FULL: ("rope_theta", 5e6), SLIDING: ("swa_rope_theta", 1e4)},
        partial_rotary=lambda config: 0.334,
        window=_mimo_window,
        moe=_mimo_moe,
        attention=extended,
        attention_parts=_mimo_parts,
        defaults={**DEEPSEEK_RULES, "num_experts_per_tok": 8, "moe_intermediate_size": 2048},
    ),
    "llama4_text": Family(
        kv_heads=8,
        head_dim=128,
        theta=5e5,
        norm_eps=1e-5,
        rope=_LLAMA4_ROPE,
        rope_interleaved=True,
        moe=_llama4_moe,
        qkv_bias=ATTENTION_BIAS,
        o_bias=ATTENTION_BIAS,
        attention=extended,
        attention_parts=_llama4_parts,
        defaults={"num_local_experts": 16, "num_experts_per_tok": 1, "intermediate_size_mlp": 16384},
        # Dense layers read the first.
        ignored=frozenset({"intermediate_size_mlp", "for_llm_compressor", "cache_implementation"}),
        dense_size=lambda config: config.integer("intermediate_size_mlp"),
        dense=ffn_names("feed_forward"),
        experts=(
            *ffn_names("feed_forward.experts.{e}"),
            ExpertNames(
                gate_up="feed_forward.experts.gate_up_proj", down="feed_forward.experts.down_proj", transposed=True
            ),
        ),
        shared=ffn_names("feed_forward.shared_expert"),
        router=("feed_forward.router.weight",),
    ),
}
