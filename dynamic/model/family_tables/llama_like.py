"""Llama and the families that differ from it in few places."""

from __future__ import annotations

from ...checkpoint.config_reader import ConfigReader
from ..family import ExpertNames, Family
from ..moe_spec import MoESpec
from .mixtures import ONE_EACH, every_layer, qwen_moe
from .rules import ATTENTION_BIAS, flag_of, positive_window, window_by_layer_type, window_everywhere

MIXTRAL_EXPERTS = (
    ExpertNames(
        gate="block_sparse_moe.experts.{e}.w1.weight",
        up="block_sparse_moe.experts.{e}.w3.weight",
        down="block_sparse_moe.experts.{e}.w2.weight",
    ),
    ExpertNames(gate_up="mlp.experts.gate_up_proj", down="mlp.experts.down_proj"),
)
GRANITE_EXPERTS = (
    ExpertNames(gate_up="block_sparse_moe.input_linear.weight", down="block_sparse_moe.output_linear.weight"),
    ExpertNames(gate_up="block_sparse_moe.experts.gate_up_proj", down="block_sparse_moe.experts.down_proj"),
    ONE_EACH,
)


def _qwen2_moe(config: ConfigReader, layer: int) -> MoESpec | None:
    moe = qwen_moe(config, layer)
    if moe is None:
        return None
    shared_size = config.integer("shared_expert_intermediate_size", 5632)
    return MoESpec(router=moe.router, expert_size=moe.expert_size, shared_size=shared_size, shared_gate=True)


def _qwen3_moe_window(config: ConfigReader, layer: int) -> int | None:
    if not config.flag("use_sliding_window", False):
        config.get("sliding_window")
        return None
    return positive_window(config, config.get("sliding_window", 4096))


def _granite_scales(config: ConfigReader) -> dict[str, float]:
    return {
        "embedding_scale": config.number("embedding_multiplier", 1.0),
        "residual_scale": config.number("residual_multiplier", 1.0),
        "logits_divisor": config.number("logits_scaling", 1.0),
    }


def _granite_attention(config: ConfigReader, layer: int) -> dict[str, float]:
    return {"scale": config.number("attention_multiplier", 1.0)}


def _olmoe_attention(config: ConfigReader, layer: int) -> dict[str, float]:
    return {} if config.get("clip_qkv") is None else {"clip": config.number("clip_qkv")}


_QWEN_WINDOW = window_by_layer_type(lambda layer, last_full: layer >= last_full)

LLAMA_LIKE: dict[str, Family] = {
    "llama": Family(qkv_bias=ATTENTION_BIAS, o_bias=ATTENTION_BIAS, mlp_bias=flag_of("mlp_bias", False)),
    "mistral": Family(kv_heads=8, window=window_everywhere(4096)),
    "qwen2": Family(
        window=_QWEN_WINDOW, qkv_bias=lambda config: True, ignored=frozenset({"attention_bias", "qkv_bias"})
    ),
    "qwen3": Family(head_dim=128, window=_QWEN_WINDOW, qkv_bias=ATTENTION_BIAS, o_bias=ATTENTION_BIAS, qk_norm="head"),
    "mixtral": Family(
        kv_heads=8,
        theta=1e6,
        norm_eps=1e-5,
        moe=every_layer,
        window=window_everywhere(None),
        experts=MIXTRAL_EXPERTS,
        router=("block_sparse_moe.gate.weight", "mlp.gate.weight"),
    ),
    "qwen2_moe": Family(
        moe=_qwen2_moe,
        window=window_by_layer_type(lambda layer, last_full: layer % 2 == 0 and layer < last_full),
        qkv_bias=flag_of("qkv_bias", True),
        ignored=frozenset({"attention_bias"}),
    ),
    "qwen3_moe": Family(
        kv_heads=4,
        moe=qwen_moe,
        window=_qwen3_moe_window,
        qkv_bias=ATTENTION_BIAS,
        o_bias=ATTENTION_BIAS,
        qk_norm="head",
    ),
    "olmoe": Family(
        norm_eps=1e-5,
        moe=every_layer,
        qkv_bias=ATTENTION_BIAS,
        o_bias=ATTENTION_BIAS,
        qk_norm="full",
        attention_parts=_olmoe_attention,
    ),
    "granite": Family(
        qkv_bias=ATTENTION_BIAS,
        o_bias=ATTENTION_BIAS,
        mlp_bias=flag_of("mlp_bias", False),
        scales=_granite_scales,
        attention_parts=_granite_attention,
    ),
    "granitemoe": Family(
        moe=every_layer,
        qkv_bias=ATTENTION_BIAS,
        o_bias=ATTENTION_BIAS,
        scales=_granite_scales,
        attention_parts=_granite_attention,
        experts=GRANITE_EXPERTS,
        router=("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"),
    ),
}
