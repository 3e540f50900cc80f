"""Mixtures with shared experts that every token uses, dense layers in front, and routers with a selection bias."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...checkpoint.config_reader import ConfigReader
from ..family import ExpertNames, Family
from ..moe_spec import MoESpec
from .llama_like import LLAMA_LIKE
from .rules import ATTENTION_BIAS, every_layer, flag_of, router, window_by_layer_type

# Rules that the routers of these families compute, where a configuration spells them out.
_SIGMOID: dict[str, tuple[Any, ...]] = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}


def ffn_names(*modules: str) -> tuple[ExpertNames, ...]:
    """Gate, up and down projection below one of some modules."""
    return tuple(
        ExpertNames(**{part: f"{module}.{part}_proj.weight" for part in ("gate", "up", "down")}) for module in modules
    )


def with_shared(config: ConfigReader, layer: int, count_key: str) -> MoESpec:
    """A mixture beside shared experts of the same width, which run as one wide FFN."""
    size = config.integer("moe_intermediate_size")
    return MoESpec(
        router=router(config, layer), expert_size=size, shared_size=size * config.integer(count_key, most=1 << 16)
    )


def dense_first(config: ConfigReader, layer: int) -> MoESpec | None:
    """DeepSeek's rule: some dense layers, then mixtures."""
    mixture = with_shared(config, layer, "n_shared_experts")
    return None if layer < config.integer("first_k_dense_replace", 0) else mixture


def _hy_v3(config: ConfigReader, layer: int) -> MoESpec | None:
    kinds = config.get("mlp_layer_types")
    if kinds is None:
        dense = layer == 0
    elif isinstance(kinds, list) and len(kinds) == config.integer("num_hidden_layers"):
        if kinds[layer] not in ("dense", "sparse"):
            raise config.error("mlp_layer_types", kinds, "dense or sparse for every layer")
        dense = kinds[layer] == "dense"
    else:
        raise config.error("mlp_layer_types", kinds, "a list with an entry for every layer")
    return None if dense else with_shared(config, layer, "num_shared_experts")


def _granitemoeshared(config: ConfigReader, layer: int) -> MoESpec:
    return replace(every_layer(config, layer), shared_size=config.integer("shared_intermediate_size", 0))


_DEEPSEEK_LIKE = Family(
    moe=dense_first,
    qkv_bias=ATTENTION_BIAS,
    shared=ffn_names("mlp.shared_experts"),
    fixed=_SIGMOID,
    defaults={"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True},
)

SHARED_EXPERTS: dict[str, Family] = {
    "granitemoeshared": replace(
        LLAMA_LIKE["granitemoe"],
        moe=_granitemoeshared,
        shared=(ExpertNames(gate_up="shared_mlp.input_linear.weight", down="shared_mlp.output_linear.weight"),),
    ),
    "dots1": replace(
        _DEEPSEEK_LIKE,
        defaults={**_DEEPSEEK_LIKE.defaults, "norm_topk_prob": False, "max_window_layers": 62},
        o_bias=ATTENTION_BIAS,
        qk_norm="head",
        window=window_by_layer_type(lambda layer, last_full: layer >= last_full, switch=None),
    ),
    "solar_open": replace(
        _DEEPSEEK_LIKE,
        head_dim=128,
        kv_heads=8,
        theta=1e6,
        norm_eps=1e-5,
        defaults={**_DEEPSEEK_LIKE.defaults, "n_shared_experts": 1, "n_routed_experts": 128, "num_experts_per_tok": 8},
    ),
    "hy_v3": Family(
        head_dim=128,
        kv_heads=8,
        theta=11_158_840.0,
        norm_eps=1e-5,
        moe=_hy_v3,
        qkv_bias=ATTENTION_BIAS,
        o_bias=ATTENTION_BIAS,
        mlp_bias=flag_of("mlp_bias", False),
        qk_norm="head",
        defaults={"router_scaling_factor": 2.826, "num_shared_experts": 1, "num_experts": 192},
        # Adding up in float32 and rounding is what an addition of two 16-bit numbers does.
        ignored=frozenset({"enable_moe_fp32_combine"}),
        fixed={**_SIGMOID, "first_k_dense_replace": (1,)},
        shared=ffn_names("mlp.shared_mlp", "mlp.shared_experts"),
        router=("mlp.router.gate.weight", "mlp.gate.weight"),
        router_tensors={"selection_bias_E": ("mlp.expert_bias", "mlp.e_score_correction_bias")},
    ),
}
