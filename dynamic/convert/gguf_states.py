"""GGUF architectures in which most layers keep states: Gated DeltaNet, Mamba2, short convolutions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..checkpoint.gguf_file import GgufArray, GgufTensor
from .gguf_metadata import Metadata
from .gguf_parts import Config, Part, Rule, decay, same, shape_error, taps
from .gguf_settings import (
    FULL,
    KV_HEADS,
    SIGMOID,
    Architecture,
    Tensors,
    experts_of,
    first_size,
    granite_scales,
    has_bias,
    heads,
    routed_by,
    some_rotated,
    weights_scale,
)
from .gguf_state_spaces import MAMBA_NAMES

_LINEAR, _DELTA = "linear_attention", "linear_attn."
_CONV, _DECAY, _STEP = f"{_DELTA}conv1d.weight", f"{_DELTA}A_log", f"{_DELTA}dt_bias"
_QUERIES_TO_VALUES, _GATE, _OUT = (f"{_DELTA}{name}.weight" for name in ("in_proj_qkv", "in_proj_z", "out_proj"))
_B, _A = (f"{_DELTA}in_proj_{name}.weight" for name in "ba")


def _qwen(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    """What is alike in Qwen3-Next and Qwen3.5."""
    sections = meta.get(".rope.dimension_sections")  # of pictures; all of them are the position where there is text
    if sections is not None and not (isinstance(sections, GgufArray) and sections.count == 4):
        raise meta.error(".rope.dimension_sections", sections, "an array of 4 numbers")
    if (interval := meta.integer(".full_attention_interval", 4)) < 1:
        raise meta.error(".full_attention_interval", interval, "at least 1")
    linear: list[Any] = [(layer + 1) % interval for layer in range(meta.num_layers)]
    if meta.has(key := ".attention.recurrent_layers"):
        linear = meta.array_of_layers(key)
    value_heads, inner = meta.integer(".ssm.time_step_rank"), meta.integer(".ssm.inner_size")
    if not value_heads or inner % value_heads:
        raise meta.error(".ssm.inner_size", inner, f"a multiple of .ssm.time_step_rank={value_heads}")
    return {
        "layer_types": [_LINEAR if is_linear else FULL for is_linear in linear],
        "attention_bias": has_bias(tensors, "attn_q"),
        "linear_conv_kernel_dim": meta.integer(".ssm.conv_kernel"),
        "linear_key_head_dim": meta.integer(".ssm.state_size"),
        "linear_num_key_heads": meta.integer(".ssm.group_count"),
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": inner // value_heads,
    }


def _qwen35(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    return {"model_type": "qwen3_5", **_qwen(meta, tensors)}


def _qwen35moe(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    """Also of Qwen3-Next, whose projections lie apart in files as Qwen3.5's do."""
    experts = experts_of(meta, tensors, "num_experts", normalised=True)
    shared = first_size(tensors, ".ffn_up_shexp.weight")
    return {
        "model_type": "qwen3_5_moe",
        **_qwen(meta, tensors),
        "moe_intermediate_size": experts.pop("intermediate_size"),
        "shared_expert_intermediate_size": meta.integer(".expert_shared_feed_forward_length", shared),
        **experts,
    }


def _value_heads(config: Config) -> torch.Tensor:
    """Where each head of values is in a file: one of every group after the other, and not group by group."""
    groups, count = config["linear_num_key_heads"], config["linear_num_value_heads"]
    if groups < 1 or count % groups:
        return torch.arange(count)  # which is refused with the configuration
    return torch.arange(count).view(-1, groups).T.flatten()


def _rows_of_heads(tensor: GgufTensor, config: Config, width: int, first: int = 0) -> torch.Tensor:
    """Rows up to ``first``, and those of heads of values, each of ``width`` rows, group by group."""
    count = config["linear_num_value_heads"]
    if width < 1 or tensor.shape[0] != first + count * width:
        raise shape_error(tensor, f"{first} + {count} x {width} rows")
    heads = _value_heads(config)[:, None] * width + torch.arange(width)
    return torch.cat((torch.arange(first), first + heads.flatten()))


def _by_group(rule: Rule, width: str = "", *, behind_keys: bool = False) -> Rule:
    """Rows of heads of values.

    Arguments:
        rule: makes the part, with rows in the file's order.
        width: key of a head's rows; empty: one.
        behind_keys: rows of queries and keys are in front.
    """

    def make(tensor: GgufTensor, config: Config) -> list[Part]:
        keys = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"] if behind_keys else 0
        rows = _rows_of_heads(tensor, config, config[width] if width else 1, keys)
        return [replace(part, rows=rows) for part in rule.make(tensor, config)]

    return Rule(names=rule.names, make=make)


