"""Families with state spaces and FFNs in every layer: Bamba and Jamba."""

from __future__ import annotations

from ...checkpoint.config_reader import ConfigReader
from ..family import Family
from ..moe_spec import MoESpec
from .mixtures import every_layer, ffn_names
from .rules import ATTENTION_BIAS, FULL, flag_of, layer_type

_STATES = "linear_attention"
_KINDS = {"mamba": _STATES, _STATES: _STATES, "attention": FULL, FULL: FULL}
_MAMBA_KEYS = frozenset(
    {
        *("mamba_conv_bias", "mamba_d_conv", "mamba_d_head", "mamba_d_state", "mamba_dt_rank", "mamba_expand"),
        *("mamba_n_groups", "mamba_n_heads", "mamba_proj_bias", "mamba_chunk_size", "time_step_limit"),
    }
)
_NAMES = {
    r"\.feed_forward\.": ".mlp.",
    r"\.pre_ff_layernorm\.": ".post_attention_layernorm.",
    r"^model\.final_layernorm\.": "model.norm.",
}


def _agreed(config: ConfigReader, layer: int, kind: str, said_by: str) -> str:
    """The kind of a layer, which lists with an entry for every layer must say too."""
    for key in ("layers_block_type", "layer_types"):
        if _KINDS[layer_type(config, layer, kind, _KINDS, key)] != kind:
            raise config.error(key, config.get(key), f"{kind} for layer {layer}, as {said_by} says")
    return kind


def _bamba_attention(config: ConfigReader, layer: int) -> str:
    kind = FULL if layer in config.integers("attn_layer_indices") else _STATES
    return "mamba2" if _agreed(config, layer, kind, "attn_layer_indices") == _STATES else "gqa"


def _half_rotary(config: ConfigReader) -> float:
    if (part := config.number("partial_rotary_factor", 0.5)) != 0.5:
        raise config.error("partial_rotary_factor", part, "0.5")
    return part


def _every(config: ConfigReader, layer: int, what: str, period: int, offset: int) -> bool:
    """Whether a layer is one of every so many."""
    period, offset = config.integer(f"{what}_period", period), config.integer(f"{what}_offset", offset)
    if not offset < period:
        raise config.error(f"{what}_offset", offset, f"less than {what}_period, {period}")
    return layer % period == offset


def _jamba_attention(config: ConfigReader, layer: int) -> str:
    kind = FULL if _every(config, layer, "attn_layer", 8, 4) else _STATES
    return "mamba1" if _agreed(config, layer, kind, "attn_layer_period") == _STATES else "gqa"


def _jamba_moe(config: ConfigReader, layer: int) -> MoESpec | None:
    """With one expert there are none."""
    chosen = _every(config, layer, "expert_layer", 2, 1)
    if config.integer("num_experts", 16) == 1:
        config.integer("num_experts_per_tok", 2)
        return None
    mixture = every_layer(config, layer)
    return mixture if chosen else None


STATE_SPACES: dict[str, Family] = {
    "bamba": Family(
        kv_heads=8,
        norm_eps=1e-5,
        attention=_bamba_attention,
        partial_rotary=_half_rotary,
        qkv_bias=ATTENTION_BIAS,
        o_bias=ATTENTION_BIAS,
        mlp_bias=flag_of("mlp_bias", False),
        ignored=frozenset({"num_logits_to_keep", "z_loss_coefficient"}) | _MAMBA_KEYS,
        names=_NAMES,
    ),
    "jamba": Family(
        kv_heads=8,
        attention=_jamba_attention,
        rope=lambda config, layer: None,
        moe=_jamba_moe,
        defaults={"num_experts": 16, "num_experts_per_tok": 2},
        # How transformers computes, and what it returns.
        ignored=frozenset(
            {
                "use_mamba_kernels",
                "use_mambapy",
                "use_associative_scan",
                "num_logits_to_keep",
                "calc_logits_for_entire_prompt",
            }
        )
        | _MAMBA_KEYS,
        names=_NAMES,
        experts=ffn_names("mlp.experts.{e}"),
        router=("mlp.router.weight",),
    ),
}
