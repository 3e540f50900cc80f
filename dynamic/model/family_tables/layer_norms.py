"""Families with layer norms."""

from __future__ import annotations

from dataclasses import replace

from ...checkpoint.config_reader import ConfigReader
from ..blocks import PARALLEL
from ..family import Family, blocks_of, norm_of
from ..moe_spec import MoESpec
from .llama_like import MIXTRAL_EXPERTS
from .mixtures import every_layer, ffn_names, mlp_type
from .rules import ATTENTION_BIAS, FULL, SLIDING, layer_type, window_everywhere, windows


def _phimoe(config: ConfigReader, layer: int) -> MoESpec:
    if (top_k := config.integer("num_experts_per_tok", 2)) != 2:
        raise config.error("num_experts_per_tok", top_k, "2, as its router chooses one expert and then another")
    return every_layer(config, layer)


def _is_dense(config: ConfigReader, layer: int) -> bool:
    dense_first = config.integer("first_k_dense_replace", 0)
    return mlp_type(config, layer, "dense" if layer < dense_first else "sparse") == "dense"


def _cohere_layers(config: ConfigReader, layer: int) -> str:
    """What a layer sees: of every so many layers the last sees all, dense layers in front counting for themselves."""
    first = config.integer("first_k_dense_replace", 0)
    prefix, every = (config.integer(f"{name}sliding_window_pattern", default) for name, default in _PATTERNS.items())
    if not every or not prefix:
        raise config.error("sliding_window_pattern", 0, "at least 1")
    number, pattern = (layer, prefix) if layer < first else (layer - first, every)
    return layer_type(config, layer, SLIDING if (number + 1) % pattern else FULL)


def _cohere_rope(config: ConfigReader, layer: int) -> str | None:
    """Layers with a window rotate, and dense ones where all of them see everything."""
    forced = _is_dense(config, layer) and config.integer("prefix_dense_sliding_window_pattern", 1) == 1
    return "" if forced or _cohere_layers(config, layer) == SLIDING else None


def _cohere2_moe(config: ConfigReader, layer: int) -> MoESpec | None:
    mixture, count = every_layer(config, layer), config.integer("num_shared_experts", 0, most=1 << 16)
    together = config.choice("shared_expert_combination_strategy", {"average": "average", "sum": "sum"}, "average")
    config.get("prefix_dense_intermediate_size")
    if _is_dense(config, layer):
        return None
    if not count:
        return mixture
    share = 0.5 if together == "average" else 1.0
    router = replace(mixture.router, scale=share)
    return replace(mixture, router=router, shared_size=mixture.expert_size * count, shared_scale=share)


def _cohere_size(config: ConfigReader) -> int:
    """Of the dense layers in front, where these have a size of their own."""
    own = "prefix_dense_intermediate_size"
    return config.integer("intermediate_size" if config.get(own) is None else own)


def _cohere_norm(config: ConfigReader, default: float) -> tuple[str, float]:
    eps = config.number("layer_norm_eps", default)
    return ("layer", eps) if config.get("rms_norm_eps") is None else ("rms", config.number("rms_norm_eps"))


def _cohere_scales(config: ConfigReader) -> dict[str, float]:
    if (scale := config.number("logit_scale", 0.0625)) <= 0:
        raise config.error("logit_scale", scale, "greater than 0")
    return {"logits_divisor": 1 / scale}


_PATTERNS = {"prefix_dense_": 1, "": 4}

LAYER_NORMS: dict[str, Family] = {
    "phimoe": Family(
        kv_heads=8,
        theta=1e6,
        norm_eps=1e-5,
        norm=norm_of("layer_bias"),
        rope_keys=frozenset({"short_mscale", "long_mscale"}),
        moe=_phimoe,
        window=window_everywhere(None),
        qkv_bias=ATTENTION_BIAS,
        o_bias=ATTENTION_BIAS,
        scales=lambda config: {"lm_head_bias": config.flag("lm_head_bias", False)},
        experts=MIXTRAL_EXPERTS,
        router=("block_sparse_moe.gate.weight", "mlp.router.weight"),
        ignored=frozenset({"input_jitter_noise"}),  # training adds it
    ),
    "cohere2_moe": Family(
        head_dim=128,
        norm_eps=1e-5,
        tie_embeddings=True,
        norm=_cohere_norm,
        blocks=blocks_of(PARALLEL),
        moe=_cohere2_moe,
        window=windows(_cohere_layers, 4096),
        rope=_cohere_rope,
        rope_interleaved=True,
        qkv_bias=ATTENTION_BIAS,
        o_bias=ATTENTION_BIAS,
        scales=_cohere_scales,
        shared=ffn_names("mlp.shared_experts"),
        defaults={"num_experts": 8, "num_experts_per_tok": 2},
        dense_size=_cohere_size,
    ),
}