def _outputs(tensor: GgufTensor, config: Config) -> list[Part]:
    """The projection that reads heads of values."""
    width, count = config["linear_value_head_dim"], config["linear_num_value_heads"]
    if len(tensor.shape) != 2 or tensor.shape[1] != width * count:
        raise shape_error(tensor, f"two dimensions and {count} x {width} inputs")
    heads = _value_heads(config)
    return [
        Part(
            name=_OUT,
            shape=tensor.shape,
            heads=None if bool((heads == torch.arange(count)).all()) else heads,
            width=width,
        )
    ]


def _queries_to_gates(tensor: GgufTensor, config: Config) -> list[Part]:
    """As the first files of Qwen3-Next had them: of each group its queries, keys, values and gates."""
    groups, keys = config["linear_num_key_heads"], config["linear_key_head_dim"]
    values = config["linear_num_value_heads"] // max(groups, 1) * config["linear_value_head_dim"]
    if len(tensor.shape) != 2 or tensor.shape[0] != groups * 2 * (keys + values) or not groups:
        raise shape_error(tensor, f"two dimensions and {groups} x {2 * (keys + values)} rows")
    rows = torch.arange(tensor.shape[0]).view(groups, -1).split((keys, keys, values, values), 1)
    *mixed, gates = [part.flatten() for part in rows]
    both = {_QUERIES_TO_VALUES: torch.cat(mixed), _GATE: gates}
    return [Part(name=name, shape=(len(r), tensor.shape[1]), rows=r) for name, r in both.items()]


def _steps_and_decays(tensor: GgufTensor, config: Config) -> list[Part]:
    """Of each group first what becomes the steps of its heads, then the decays."""
    groups, count = config["linear_num_key_heads"], config["linear_num_value_heads"]
    if len(tensor.shape) != 2 or tensor.shape[0] != 2 * count or groups < 1 or count % groups:
        raise shape_error(tensor, f"two dimensions and 2 x {count} rows")
    rows = torch.arange(2 * count).view(groups, 2, -1)
    both = {_B: rows[:, 0].flatten(), _A: rows[:, 1].flatten()}
    return [Part(name=name, shape=(count, tensor.shape[1]), rows=r) for name, r in both.items()]


_POST_NORM = {"post_attention_norm.weight": "post_attention_layernorm.weight"}
_QWEN_NAMES = {
    **_POST_NORM,
    "attn_qkv.weight": _by_group(same(_QUERIES_TO_VALUES), "linear_value_head_dim", behind_keys=True),
    "attn_gate.weight": _by_group(same(_GATE), "linear_value_head_dim"),
    "ssm_conv1d.weight": _by_group(taps(_CONV), "linear_value_head_dim", behind_keys=True),
    "ssm_beta.weight": _by_group(same(_B)),
    "ssm_alpha.weight": _by_group(same(_A)),
    "ssm_dt.bias": _by_group(same(_STEP)),
    "ssm_a": _by_group(decay(_DECAY)),
    "ssm_norm.weight": f"{_DELTA}norm.weight",
    "ssm_out.weight": Rule(names=(_OUT,), make=_outputs),
}
_QWEN_NEXT_NAMES = {
    **_POST_NORM,
    "attn_qkv.weight": _QUERIES_TO_VALUES,
    "attn_gate.weight": _GATE,
    "ssm_in.weight": Rule(names=(_QUERIES_TO_VALUES, _GATE), make=_queries_to_gates),
    "ssm_conv1d.weight": taps(_CONV),
    "ssm_ba.weight": Rule(names=(_B, _A), make=_steps_and_decays),
    "ssm_dt.bias": _STEP,
    "ssm_a": decay(_DECAY),
    "ssm_norm.weight": f"{_DELTA}norm.weight",
    "ssm_out.weight": _OUT,
}


def _hybrid_heads(meta: Metadata) -> dict[str, Any]:
    """Files of Granite 4 rotate nothing, those of Bamba half of each head."""
    if not meta.flag(".rope.scaling.finetuned", True) or all(meta.by_layer(KV_HEADS)):
        return heads(meta)
    found = some_rotated(meta)
    if found["partial_rotary_factor"] != 0.5:
        # The converter finds half a head under a key that checkpoints of transformers 5 do not have any more.
        raise meta.error(
            ".rope.dimension_count",
            meta.get(".rope.dimension_count"),
            f"half the width of a head, {found['head_dim'] // 2}: among models with states only Bamba has rotations",
        )
    return found


