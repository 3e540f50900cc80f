"""DeepSeek's line: families with multi-head latent attention, shared experts and dense layers in front."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...checkpoint.config_reader import ConfigReader
from ..family import Family
from ..moe_spec import MoESpec
from .mixtures import SIGMOID, dense_first, mlp_type, with_shared
from .rules import flag_of
from .shared_experts import DEEPSEEK_LIKE

_IGNORED = frozenset({"aux_loss_alpha", "seq_aux"})  # of training


def _latent(config: ConfigReader, layer: int) -> str:
    return "mla"


def _deepseek_v2(config: ConfigReader, layer: int) -> MoESpec | None:
    kinds = ("greedy", "group_limited_greedy")
    config.choice("topk_method", dict(zip(kinds, kinds, strict=True)), kinds[0])
    return dense_first(config, layer)


def by_mlp_type(config: ConfigReader, layer: int) -> MoESpec | None:
    """Dense layers are those that ``mlp_layer_types`` names, or the first ones."""
    return _of_type(config, layer, layer < config.integer("first_k_dense_replace"))


def _first_dense(config: ConfigReader, layer: int) -> MoESpec | None:
    return _of_type(config, layer, layer == 0)


def _of_type(config: ConfigReader, layer: int, dense: bool) -> MoESpec | None:
    mixture = with_shared(config, layer, "n_shared_experts")
    return None if mlp_type(config, layer, "dense" if dense else "sparse") == "dense" else mixture


def _interleaved(config: ConfigReader, layer: int) -> dict[str, Any]:
    return {"interleaved": config.flag("rope_interleave", True)}


def _always_interleaved(config: ConfigReader, layer: int) -> dict[str, Any]:
    if not config.flag("rope_interleave", True):
        raise config.error("rope_interleave", False, "true")
    return {}


def _indexed(config: ConfigReader, layer: int) -> dict[str, Any]:
    """Attention whose indexer chooses positions where there are many."""
    kinds = config.get("layer_types")
    if kinds is not None and kinds != ["indexed_attention"] * config.integer("num_hidden_layers"):
        raise config.error("layer_types", kinds, "indexed_attention for every layer")
    sizes = {"index_topk": "index_topk", "index_heads": "index_n_heads", "index_dim": "index_head_dim"}
    return {**_always_interleaved(config, layer), **{field: config.integer(key) for field, key in sizes.items()}}


_V3 = replace(
    DEEPSEEK_LIKE,
    attention=_latent,
    attention_parts=_interleaved,
    defaults={
        **{"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
        **{"n_shared_experts": 1, "first_k_dense_replace": 3},
    },
    ignored=_IGNORED,
    mtp={"mlp_layer_types": "sparse", "layer_types": None},
)
_V32 = replace(_V3, moe=by_mlp_type, attention_parts=_indexed)

LATENT: dict[str, Family] = {
    "deepseek_v2": replace(
        _V3,
        moe=_deepseek_v2,
        mlp_bias=flag_of("mlp_bias", False),
        attention_parts=_always_interleaved,
        defaults={"n_shared_experts": 2},
        fixed={"norm_topk_prob": (False,), "scoring_func": ("softmax",)},
    ),
    "deepseek_v3": _V3,
    "deepseek_v32": _V32,
    "kimi_k2": _V3,
    "glm4_moe_lite": replace(
        _V3,
        norm_eps=1e-5,
        moe=_first_dense,
        defaults={
            **{"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.8, "norm_topk_prob": True},
            "n_shared_experts": 1,
        },
        fixed={**SIGMOID, "first_k_dense_replace": (1,)},
    ),
    "glm_moe_dsa": replace(
        _V32,
        norm_eps=1e-5,
        defaults={**_V3.defaults, "n_group": 1, "topk_group": 1},
        # Which indexers layers share, and how these rotate, matters only where they choose.
        ignored=_IGNORED
        | {"indexer_types", "index_topk_pattern", "index_topk_freq"}
        | {"index_skip_topk_offset", "indexer_rope_interleave"},
    ),
}
