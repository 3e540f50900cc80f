"""Kimi Linear: most layers have Kimi Delta Attention, the others latent attention that sees no positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...checkpoint.config_reader import ConfigReader
from ..family import ExpertNames
from .latent import LATENT, by_mlp_type
from .rules import FULL, layer_type

_STATES = "linear_attention"
_OTHER_WORDS = {
    **{
        "model_max_length": "max_position_embeddings",
        "moe_renormalize": "norm_topk_prob",
        "num_expert_group": "n_group",
    },
    **{"num_experts_per_token": "num_experts_per_tok", "num_shared_experts": "n_shared_experts"},
}
_SIZES = {
    **{"head_dim": "linear_head_dim", "num_heads": "linear_num_heads"},
    "short_conv_kernel_size": "linear_conv_kernel_dim",
}


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Published files count layers of each kind from 1 in a part of their own, and have other words for sizes."""
    reader, kept = ConfigReader(config), dict(config)
    linear = kept.pop("linear_attn_config", None) or {}
    if not isinstance(linear, Mapping):
        raise reader.error("linear_attn_config", linear, "an object")
    part = ConfigReader(linear, "config.json: linear_attn_config")
    said = {_OTHER_WORDS[key]: kept.pop(key) for key in _OTHER_WORDS if kept.get(key) is not None}
    said |= {_SIZES[key]: part.get(key) for key in _SIZES if part.get(key) is not None}
    full, states = part.integers("full_attn_layers"), part.integers("kda_layers")
    if full or states:
        layers = reader.integer("num_hidden_layers")
        if sorted((*full, *states)) != list(range(1, layers + 1)):
            raise part.error("kda_layers", list(states), f"those of {layers} layers that full_attn_layers leaves out")
        said["layer_types"] = [_STATES if number + 1 in states else FULL for number in range(layers)]
    part.refuse_unread()
    for key, value in said.items():
        if kept.get(key, value) not in (None, value):
            raise reader.error(key, kept[key], f"{value}, as another key says")
    if "kv_lora_rank" in kept:  # transformers derives this one, whatever the file says
        kept.pop("head_dim", None)
    return {**kept, **said}


def _attention(config: ConfigReader, layer: int) -> str:
    default = FULL if layer and layer % 4 == 0 else _STATES
    return "mla" if layer_type(config, layer, default, (FULL, _STATES)) == FULL else "kimi_delta"


_V3 = LATENT["deepseek_v3"]

KIMI_LINEAR = {
    "kimi_linear": replace(
        _V3,
        norm_eps=1e-5,
        settings=_settings,
        attention=_attention,
        attention_parts=lambda config, layer: {"interleaved": False},
        rope=lambda config, layer: None,
        moe=by_mlp_type,
        defaults={
            **{"kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
            **{"v_head_dim": 128, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446},
            **{"norm_topk_prob": True, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_experts_per_tok": 8},
            "moe_intermediate_size": 1024,
        },
        fixed={
            **{"moe_router_activation_func": ("sigmoid",), "use_grouped_topk": (True,), "mla_use_nope": (True,)},
            "topk_method": ("noaux_tc",),
        },
        # Read where there are layers with states.
        ignored=_V3.ignored | {"linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim"},
        names={r"\.block_sparse_moe\.": ".mlp."},
        experts=(
            ExpertNames(
                gate="mlp.experts.{e}.w1.weight", up="mlp.experts.{e}.w3.weight", down="mlp.experts.{e}.w2.weight"
            ),
        ),
    )
}
