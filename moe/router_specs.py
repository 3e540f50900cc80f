"""Which routing rule a model family uses: transformers' ``model_type`` and config → :class:`RouterSpec`.

Every entry is tested against that family's own router in ``tests/test_routers.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..kernels.api.router_spec import RouterSpec


class _Config:
    """Reads a transformers config object or the mapping in a ``config.json`` by the first name that it has."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __call__(self, *names: str, default: Any = ...) -> Any:
        for name in names:
            value = self._config.get(name) if isinstance(self._config, Mapping) else getattr(self._config, name, None)
            if value is not None:
                return value
        if default is ...:
            raise ValueError(f"config of model_type {self('model_type', default='?')!r} lacks {' / '.join(names)}")
        return default

    def as_mapping(self) -> dict[str, Any]:
        return dict(self._config) if isinstance(self._config, Mapping) else self._config.to_dict()

    def nested(self, name: str) -> _Config:
        return _Config(self(name))


_Rule = Callable[[_Config, int], RouterSpec]


def _experts(c: _Config) -> int:
    return c("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def _softmax(renormalize: bool, *, flag: bool = False) -> _Rule:
    """Softmax over all experts; with ``flag``, ``norm_topk_prob`` of the config comes before ``renormalize``."""

    def rule(c: _Config, layer: int) -> RouterSpec:
        wanted = c("norm_topk_prob", default=renormalize) if flag else renormalize
        return RouterSpec(num_experts=_experts(c), top_k=c("num_experts_per_tok"), renormalize=wanted)

    return rule


def _topk_softmax(c: _Config, layer: int) -> RouterSpec:
    return RouterSpec(num_experts=_experts(c), top_k=c("num_experts_per_tok", "moe_topk"), softmax_after_topk=True)


def _hunyuan(c: _Config, layer: int) -> RouterSpec:
    num_experts, top_k = c("num_experts"), c("moe_topk")
    return RouterSpec(
        num_experts=num_experts if isinstance(num_experts, int) else num_experts[layer],
        top_k=top_k if isinstance(top_k, int) else top_k[layer],
        renormalize=True,
        float32_logits=True,
    )


def _dbrx(c: _Config, layer: int) -> RouterSpec:
    ffn = c.nested("ffn_config")
    # A config that spells the norm as null switches it off, so a missing key must be told apart from null.
    raw = ffn._config
    p = raw.get("moe_normalize_expert_weights", 1.0) if isinstance(raw, Mapping) else raw.moe_normalize_expert_weights
    return RouterSpec(
        num_experts=ffn("moe_num_experts"), top_k=ffn("moe_top_k"), renormalize=p is not None, norm_p=p or 1.0
    )


def _deepseek_v2(c: _Config, layer: int) -> RouterSpec:
    grouped = c("topk_method", default="greedy") == "group_limited_greedy"
    return RouterSpec(
        num_experts=_experts(c),
        top_k=c("num_experts_per_tok"),
        scale=c("routed_scaling_factor", default=1.0),
        num_groups=c("n_group") if grouped else 1,
        top_groups=c("topk_group") if grouped else 1,
        float32_logits=True,
    )


def _deepseek_v3(c: _Config, layer: int) -> RouterSpec:
    return RouterSpec(
        num_experts=_experts(c),
        top_k=c("num_experts_per_tok"),
        score="sigmoid",
        renormalize=c("norm_topk_prob"),
        norm_epsilon=1e-20,
        scale=c("routed_scaling_factor"),
        selection_bias=True,
        num_groups=c("n_group", default=1),
        top_groups=c("topk_group", default=1),
        group_score="top2_sum",
        float32_logits=True,
    )


def _mimo(c: _Config, layer: int) -> RouterSpec:
    # The published config.json spells the scaling factor as null.
    return _deepseek_v3(
        _Config({**c.as_mapping(), "routed_scaling_factor": c("routed_scaling_factor", default=1.0)}), layer
    )


def _afmoe(c: _Config, layer: int) -> RouterSpec:
    return RouterSpec(
        num_experts=_experts(c),
        top_k=c("num_experts_per_tok"),
        score="sigmoid",
        renormalize=True,
        norm_epsilon=1e-20,
        scale=c("route_scale", default=1.0),
        selection_bias=True,
    )


def _minimax_m2(c: _Config, layer: int) -> RouterSpec:
    return RouterSpec(
        num_experts=_experts(c), top_k=c("num_experts_per_tok"), score="sigmoid", renormalize=True, selection_bias=True
    )


def _lfm2_moe(c: _Config, layer: int) -> RouterSpec:
    return RouterSpec(
        num_experts=_experts(c),
        top_k=c("num_experts_per_tok"),
        score="sigmoid",
        renormalize=c("norm_topk_prob", default=True),
        norm_epsilon=1e-6,
        scale=c("routed_scaling_factor", default=1.0),
        selection_bias=c("use_expert_bias", default=True),
    )


def _ernie(c: _Config, layer: int) -> RouterSpec:
    return RouterSpec(
        num_experts=_experts(c),
        top_k=c("num_experts_per_tok", "moe_k"),
        renormalize=True,
        norm_floor=c("moe_norm_min", default=1e-12),
        selection_bias=True,
        float32_logits=True,
    )


def _longcat(c: _Config, layer: int) -> RouterSpec:
    zero_experts = c("zero_expert_num", default=0)
    return RouterSpec(
        num_experts=c("n_routed_experts") + zero_experts,
        top_k=c("moe_topk"),
        scale=c("routed_scaling_factor", default=1.0),
        selection_bias=True,
        zero_experts=zero_experts,
        float32_logits=True,
    )


def _llama4(c: _Config, layer: int) -> RouterSpec:
    return RouterSpec(
        num_experts=_experts(c), top_k=c("num_experts_per_tok", default=1), score="sigmoid", weight_on_input=True
    )


def _phimoe(c: _Config, layer: int) -> RouterSpec:
    # transformers' sparsemixer always returns two choices, whatever num_experts_per_tok is.
    return RouterSpec(
        num_experts=_experts(c), top_k=2, score="sparsemixer", jitter=c("router_jitter_noise", default=0.01)
    )


_DEEPSEEK_V4_SCORES = {"sqrtsoftplus": "sqrt_softplus", "sigmoid": "sigmoid"}


def _deepseek_v4(c: _Config, layer: int) -> RouterSpec:
    scoring = c("scoring_func", default="sqrtsoftplus")
    if scoring not in _DEEPSEEK_V4_SCORES:
        raise ValueError(f"scoring_func must be one of {tuple(_DEEPSEEK_V4_SCORES)}, not {scoring!r}")
    layer_types = c("mlp_layer_types", default=None)
    forced = layer_types[layer] == "hash_moe" if layer_types else layer < c("num_hash_layers", default=3)
    return RouterSpec(
        num_experts=_experts(c),
        top_k=c("num_experts_per_tok"),
        score=_DEEPSEEK_V4_SCORES[scoring],
        renormalize=True,
        norm_epsilon=1e-20,
        scale=c("routed_scaling_factor", default=1.5),
        selection_bias=not forced,
        forced_experts=forced,
    )


def _gemma4(c: _Config, layer: int) -> RouterSpec:
    return RouterSpec(
        num_experts=_experts(c),
        top_k=c("top_k_experts"),
        renormalize=True,
        expert_scale=True,
        input_norm_eps=c("rms_norm_eps", default=1e-6),
    )


def _switch(c: _Config, layer: int) -> RouterSpec:
    return RouterSpec(num_experts=_experts(c), top_k=1, capacity=c("expert_capacity", default=64), float32_logits=True)


def _nllb(c: _Config, layer: int) -> RouterSpec:
    policy = c("second_expert_policy", default="all")
    if policy != "all" or c("batch_prioritized_routing", default=False):
        raise ValueError(f"NLLB routing with second_expert_policy={policy!r} or batch priority has no fixed rule")
    fraction = c("moe_eval_capacity_token_fraction", default=1.0)
    return RouterSpec(
        num_experts=_experts(c),
        top_k=2,
        renormalize=True,
        norm_floor=2.0**-23,
        capacity=None if fraction > 0 else c("expert_capacity", default=64),
        capacity_fraction=fraction if fraction > 0 else None,
        renormalize_after_drop=not c("normalize_router_prob_before_dropping", default=False),
        float32_logits=True,
    )


FAMILIES: dict[str, _Rule] = {
    "mixtral": _softmax(True),
    "minimax": _softmax(True),
    "qwen3_moe": _softmax(False, flag=True),
    "qwen3_next": _softmax(True, flag=True),
    "hunyuan_v1_moe": _hunyuan,
    "dbrx": _dbrx,
    "olmoe": _softmax(False, flag=True),
    "qwen2_moe": _softmax(False, flag=True),
    "flex_olmo": _softmax(False, flag=True),
    "jamba": _softmax(False),
    "gpt_oss": _topk_softmax,
    "granitemoe": _topk_softmax,
    "granitemoeshared": _topk_softmax,
    "granitemoehybrid": _topk_softmax,
    "jetmoe": _topk_softmax,
    "aria_text": _topk_softmax,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "glm4_moe": _deepseek_v3,
    "dots1": _deepseek_v3,
    "solar_open": _deepseek_v3,
    "exaone_moe": _deepseek_v3,
    "nemotron_h": _deepseek_v3,
    "mimo_v2_flash": _mimo,
    "afmoe": _afmoe,
    "minimax_m2": _minimax_m2,
    "lfm2_moe": _lfm2_moe,
    "ernie4_5_moe": _ernie,
    "longcat_flash": _longcat,
    "llama4_text": _llama4,
    "phimoe": _phimoe,
    "deepseek_v4": _deepseek_v4,
    "gemma4_text": _gemma4,
    "switch_transformers": _switch,
    "nllb-moe": _nllb,
}


def router_spec(config: Any, layer: int = 0) -> RouterSpec:
    """The routing rule of a layer.

    Arguments:
        config: a transformers config, or the mapping read from ``config.json``; of the text part in multimodal models.
        layer: number of the layer; some families change the rule along the depth.

    Raises:
        ValueError: for an unknown ``model_type`` or a config that lacks what the rule needs.
    """
    read = _Config(config)
    model_type = read("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"no routing rule known for model_type {model_type!r}; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type](read, layer)