def _granitehybrid(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    """Granite 4, or Bamba."""
    inner, hidden = meta.integer(".ssm.inner_size"), meta.integer(".embedding_length")
    if not hidden or inner % hidden:
        raise meta.error(".ssm.inner_size", inner, f"a multiple of .embedding_length={hidden}")
    states = {
        "attention_bias": has_bias(tensors, "attn_q"),
        "mamba_expand": inner // hidden,
        "mamba_n_heads": meta.integer(".ssm.time_step_rank"),
        "mamba_d_state": meta.integer(".ssm.state_size"),
        "mamba_n_groups": meta.integer(".ssm.group_count"),
        "mamba_d_conv": meta.integer(".ssm.conv_kernel"),
        "mamba_conv_bias": has_bias(tensors, "ssm_conv1d"),
        "mamba_proj_bias": has_bias(tensors, "ssm_in"),
    }
    keys = meta.by_layer(KV_HEADS)
    if "partial_rotary_factor" in _hybrid_heads(meta):
        indices = [layer for layer, count in enumerate(keys) if count]
        return {**states, "model_type": "bamba", "mlp_bias": has_bias(tensors, "ffn_up"), "attn_layer_indices": indices}
    width, experts = meta.integer(".feed_forward_length", 0), {"num_local_experts": 0}
    meta.get(".expert_used_count")  # there without experts too
    if meta.integer(".expert_count", 0):
        experts = experts_of(meta, tensors, "num_local_experts", normalised=True)
        experts["intermediate_size"] = experts["intermediate_size"] or width
    return {
        **states,
        "model_type": "granitemoehybrid",
        "layer_types": ["attention" if count else "mamba" for count in keys],
        "position_embedding_type": "rope" if meta.flag(".rope.scaling.finetuned", True) else "nope",
        "shared_intermediate_size": meta.integer(".expert_shared_feed_forward_length", 0) or width,
        **granite_scales(meta),
        **experts,
    }


def _lfm2(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    return {
        "model_type": "lfm2",
        "layer_types": [FULL if count else "conv" for count in meta.by_layer(KV_HEADS)],
        "conv_L_cache": meta.integer(".shortconv.l_cache"),
        "conv_bias": has_bias(tensors, "shortconv.conv", "shortconv.in_proj"),
        "block_auto_adjust_ff_dim": False,
    }


def _lfm2moe(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    routed_by(meta, SIGMOID)
    experts = experts_of(meta, tensors, "num_experts", normalised=True)
    found = {**_lfm2(meta, tensors), "model_type": "lfm2_moe"}
    del found["block_auto_adjust_ff_dim"]
    return {
        **found,
        "moe_intermediate_size": experts.pop("intermediate_size"),
        "num_dense_layers": meta.integer(".leading_dense_block_count", 0),
        "use_expert_bias": any(name.endswith(".exp_probs_b.bias") for name in tensors),
        "routed_scaling_factor": weights_scale(meta),
        **experts,
    }


_LFM2: dict[str, Any] = {
    "heads": heads,
    "epsilons": {".attention.layer_norm_rms_epsilon": "norm_eps"},
    "others": {"token_embd_norm.weight": "model.norm.weight"},
    "names": {
        **{f"shortconv.in_proj.{kind}": f"conv.in_proj.{kind}" for kind in ("weight", "bias")},
        **{f"shortconv.out_proj.{kind}": f"conv.out_proj.{kind}" for kind in ("weight", "bias")},
        "shortconv.conv.weight": taps("conv.conv.weight"),
        "shortconv.conv.bias": "conv.conv.bias",
    },
}
_QWEN: dict[str, Any] = {"heads": some_rotated, "norm_offset": 1.0}

STATES: dict[str, Architecture] = {
    "qwen3next": Architecture(settings=_qwen35moe, names=_QWEN_NEXT_NAMES, **_QWEN),
    "qwen35": Architecture(settings=_qwen35, names=_QWEN_NAMES, **_QWEN),
    "qwen35moe": Architecture(settings=_qwen35moe, names=_QWEN_NAMES, **_QWEN),
    "granitehybrid": Architecture(settings=_granitehybrid, heads=_hybrid_heads, rotary_pairs=True, names=MAMBA_NAMES),
    "lfm2": Architecture(settings=_lfm2, **_LFM2),
    "lfm2moe": Architecture(settings=_lfm2moe, **_LFM2),
}
