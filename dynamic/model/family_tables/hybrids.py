"""Families in which most layers keep a state of fixed size instead of keys and values."""

from __future__ import annotations

from dataclasses import replace

from ...checkpoint.config_reader import ConfigReader
from ..family import Family, norm_of
from ..moe_spec import MoESpec
from .mixtures import every_layer, qwen_moe, router
from .rules import ATTENTION_BIAS, FULL, layer_type
from .shared_experts import SHARED_EXPERTS

_LINEAR = "linear_attention"


def _qwen_attention(config: ConfigReader, layer: int) -> str:
    """Linear attention but for every ``full_attention_interval``-th layer, or as ``layer_types`` says."""
    interval = config.integer("full_attention_interval", 4)
    if interval < 1:
        raise config.error("full_attention_interval", interval, "at least 1")
    kind = layer_type(config, layer, _LINEAR if (layer + 1) % interval else FULL, (FULL, _LINEAR))
    return "gated_gqa" if kind == FULL else "gated_delta"


def _qwen3_next_moe(config: ConfigReader, layer: int) -> MoESpec | None:
    moe = qwen_moe(config, layer)
    return None if moe is None else _with_shared(config, moe)


def _qwen3_5_moe(config: ConfigReader, layer: int) -> MoESpec:
    size = config.integer("moe_intermediate_size", 512)
    return _with_shared(config, MoESpec(router=router(config, layer), expert_size=size))


def _with_shared(config: ConfigReader, moe: MoESpec) -> MoESpec:
    size = config.integer("shared_expert_intermediate_size", 512)
    return replace(moe, shared_size=size, shared_gate=size > 0)


# Of layers with states; they are read where there are any.
_LINEAR_KEYS = frozenset(
    {
        *("linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim"),
        *("linear_num_key_heads", "linear_num_value_heads"),
    }
)
_CONV = frozenset({"conv_bias", "conv_L_cache"})
_MAMBA_KEYS = frozenset(
    {
        *("mamba_conv_bias", "mamba_d_conv", "mamba_d_head", "mamba_d_state", "mamba_expand", "mamba_n_groups"),
        *("mamba_n_heads", "mamba_proj_bias", "time_step_limit"),
    }
)

_QWEN = Family(
    kv_heads=2,
    head_dim=256,
    attention=_qwen_attention,
    partial_rotary=lambda config: 0.25,
    qkv_bias=ATTENTION_BIAS,
    o_bias=ATTENTION_BIAS,
    qk_norm="head",
    norm=norm_of("rms_offset"),
    # States are float32 here, and layers for further tokens are left out.
    ignored=frozenset({"mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"}) | _LINEAR_KEYS,
    fixed={"attn_output_gate": (True,)},
    mtp={"layer_types": FULL},
)

_MAMBA = {"mamba": "mamba2", _LINEAR: "mamba2", "attention": "gqa", FULL: "gqa"}


def _granite_attention(config: ConfigReader, layer: int) -> str:
    return _MAMBA[layer_type(config, layer, "mamba", _MAMBA)]


def _granite_rope(config: ConfigReader, layer: int) -> str | None:
    kind = config.choice("position_embedding_type", {"nope": "nope", "rope": "rope"}, "nope")
    return "" if kind == "rope" else None


def _granite_moe(config: ConfigReader, layer: int) -> MoESpec | None:
    """Without experts the shared one is a dense FFN."""
    size = config.integer("shared_intermediate_size", 1024)
    if not config.integer("num_local_experts", 8):
        config.integer("num_experts_per_tok", 2)
        return None
    return replace(every_layer(config, layer), shared_size=size)


def _lfm2_attention(config: ConfigReader, layer: int) -> str:
    """``layer_types``, or in older files ``full_attn_idxs``; without either all layers have keys and values."""
    full = config.integers("full_attn_idxs") if config.get("full_attn_idxs") is not None else (layer,)
    kind = layer_type(config, layer, FULL if layer in full else "conv", (FULL, "conv"))
    return "gqa" if kind == FULL else "short_conv"


def _lfm2_size(config: ConfigReader) -> int:
    """As it is, or made for an FFN without a gate: then two thirds of it, in round numbers."""
    size = config.integer("block_ff_dim", config.integer("intermediate_size", 12288))
    factor, multiple = config.number("block_ffn_dim_multiplier", 1.0), config.integer("block_multiple_of", 256)
    if multiple < 1:
        raise config.error("block_multiple_of", multiple, "at least 1")
    if not config.flag("block_auto_adjust_ff_dim", True):
        return size
    size = int(factor * int(2 * size / 3))
    return -(-size // multiple) * multiple


def _lfm2_moe(config: ConfigReader, layer: int) -> MoESpec | None:
    moe = MoESpec(router=router(config, layer), expert_size=config.integer("moe_intermediate_size", 1792))
    return None if layer < config.integer("num_dense_layers", 2) else moe


_LFM2 = Family(
    kv_heads=8,
    theta=1e6,
    norm_eps=1e-5,
    norm=norm_of("rms", "norm_eps"),
    tie_embeddings=True,
    attention=_lfm2_attention,
    qk_norm="head",
    dense_size=_lfm2_size,
    # transformers reads none of these, nor does the model have what they name.
    ignored=frozenset(
        {
            *("block_dim", "block_mlp_init_scale", "block_norm_eps", "block_out_init_scale", "block_use_swiglu"),
            *("block_use_xavier_init", "conv_dim", "conv_dim_out", "conv_use_xavier_init", "num_heads", "use_pos_enc"),
        }
    )
    | _CONV,
    fixed={"tie_embedding": (True,)},
    names={
        r"\.operator_norm\.": ".input_layernorm.",
        r"\.ffn_norm\.": ".post_attention_layernorm.",
        r"^model\.embedding_norm\.": "model.norm.",
        r"\.feed_forward\.": ".mlp.",
        r"\.w1\.": ".gate_proj.",
        r"\.w2\.": ".down_proj.",
        r"\.w3\.": ".up_proj.",
        r"\.self_attn\.out_proj\.": ".self_attn.o_proj.",
        r"\.([qk])_layernorm\.": r".\1_norm.",
    },
)

HYBRIDS: dict[str, Family] = {
    "lfm2": _LFM2,
    "lfm2_moe": replace(
        _LFM2,
        moe=_lfm2_moe,
        dense_size=lambda config: config.integer("intermediate_size", 7168),
        ignored=_CONV,
        router_tensors={"selection_bias_E": ("mlp.expert_bias",)},
    ),
    "granitemoehybrid": replace(
        SHARED_EXPERTS["granitemoeshared"],
        attention=_granite_attention,
        rope=_granite_rope,
        moe=_granite_moe,
        dense=SHARED_EXPERTS["granitemoeshared"].shared,
        dense_size=lambda config: config.integer("shared_intermediate_size", 1024),
        # Into how long pieces transformers cuts prompts.
        ignored=frozenset({"mamba_chunk_size"}) | _MAMBA_KEYS,
        fixed={"normalization_function": ("rmsnorm",)},
    ),
    "qwen3_next": replace(_QWEN, moe=_qwen3_next_moe),
    "qwen3_5": replace(_QWEN, kv_heads=4),
    "qwen3_5_moe": replace(_QWEN, moe=_qwen3_5_moe),
}
