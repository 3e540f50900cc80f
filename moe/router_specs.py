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


_Rule = Callable[[_Config, int], RouterSpec]


class _Key:
    """What the config says under the first of these names that it has; without a default one of them must be there."""

    def __init__(self, *names: str, default: Any = ...) -> None:
        self.names, self.default = names, default


_EXPERTS = _Key("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = _Key("num_experts_per_tok")


def _spec(c: _Config, *, num_experts: Any = _EXPERTS, top_k: Any = _TOP_K, **fields: Any) -> RouterSpec:
    """A :class:`RouterSpec` whose fields are constants, or what the config says where they are keys."""
    fields = {"num_experts": num_experts, "top_k": top_k, **fields}
    found = {name: c(*f.names, default=f.default) if isinstance(f, _Key) else f for name, f in fields.items()}
    return RouterSpec(**found)


def _rule(**fields: Any) -> _Rule:
    """The same fields in every layer, see :func:`_spec`."""
    return lambda c, layer: _spec(c, **fields)


def _hunyuan(c: _Config, layer: int) -> RouterSpec:
    num_experts, top_k = c("num_experts"), c("moe_topk")
    return RouterSpec(
        num_experts=num_experts if isinstance(num_experts, int) else num_experts[layer],
        top_k=top_k if isinstance(top_k, int) else top_k[layer],
        renormalize=True,
        float32_logits=True,
    )


def _dbrx(c: _Config, layer: int) -> RouterSpec:
    ffn = _Config(c("ffn_config"))
    # A config that spells the norm as null switches it off, so a missing key must be told apart from null.
    raw = ffn._config
    p = raw.get("moe_normalize_expert_weights", 1.0) if isinstance(raw, Mapping) else raw.moe_normalize_expert_weights
    return RouterSpec(
        num_experts=ffn("moe_num_experts"), top_k=ffn("moe_top_k"), renormalize=p is not None, norm_p=p or 1.0
    )


def _deepseek_v2(c: _Config, layer: int) -> RouterSpec:
    grouped = c("topk_method", default="greedy") == "group_limited_greedy"
    return _spec(
        c,
        scale=c("routed_scaling_factor", default=1.0),
        num_groups=c("n_group") if grouped else 1,
        top_groups=c("topk_group") if grouped else 1,
        float32_logits=True,
    )


def _longcat(c: _Config, layer: int) -> RouterSpec:
    zero_experts = c("zero_expert_num", default=0)
    return _spec(
        c,
        num_experts=c("n_routed_experts") + zero_experts,
        top_k=c("moe_topk"),
        scale=c("routed_scaling_factor", default=1.0),
        selection_bias=True,
        zero_experts=zero_experts,
        float32_logits=True,
    )


def _cohere2_moe(c: _Config, layer: int) -> RouterSpec:
    chosen_by, normalised = c("expert_selection_fn", default="softmax"), c("norm_topk_prob", default=True)
    if chosen_by not in ("softmax", "sigmoid"):
        raise ValueError(f"expert_selection_fn must be softmax or sigmoid, not {chosen_by!r}")
    if chosen_by == "softmax":
        return _spec(c, softmax_after_topk=True)
    return _spec(c, score="sigmoid", renormalize=normalised)


_DEEPSEEK_V4_SCORES = {"sqrtsoftplus": "sqrt_softplus", "sigmoid": "sigmoid"}


def _deepseek_v4(c: _Config, layer: int) -> RouterSpec:
    scoring = c("scoring_func", default="sqrtsoftplus")
    if scoring not in _DEEPSEEK_V4_SCORES:
        raise ValueError(f"scoring_func must be one of {tuple(_DEEPSEEK_V4_SCORES)}, not {scoring!r}")
    layer_types = c("mlp_layer_types", default=None)
    forced = layer_types[layer] == "hash_moe" if layer_types else layer < c("num_hash_layers", default=3)
    return _spec(
        c,
        score=_DEEPSEEK_V4_SCORES[scoring],
        renormalize=True,
        norm_epsilon=1e-20,
        scale=c("routed_scaling_factor", default=1.5),
        selection_bias=not forced,
        forced_experts=forced,
    )


def _nllb(c: _Config, layer: int) -> RouterSpec:
    policy = c("second_expert_policy", default="all")
    if policy != "all" or c("batch_prioritized_routing", default=False):
        raise ValueError(f"NLLB routing with second_expert_policy={policy!r} or batch priority has no fixed rule")
    fraction = c("moe_eval_capacity_token_fraction", default=1.0)
    return _spec(
        c,
        top_k=2,
        renormalize=True,
        norm_floor=2.0**-23,
        capacity=None if fraction > 0 else c("expert_capacity", default=64),
        capacity_fraction=fraction if fraction > 0 else None,
        renormalize_after_drop=not c("normalize_router_prob_before_dropping", default=False),
        float32_logits=True,
    )


_RENORMALIZED = _rule(renormalize=True)
_SOFTMAX_BY_FLAG = _rule(renormalize=_Key("norm_topk_prob", default=False))
_TOPK_SOFTMAX = _rule(top_k=_Key("num_experts_per_tok", "moe_topk"), softmax_after_topk=True)
_SIGMOID: dict[str, Any] = {"score": "sigmoid", "renormalize": True, "selection_bias": True}
_DEEPSEEK_V3_FIELDS: dict[str, Any] = {
    **_SIGMOID,
    "renormalize": _Key("norm_topk_prob"),
    "norm_epsilon": 1e-20,
    "scale": _Key("routed_scaling_factor"),
    "num_groups": _Key("n_group", default=1),
    "top_groups": _Key("topk_group", default=1),
    "group_score": "top2_sum",
    "float32_logits": True,
}
_DEEPSEEK_V3 = _rule(**_DEEPSEEK_V3_FIELDS)

FAMILIES: dict[str, _Rule] = {
    "mixtral": _RENORMALIZED,
    "minimax": _RENORMALIZED,
    "qwen3_moe": _SOFTMAX_BY_FLAG,
    "qwen3_5_moe": _RENORMALIZED,
    "qwen3_5_moe_text": _RENORMALIZED,
    "qwen3_next": _rule(renormalize=_Key("norm_topk_prob", default=True)),
    "hunyuan_v1_moe": _hunyuan,
    "dbrx": _dbrx,
    "olmoe": _SOFTMAX_BY_FLAG,
    "qwen2_moe": _SOFTMAX_BY_FLAG,
    "mellum": _SOFTMAX_BY_FLAG,
    "flex_olmo": _SOFTMAX_BY_FLAG,
    "jamba": _rule(),
    "gpt_oss": _TOPK_SOFTMAX,
    "granitemoe": _TOPK_SOFTMAX,
    "granitemoeshared": _TOPK_SOFTMAX,
    "granitemoe_swa": _TOPK_SOFTMAX,
    "granitemoehybrid": _TOPK_SOFTMAX,
    "jetmoe": _TOPK_SOFTMAX,
    "aria_text": _TOPK_SOFTMAX,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": _DEEPSEEK_V3,
    "kimi_k2": _DEEPSEEK_V3,
    "kimi_linear": _rule(
        **{
            **_DEEPSEEK_V3_FIELDS,
            "top_k": _Key("num_experts_per_tok", "num_experts_per_token"),
            "renormalize": _Key("norm_topk_prob", "moe_renormalize"),
            "num_groups": _Key("n_group", "num_expert_group", default=1),
        }
    ),
    "glm_moe_dsa": _DEEPSEEK_V3,
    "glm4_moe": _DEEPSEEK_V3,
    "glm4_moe_lite": _DEEPSEEK_V3,
    "dots1": _DEEPSEEK_V3,
    "solar_open": _DEEPSEEK_V3,
    "exaone_moe": _DEEPSEEK_V3,
    "nemotron_h": _DEEPSEEK_V3,
    # The published config.json spells the scaling factor as null.
    "mimo_v2_flash": _rule(**{**_DEEPSEEK_V3_FIELDS, "scale": _Key("routed_scaling_factor", default=1.0)}),
    "afmoe": _rule(**_SIGMOID, norm_epsilon=1e-20, scale=_Key("route_scale", default=1.0)),
    "hy_v3": _rule(
        **_SIGMOID, norm_epsilon=1e-20, scale=_Key("router_scaling_factor", default=2.826), float32_logits=True
    ),
    "minimax_m2": _rule(**_SIGMOID),
    "lfm2_moe": _rule(
        score="sigmoid",
        renormalize=_Key("norm_topk_prob", default=True),
        norm_epsilon=1e-6,
        scale=_Key("routed_scaling_factor", default=1.0),
        selection_bias=_Key("use_expert_bias", default=True),
    ),
    "ernie4_5_moe": _rule(
        top_k=_Key("num_experts_per_tok", "moe_k"),
        renormalize=True,
        norm_floor=_Key("moe_norm_min", default=1e-12),
        selection_bias=True,
        float32_logits=True,
    ),
    "longcat_flash": _longcat,
    "llama4_text": _rule(top_k=_Key("num_experts_per_tok", default=1), score="sigmoid", weight_on_input=True),
    # transformers' sparsemixer always returns two choices, whatever num_experts_per_tok is.
    "phimoe": _rule(top_k=2, score="sparsemixer", jitter=_Key("router_jitter_noise", default=0.01)),
    "deepseek_v4": _deepseek_v4,
    "cohere2_moe": _cohere2_moe,
    "gemma4_text": _rule(
        top_k=_Key("top_k_experts"),
        renormalize=True,
        expert_scale=True,
        input_norm_eps=_Key("rms_norm_eps", default=1e-6),
    ),
    "switch_transformers": _rule(top_k=1, capacity=_Key("expert_capacity", default=64), float32_logits=True),
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
