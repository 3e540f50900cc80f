"""AFMoE: norms around each block, gated attention whose global layers see no positions, shared experts."""

from __future__ import annotations

from typing import Any

from ...checkpoint.config_reader import ConfigReader
from ..blocks import SANDWICH
from ..family import Family, blocks_of, norm_of
from ..moe_spec import MoESpec
from .attention_variants import extended
from .mixtures import ffn_names, with_shared
from .rules import ATTENTION_BIAS, full_every, rotating_windows, windows

_LAYERS = full_every(4, "global_attn_every_n_layers")


def _moe(config: ConfigReader, layer: int) -> MoESpec | None:
    mixture = with_shared(config, layer, "num_shared_experts")
    return None if layer < config.integer("num_dense_layers") else mixture


def _scales(config: ConfigReader) -> dict[str, Any]:
    return {"embedding_scale": config.integer("hidden_size") ** 0.5 if config.flag("mup_enabled", False) else 1.0}


AFMOE: dict[str, Family] = {
    "afmoe": Family(
        head_dim=128,
        norm_eps=1e-5,
        norm=norm_of("rms_float32"),
        blocks=blocks_of(SANDWICH),
        norm_modules={
            "attention": "input_layernorm",
            "attention_out": "post_attention_layernorm",
            "ffn": "pre_mlp_layernorm",
            "ffn_out": "post_mlp_layernorm",
        },
        attention=extended,
        attention_parts=lambda config, layer: {"output_gate": True},
        qk_norm="head",
        window=windows(_LAYERS, 1024),
        rope=rotating_windows(_LAYERS),
        qkv_bias=ATTENTION_BIAS,
        o_bias=ATTENTION_BIAS,
        moe=_moe,
        scales=_scales,
        shared=ffn_names("mlp.shared_experts"),
        router=("mlp.router.gate.weight",),
        router_tensors={"selection_bias_E": ("mlp.expert_bias",)},
        defaults={"num_dense_layers": 1, "num_shared_experts": 2, "moe_intermediate_size": 1408, "num_experts": 64},
        # Published files spell these out; the last ones are of training and of how experts are computed.
        fixed={
            "score_func": ("sigmoid",),
            "route_norm": (True,),
            "num_expert_groups": (1,),
            "num_limited_groups": (1,),
        },
        ignored=frozenset({"load_balance_coeff", "use_grouped_mm"}),
    ),
}
