"""Mixtures with shared experts that every token uses, dense layers in front, and routers with a selection bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...checkpoint.config_reader import ConfigReader
from ...checkpoint.fused import gate_and_up
from ...checkpoint.weights import Piece, TensorInfo
from ..family import Family
from ..moe_spec import MoESpec
from .attention_variants import HUNYUAN_ROPE, extended, norms_behind_rotation
from .llama_like import LLAMA_LIKE, MIXTRAL_EXPERTS
from .mixtures import DEEPSEEK_RULES, SIGMOID, dense_first, every_layer, ffn_names, mlp_type, qwen_moe, with_shared
from .rules import ATTENTION_BIAS, FULL, SLIDING, flag_of, layer_type, positive_window, window_by_layer_type, windows


def _hy_v3(config: ConfigReader, layer: int) -> MoESpec | None:
    kind = mlp_type(config, layer, "sparse" if layer else "dense")
    return None if kind == "dense" else with_shared(config, layer, "num_shared_experts")


def _glm4_norms(config: ConfigReader, layer: int) -> dict[str, Any]:
    return {"qk_norm": "head" if config.flag("use_qk_norm", False) else "none"}


def _granite_divide(tensors: Mapping[str, TensorInfo]) -> dict[str, Piece]:
    """Gate and up of shared experts."""
    return gate_and_up(tensors, r"(.*\.shared_mlp\.)input_linear")


def _granitemoeshared(config: ConfigReader, layer: int) -> MoESpec:
    return replace(every_layer(config, layer), shared_size=config.integer("shared_intermediate_size", 0))


def _ernie(config: ConfigReader, layer: int) -> MoESpec | None:
    """Mixtures in one layer of an interval, from a first layer to a last one."""
    first, step = config.integer("moe_layer_start_index", 1), config.integer("moe_layer_interval", 1)
    last = config.get("moe_layer_end_index", -1)
    if last != -1:
        last = config.integer("moe_layer_end_index")
    if step < 1:
        raise config.error("moe_layer_interval", step, "at least 1")
    mixture = with_shared(config, layer, "moe_num_shared_experts")
    return mixture if (layer + 1) % step == 0 and first <= layer and last in (-1, max(layer, last)) else None


def _minimax_m2(config: ConfigReader, layer: int) -> MoESpec:
    kinds = config.integers("attn_type_list")
    if any(kind != 1 for kind in kinds):
        raise config.error("attn_type_list", list(kinds), "1 for every layer: full attention")
    return every_layer(config, layer)


def _minimax_rotary(config: ConfigReader) -> float:
    head_dim = config.integer("head_dim", 128)
    return config.integer("rotary_dim", head_dim) / max(head_dim, 1)


def _exaone(config: ConfigReader, layer: int) -> MoESpec | None:
    kind = mlp_type(config, layer, "dense" if layer < config.integer("first_k_dense_replace", 1) else "sparse")
    return None if kind == "dense" else with_shared(config, layer, "num_shared_experts")


def _exaone_slides(config: ConfigReader, layer: int) -> bool:
    """Layers with a window: those that ``layer_types`` names, or all but one in ``sliding_window_pattern``."""
    has_windows, kind = _exaone_size(config) is not None, FULL
    pattern = config.get("sliding_window_pattern", 4)
    if config.get("layer_types") is not None or pattern is None:
        kind = layer_type(config, layer, FULL)
    elif has_windows:
        step = config.integer("sliding_window_pattern", 4)
        if step < 1:
            raise config.error("sliding_window_pattern", step, "at least 1")
        kind = SLIDING if (layer + 1) % step else FULL
    if kind == SLIDING and not has_windows:
        raise config.error("layer_types", kind, f"{FULL} or, with sliding_window, {SLIDING}")
    return kind == SLIDING


def _exaone_size(config: ConfigReader) -> int | None:
    config.get("sliding_window")
    # A null is a statement: no window.
    return positive_window(config, config.values.get("sliding_window", 4096))


def _exaone_window(config: ConfigReader, layer: int) -> int | None:
    return _exaone_size(config) if _exaone_slides(config, layer) else None


def _exaone_rope(config: ConfigReader, layer: int) -> str | None:
    """Where there are windows, layers without one do not rotate."""
    return "" if _exaone_size(config) is None or _exaone_slides(config, layer) else None


def _mellum_type(config: ConfigReader, layer: int) -> str:
    return layer_type(config, layer, FULL)


def _mellum(config: ConfigReader, layer: int) -> MoESpec | None:
    kind = mlp_type(config, layer, "sparse")
    return None if kind == "dense" else qwen_moe(config, layer)


def _same_everywhere(config: ConfigReader, key: str, value: int) -> None:
    """A key that names a number for every layer, or one for all, must name this one."""
    if found := [number for number in config.integers(key) if number != value]:
        raise config.error(key, found[0], f"{value} in every layer")


def _hunyuan(config: ConfigReader, layer: int) -> MoESpec:
    chosen = config.get("moe_topk", 1)
    if isinstance(chosen, list) and len(chosen) < config.integer("num_hidden_layers"):
        raise config.error("moe_topk", chosen, "a number, or one for every layer")
    config.integers("moe_topk")
    mixture = every_layer(config, layer)
    _same_everywhere(config, "moe_intermediate_size", mixture.expert_size)
    _same_everywhere(config, "num_shared_expert", 1)
    return replace(mixture, shared_size=mixture.expert_size)


# What the published configuration says of tokens, pictures and older parts of the model.
_HUNYUAN_OTHERS = frozenset(
    (
        *("attention_head_dim", "cla_share_factor", "class_num", "dense_list", "eod_token_id", "im_end_id"),
        *("im_newline_id", "im_start_id", "image_token_id", "mask_init_id", "num_media_embeds", "org_vocab_size"),
        *("pad_id", "pool_type", "text_end_id", "text_start_id", "video_end_id", "video_start_id"),
    )
)
_HUNYUAN_RULES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("add_classification_head", "skip_cls_token", "use_cla", "use_mla"), (False,)),
    **dict.fromkeys(("group_limited_greedy", "moe_drop_tokens", "moe_random_routing_dropped_token"), (False,)),
    **dict.fromkeys(("norm_topk_prob", "use_mixed_mlp_moe", "use_qk_norm", "use_rotary_pos_emb"), (True,)),
    **{"moe_layer_num_skipped": (0,), "norm_type": ("rms",), "position_embedding_xdrope": (False,)},
    **{"routed_scaling_factor": (False, 1)},
}
_USE_BIAS = flag_of("use_bias", False)
DEEPSEEK_LIKE = Family(
    moe=dense_first,
    qkv_bias=ATTENTION_BIAS,
    shared=ffn_names("mlp.shared_experts"),
    fixed=SIGMOID,
    defaults=DEEPSEEK_RULES,
)

SHARED_EXPERTS: dict[str, Family] = {
    "granitemoeshared": replace(
        LLAMA_LIKE["granitemoe"],
        moe=_granitemoeshared,
        shared=(replace(*ffn_names("shared_mlp"), down="shared_mlp.output_linear.weight"),),
        divide=_granite_divide,
    ),
    "dots1": replace(
        DEEPSEEK_LIKE,
        defaults={**DEEPSEEK_RULES, "norm_topk_prob": False, "max_window_layers": 62},
        fixed={**SIGMOID, "scoring_func": ("sigmoid", "noaux_tc")},
        o_bias=ATTENTION_BIAS,
        qk_norm="head",
        window=window_by_layer_type(lambda layer, last_full: layer >= last_full, switch=None),
    ),
    "solar_open": replace(
        DEEPSEEK_LIKE,
        head_dim=128,
        kv_heads=8,
        theta=1e6,
        norm_eps=1e-5,
        defaults={**DEEPSEEK_RULES, "n_shared_experts": 1, "n_routed_experts": 128, "num_experts_per_tok": 8},
    ),
    "glm4_moe": replace(
        DEEPSEEK_LIKE,
        kv_heads=8,
        norm_eps=1e-5,
        partial_rotary=lambda config: 0.5,
        attention_parts=_glm4_norms,
        defaults={
            **DEEPSEEK_RULES,
            **{"first_k_dense_replace": 1, "n_shared_experts": 1, "n_routed_experts": 128, "num_experts_per_tok": 8},
            "moe_intermediate_size": 1408,
        },
        mtp={},
    ),
    "exaone_moe": Family(
        kv_heads=32,
        norm_eps=1e-5,
        rope=_exaone_rope,
        window=_exaone_window,
        moe=_exaone,
        qk_norm="head",
        defaults={
            **DEEPSEEK_RULES,
            **{"routed_scaling_factor": 2.5, "num_shared_experts": 1, "num_experts_per_tok": 8},
            "moe_intermediate_size": 1024,
        },
        fixed=SIGMOID,
        shared=ffn_names("mlp.shared_experts"),
        router_tensors={"selection_bias_E": ("mlp.e_score_correction_bias", "mlp.gate.e_score_correction_bias")},
    ),
    "mellum": Family(
        kv_heads=4,
        head_dim=128,
        rope=_mellum_type,
        thetas={FULL: ("", 500000.0), SLIDING: ("", 10000.0)},
        window=windows(_mellum_type, 1024),
        moe=_mellum,
        qkv_bias=ATTENTION_BIAS,
        o_bias=ATTENTION_BIAS,
        qk_norm="head",
        defaults={"num_experts_per_tok": 8, "norm_topk_prob": True, "moe_intermediate_size": 896},
        ignored=frozenset({"mtp_layer_types", "mtp_mlp_layer_types"}),
    ),
    "hunyuan_v1_moe": Family(
        norm_eps=1e-5,
        rope_keys=HUNYUAN_ROPE,
        moe=_hunyuan,
        qkv_bias=ATTENTION_BIAS,
        o_bias=ATTENTION_BIAS,
        qk_norm="head",
        attention=extended,
        attention_parts=norms_behind_rotation,
        ignored=_HUNYUAN_OTHERS,
        fixed=_HUNYUAN_RULES,
        shared=ffn_names("mlp.shared_mlp"),
        router=("mlp.gate.wg.weight",),
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
        defaults={"router_scaling_factor": 2.826, "num_shared_experts": 1},
        # Adding up in float32 and rounding is what an addition of two 16-bit numbers does.
        ignored=frozenset({"enable_moe_fp32_combine"}),
        fixed={**SIGMOID, "first_k_dense_replace": (1,)},
        shared=ffn_names("mlp.shared_mlp", "mlp.shared_experts"),
        router=("mlp.router.gate.weight", "mlp.gate.weight"),
        router_tensors={"selection_bias_E": ("mlp.expert_bias", "mlp.e_score_correction_bias")},
    ),
    "minimax_m2": Family(
        kv_heads=8,
        head_dim=128,
        theta=5e6,
        partial_rotary=_minimax_rotary,
        moe=_minimax_m2,
        qk_norm="full",
        ignored=frozenset(
            ("mlp_intermediate_size", "mtp_transformer_layers", "num_mtp_modules", "shared_moe_mode", "use_mtp")
        ),
        fixed={
            **SIGMOID,
            **{"use_routing_bias": (True,), "use_qk_norm": (True,), "qk_norm_type": ("per_layer",)},
            **dict.fromkeys(("layernorm_full_attention_beta", "layernorm_linear_attention_beta"), (1,)),
            **{"layernorm_mlp_beta": (1,), "swa_rope_theta": (-1,)},
        },
        experts=MIXTRAL_EXPERTS,
        router=("block_sparse_moe.gate.weight", "mlp.gate.weight"),
        router_tensors={
            "selection_bias_E": ("block_sparse_moe.e_score_correction_bias", "mlp.e_score_correction_bias")
        },
    ),
    "ernie4_5_moe": Family(
        kv_heads=4,
        theta=500000.0,
        norm_eps=1e-5,
        rope_interleaved=True,
        tie_embeddings=True,
        moe=_ernie,
        qkv_bias=_USE_BIAS,
        o_bias=_USE_BIAS,
        mlp_bias=_USE_BIAS,
        scales=lambda config: {"lm_head_bias": _USE_BIAS(config)},
        defaults={
            **{"moe_num_experts": 64, "moe_k": 6, "moe_num_shared_experts": 2, "moe_intermediate_size": 1536},
            "moe_norm_min": 1e-12,
        },
        ignored=frozenset({"moe_capacity"}),
        mtp={"moe_layer_start_index": 1 << 16},  # a dense FFN
        fixed={"moe_gate": ("topk",), "moe_use_aux_free": (True,)},
        shared=ffn_names("mlp.shared_experts"),
        router_tensors={
            "selection_bias_E": (
                "mlp.moe_statics.e_score_correction_bias",
                "mlp.gate.moe_statics.e_score_correction_bias",
            )
        },
    ),
}
