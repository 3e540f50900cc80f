"""What llama.cpp's converters write for families with state spaces, and for Granite with sinks and windows."""

from __future__ import annotations

import torch
from gguf_changes import FULL, Config, Named, Values, of_granite, windows


def of_granite_swa(config: Config) -> Values:
    return {
        **of_granite(config),
        **windows(config),
        "expert_shared_feed_forward_length": config["shared_intermediate_size"] or None,
        "attention.rope_pattern": [base > 0 for base in config["layer_rope_theta"]],
    }


def granite_swa(config: Config, name: str, weight: torch.Tensor) -> Named:
    """Gates and ups stay together."""
    block, _, part = name.removeprefix("model.layers.").partition(".")
    parts = {
        "self_attn.sinks": "attn_sinks",
        "shared_mlp.input_linear.weight": "ffn_up_shexp",
        "shared_mlp.output_linear.weight": "ffn_down_shexp",
        "block_sparse_moe.experts.gate_up_proj": "ffn_gate_up_exps",
        "block_sparse_moe.experts.down_proj": "ffn_down_exps",
        "block_sparse_moe.input_linear.weight": "ffn_gate_up_exps",
        "block_sparse_moe.output_linear.weight": "ffn_down_exps",
        "block_sparse_moe.router.weight": "ffn_gate_inp",
    }
    yield f"blk.{block}.{parts[part]}.weight" if part in parts else name, weight


def of_jamba(config: Config) -> Values:
    keys, period, offset = (config[key] for key in ("num_key_value_heads", "attn_layer_period", "attn_layer_offset"))
    return {
        "attention.head_count_kv": [
            keys if layer % period == offset else 0 for layer in range(config["num_hidden_layers"])
        ],
        "ssm.conv_kernel": config["mamba_d_conv"],
        "ssm.inner_size": config["mamba_expand"] * config["hidden_size"],
        "ssm.state_size": config["mamba_d_state"],
        "ssm.time_step_rank": config["mamba_dt_rank"],
    }


def jamba(config: Config, name: str, weight: torch.Tensor) -> Named:
    if name.endswith("conv1d.weight"):
        weight = weight.squeeze()
    elif name.endswith(".A_log"):
        weight = -torch.exp(weight)
    yield name, weight


def of_nemotron(config: Config) -> Values:
    """The width of heads is not that of the rotations, which there are none of."""
    kinds, heads = config["layers_block_type"], config["mamba_num_heads"]
    return {
        "block_count": len(kinds),
        "attention.layer_norm_rms_epsilon": config["layer_norm_epsilon"],
        "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        "attention.head_count_kv": [config["num_key_value_heads"] if kind == FULL else 0 for kind in kinds],
        "feed_forward_length": [config["moe_intermediate_size"] if kind == "moe" else 0 for kind in kinds],
        "rope.dimension_count": config["hidden_size"] // config["num_attention_heads"],
        "rope.scaling.finetuned": False,
        "vocab_size": config["vocab_size"],
        "ssm.conv_kernel": config["conv_kernel"],
        "ssm.state_size": config["ssm_state_size"],
        "ssm.group_count": config["n_groups"],
        "ssm.inner_size": heads * config["mamba_head_dim"],
        "ssm.time_step_rank": heads,
        "expert_count": config["n_routed_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_feed_forward_length": config["moe_shared_expert_intermediate_size"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_norm": config["norm_topk_prob"],
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "moe_latent_size": config["moe_latent_size"],
    }


def nemotron(config: Config, name: str, weight: torch.Tensor) -> Named:
    if name.endswith("conv1d.weight"):
        weight = weight.squeeze()
    elif name.endswith(".A_log"):
        weight = -torch.exp(weight)[:, None]
    elif name.endswith("mixer.D"):
        weight = weight[:, None]
    elif name.endswith("mixer.norm.weight"):
        weight = weight.view(config["n_groups"], -1)
    yield name.replace(".dt_bias", ".dt.bias"), weight


def of_kimi_linear(config: Config) -> Values:
    rank, rotated = config["kv_lora_rank"], config["qk_rope_head_dim"]
    return {
        "attention.head_count_kv": [int(kind == FULL) for kind in config["layer_types"]],
        "attention.key_length": rank + rotated,
        "attention.value_length": config["head_dim"],
        "attention.key_length_mla": config["qk_nope_head_dim"] + rotated,
        "attention.value_length_mla": config["v_head_dim"],
        "attention.kv_lora_rank": rank,
        "attention.q_lora_rank": config["q_lora_rank"],
        "context_length": config["model_max_length"],
        "vocab_size": config["vocab_size"],
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "kda.head_dim": config["linear_head_dim"],
        "rope.dimension_count": rotated,
        "expert_used_count": config["num_experts_per_token"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_count": config["num_shared_experts"],
        "expert_gating_func": 2,
        "expert_group_count": config["num_expert_group"],
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "leading_dense_block_count": config["mlp_layer_types"].count("dense"),
    }


def kimi_linear(config: Config, name: str, weight: torch.Tensor) -> Named:
    if name.endswith("_conv1d.weight"):
        weight = weight.view(1, len(weight), 1, -1)
    elif name.endswith(".A_log"):
        weight = -torch.exp(weight)
    if name.endswith("kv_b_proj.weight"):
        sizes = (config["qk_nope_head_dim"], config["v_head_dim"])
        keys, values = weight.unflatten(0, (config["num_attention_heads"], -1)).split(sizes, 1)
        yield name.replace("kv_b_proj", "k_b_proj"), keys.transpose(1, 2)
        yield name.replace("kv_b_proj", "v_b_proj"), values
    else:
        yield name.replace(".dt_bias", ".dt_proj.bias"), weight
