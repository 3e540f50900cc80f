"""Families with layer norms."""

from __future__ import annotations

from ...checkpoint.config_reader import ConfigReader
from ..family import Family, norm_of
from ..moe_spec import MoESpec
from .llama_like import MIXTRAL_EXPERTS
from .rules import ATTENTION_BIAS, every_layer, window_everywhere


def _phimoe(config: ConfigReader, layer: int) -> MoESpec:
    if (top_k := config.integer("num_experts_per_tok", 2)) != 2:
        raise config.error("num_experts_per_tok", top_k, "2, as its router chooses one expert and then another")
    return every_layer(config, layer)


LAYER_NORMS: dict[str, Family] = {
    "phimoe": Family(
        kv_heads=8,
        theta=1e6,
        norm_eps=1e-5,
        norm=norm_of("layer_bias"),
        moe=_phimoe,
        window=window_everywhere(None),
        qkv_bias=ATTENTION_BIAS,
        o_bias=ATTENTION_BIAS,
        scales=lambda config: {"lm_head_bias": config.flag("lm_head_bias", False)},
        experts=MIXTRAL_EXPERTS,
        router=("block_sparse_moe.gate.weight", "mlp.router.weight"),
        ignored=frozenset({"input_jitter_noise"}),  # training adds it
    ),
}
