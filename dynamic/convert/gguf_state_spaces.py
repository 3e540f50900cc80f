"""GGUF architectures with state spaces whose layers differ in more than their attention: Jamba, Nemotron-H, Kimi."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from ..checkpoint.gguf_file import GgufTensor
from .gguf_latent import KEYS_AND_VALUES, latent_heads
from .gguf_metadata import Metadata
from .gguf_parts import decay, flat, reshaped, taps
from .gguf_settings import (
    FULL,
    KV_HEADS,
    SIGMOID,
    Architecture,
    Tensors,
    experts_of,
    first_size,
    has_bias,
    head_dim_of,
    heads_of,
    mixture,
    mlp_types,
    routed_by,
    sigmoid_router,
)

_STATES = "linear_attention"
MAMBA_NAMES = {
    **{f"ssm_{part}.{kind}": f"mamba.{part}_proj.{kind}" for part in ("in", "out") for kind in ("weight", "bias")},
    "ssm_conv1d.weight": taps("mamba.conv1d.weight"),
    "ssm_conv1d.bias": "mamba.conv1d.bias",
    "ssm_dt.bias": "mamba.dt_bias",
    "ssm_a": decay("mamba.A_log"),
    "ssm_d": flat("mamba.D"),
    "ssm_norm.weight": flat("mamba.norm.weight"),
}


def _layers_with(meta: Metadata, tensors: Tensors, part: str) -> list[int]:
    return [layer for layer in range(meta.num_layers) if f"blk.{layer}.{part}.weight" in tensors]


def _period(meta: Metadata, key: str, layers: Iterable[int]) -> tuple[int, int]:
    """Every how many layers there is one of some layers, and where the first is."""
    found = list(layers)
    first = found[0] if found else 0
    step = next((b - a for a, b in pairwise(found)), max(meta.num_layers, first + 1))
    if not found or first >= step or found != list(range(first, meta.num_layers, step)):
        raise meta.error(key, found, "there for every so many layers")
    return step, first


def _heads(meta: Metadata) -> dict[str, int]:
    """Of layers that see no positions; the others have none."""
    counts = sorted({count for count in meta.by_layer(KV_HEADS) if count})
    if len(counts) > 1:
        raise meta.error(KV_HEADS, counts, "the same for all layers that have keys")
    head_dim = head_dim_of(meta)
    if (values := meta.integer(".attention.value_length", head_dim)) != head_dim:
        raise meta.error(".attention.value_length", values, f"the width of a head, {head_dim}")
    return {
        "num_attention_heads": heads_of(meta),
        "num_key_value_heads": counts[0] if counts else heads_of(meta),
        "head_dim": head_dim,
    }


def _jamba(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    hidden, inner = meta.integer(".embedding_length"), meta.integer(".ssm.inner_size")
    if not hidden or inner % hidden:
        raise meta.error(".ssm.inner_size", inner, f"a multiple of .embedding_length={hidden}")
    keys = [layer for layer, count in enumerate(meta.by_layer(KV_HEADS)) if count]
    period, offset = _period(meta, KV_HEADS, keys)
    experts = {"num_experts": 1}
    if sparse := _layers_with(meta, tensors, "ffn_gate_inp"):
        experts = experts_of(meta, tensors, "num_experts")
        step, first = _period(meta, ".expert_count", sparse)
        experts |= {"expert_layer_period": step, "expert_layer_offset": first}
    else:
        meta.get(".expert_used_count")  # there without experts too
        if (count := meta.integer(".expert_count", 0)) > 1:
            raise meta.error(".expert_count", count, "at most 1 without routers")
    return {
        "model_type": "jamba",
        "attn_layer_period": period,
        "attn_layer_offset": offset,
        "mamba_expand": inner // hidden,
        "mamba_d_state": meta.integer(".ssm.state_size"),
        "mamba_d_conv": meta.integer(".ssm.conv_kernel"),
        "mamba_dt_rank": meta.integer(".ssm.time_step_rank"),
        "mamba_conv_bias": has_bias(tensors, "ssm_conv1d"),
        "mamba_proj_bias": has_bias(tensors, "ssm_in"),
        **experts,
    }


def _nemotron(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    """Every layer is one block: which, its tensors say."""
    kinds = {"ssm_in": _STATES, "attn_output": FULL, "ffn_gate_inp": "moe"}
    names = {layer: kind for part, kind in kinds.items() for layer in _layers_with(meta, tensors, part)}
    heads, inner = meta.integer(".ssm.time_step_rank"), meta.integer(".ssm.inner_size")
    if not heads or inner % heads:
        raise meta.error(".ssm.inner_size", inner, f"a multiple of .ssm.time_step_rank={heads}")
    # Nothing is rotated, whatever is said of it; the epsilon is there twice.
    for key in (".rope.dimension_count", ".rope.freq_base", ".rope.scaling.finetuned", *_NEMOTRON_EPSILONS):
        meta.get(key)
    experts: dict[str, Any] = {}
    if meta.integer(".expert_count", 0):
        if (shared := meta.integer(".expert_shared_count", 1)) != 1:
            raise meta.error(".expert_shared_count", shared, "1")
        experts = {
            **sigmoid_router(meta),
            **mixture(meta, tensors, "n_routed_experts", "n_shared_experts"),
            "moe_shared_expert_intermediate_size": meta.integer(".expert_shared_feed_forward_length"),
            "moe_latent_size": meta.integer(".moe_latent_size", 0) or None,
        }
    return {
        "model_type": "nemotron_h",
        "layers_block_type": [names.get(layer, "mlp") for layer in range(meta.num_layers)],
        **{"hidden_act": None, "mlp_hidden_act": "relu2"},
        "intermediate_size": first_size(tensors, ".ffn_up.weight"),
        "attention_bias": has_bias(tensors, "attn_q"),
        "mlp_bias": has_bias(tensors, "ffn_up", "ffn_up_shexp"),
        "n_groups": meta.integer(".ssm.group_count"),
        "mamba_num_heads": heads,
        "mamba_head_dim": inner // heads,
        "ssm_state_size": meta.integer(".ssm.state_size"),
        "conv_kernel": meta.integer(".ssm.conv_kernel"),
        "use_conv_bias": has_bias(tensors, "ssm_conv1d"),
        "use_bias": has_bias(tensors, "ssm_in"),
        **experts,
    }


def _kimi_linear(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    routed_by(meta, SIGMOID)
    channels = meta.integer(".kda.head_dim")
    experts = mixture(meta, tensors, "num_experts", "n_shared_experts")
    size = next((t.shape[0] for name, t in tensors.items() if name.endswith(".ssm_f_b.weight")), 0)
    if channels < 1 or size % channels:
        raise meta.error(".kda.head_dim", channels, f"a divisor of {size}, the channels of all heads")
    return {
        "model_type": "kimi_linear",
        "layer_types": [FULL if count else _STATES for count in meta.by_layer(KV_HEADS)],
        "mlp_layer_types": mlp_types(meta, tensors),
        "q_lora_rank": meta.integer(".attention.q_lora_rank", 0) or None,
        "linear_head_dim": channels,
        "linear_num_heads": size // channels,
        "linear_conv_kernel_dim": meta.integer(".ssm.conv_kernel"),
        # The converter leaves away that weights are normalised, and llama.cpp does it.
        **{**sigmoid_router(meta), "norm_topk_prob": meta.flag(".expert_weights_norm", True)},
        **experts,
    }


def _taps_of_all(tensor: GgufTensor) -> tuple[int, ...]:
    """Channels and taps, between dimensions of one."""
    return math.prod(tensor.shape[:-1]), 1, tensor.shape[-1]


_NEMOTRON_EPSILONS = (".attention.layer_norm_epsilon", ".attention.layer_norm_rms_epsilon")
_DELTA = {"ssm_f_a": "f_a_proj", "ssm_f_b": "f_b_proj", "ssm_g_a": "g_a_proj", "ssm_g_b": "g_b_proj"}
_DELTA |= {"ssm_beta": "b_proj", "ssm_norm": "o_norm"}
_NEMOTRON = Architecture(
    settings=_nemotron,
    heads=_heads,
    epsilons=dict.fromkeys(_NEMOTRON_EPSILONS, "layer_norm_epsilon"),
    names={
        **MAMBA_NAMES,
        "attn_norm.weight": "norm.weight",
        "ffn_latent_down.weight": "mlp.fc1_latent_proj.weight",
        "ffn_latent_up.weight": "mlp.fc2_latent_proj.weight",
    },
)

STATE_SPACES: dict[str, Architecture] = {
    "jamba": Architecture(
        settings=_jamba,
        heads=_heads,
        names={
            **{name: rule for name, rule in MAMBA_NAMES.items() if name not in ("ssm_dt.bias", "ssm_norm.weight")},
            **{f"ssm_{part}_norm.weight": f"mamba.{part}_layernorm.weight" for part in ("dt", "b", "c")},
            **{f"ssm_dt.{kind}": f"mamba.dt_proj.{kind}" for kind in ("weight", "bias")},
            "ssm_x.weight": "mamba.x_proj.weight",
            "ssm_a": decay("mamba.A_log", lambda tensor: tensor.shape),
        },
    ),
    "nemotron_h": _NEMOTRON,
    "nemotron_h_moe": _NEMOTRON,
    "kimi-linear": Architecture(
        settings=_kimi_linear,
        heads=latent_heads,
        latent=True,
        names={
            **KEYS_AND_VALUES,
            **{f"{theirs}.weight": f"self_attn.{ours}.weight" for theirs, ours in _DELTA.items()},
            **{
                f"ssm_conv1d_{part}.weight": reshaped(f"self_attn.{part}_conv1d.weight", _taps_of_all) for part in "qkv"
            },
            "ssm_dt.bias": "self_attn.dt_bias",
            "ssm_a": decay("self_attn.A_log", lambda tensor: (1, 1, math.prod(tensor.shape), 1)),
        },
    ),
}
