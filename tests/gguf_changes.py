"""What llama.cpp's converters write for each family: metadata of its own, and tensors that are not the checkpoint's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

Config, Values, Named = dict[str, Any], dict[str, Any], Iterator[tuple[str, torch.Tensor]]
Tensors = dict[str, torch.Tensor]
FULL, SLIDING = "full_attention", "sliding_attention"


def first(config: Config, *keys: str) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), None)


def maybe_float(value: Any) -> float | None:
    return None if value is None else float(value)


def rotated(config: Config, default: float = 1.0) -> int:
    """Channels of a head that are rotated."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    ropes = config.get("rope_parameters") or {}
    return int(head_dim * ropes.get("partial_rotary_factor", config.get("partial_rotary_factor") or default))


def of_llama(config: Config) -> Values:
    return {"vocab_size": config["vocab_size"], "rope.dimension_count": rotated(config)}


def of_granite(config: Config) -> Values:
    return {
        **of_llama(config),
        **{"attention.key_length": None, "attention.value_length": None},
        "attention.scale": config["attention_multiplier"],
        "embedding_scale": config["embedding_multiplier"],
        "residual_scale": config["residual_multiplier"],
        "logit_scale": config["logits_scaling"],
    }


def of_mamba2(config: Config, attends: list[bool]) -> Values:
    return {
        "ssm.conv_kernel": config["mamba_d_conv"],
        "ssm.state_size": config["mamba_d_state"],
        "ssm.group_count": config["mamba_n_groups"],
        "ssm.inner_size": config["mamba_expand"] * config["hidden_size"],
        "ssm.time_step_rank": config["mamba_n_heads"],
        "attention.head_count_kv": [config["num_key_value_heads"] if attends_ else 0 for attends_ in attends],
    }


def of_bamba(config: Config) -> Values:
    """The file calls itself Granite's: without factors, but with rotated heads."""
    return {
        **of_llama(config),
        **{"attention.key_length": None, "attention.value_length": None},
        **of_mamba2(config, [layer in config["attn_layer_indices"] for layer in range(config["num_hidden_layers"])]),
        "rope.scaling.finetuned": True,
    }


def of_granite_hybrid(config: Config) -> Values:
    attends = [kind in ("attention", FULL) for kind in config["layer_types"]]
    return {
        **of_granite(config),
        **of_mamba2(config, attends),
        "expert_shared_feed_forward_length": config["shared_intermediate_size"],
        "rope.scaling.finetuned": config.get("position_embedding_type") == "rope",
        **({} if config.get("position_embedding_type") == "rope" else {"context_length": 2**20}),
    }


def granite_hybrid(config: Config, name: str, weight: torch.Tensor) -> Named:
    ending = "_shexp" if config.get("num_local_experts") else ""
    prefix, _, last = name.partition(".shared_mlp.")
    if last:
        parts = {"gate": weight, "up": weight} if last == "input_linear.weight" else {"down": weight}
        for (part, _), half in zip(parts.items(), weight.chunk(len(parts)), strict=True):
            yield f"blk.{prefix.rpartition('.')[2]}.ffn_{part}{ending}.weight", half
    elif name.endswith("block_sparse_moe.input_linear.weight"):
        for part, half in zip(("gate", "up"), weight.chunk(2, 1), strict=True):
            yield name.replace("block_sparse_moe.input_linear", f"mlp.experts.{part}_proj"), half
    elif name.endswith(".dt_bias"):
        yield name.replace(".dt_bias", ".dt_proj.bias"), weight
    elif name.endswith("conv1d.weight"):
        yield name, weight.squeeze()
    elif name.endswith(".A_log"):
        yield name, -torch.exp(weight)[:, None]
    elif name.endswith("mamba.D"):
        yield name, weight[:, None]
    elif name.endswith("mamba.norm.weight"):
        yield name, weight.view(config["mamba_n_groups"], -1)
    else:
        yield name, weight


def of_qwen_states(config: Config) -> Values:
    heads = config["linear_num_value_heads"]
    ropes = config["rope_parameters"]
    return {
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
        "expert_shared_feed_forward_length": config.get("shared_expert_intermediate_size"),
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": config["linear_key_head_dim"],
        "ssm.group_count": config["linear_num_key_heads"],
        "ssm.time_step_rank": heads,
        "ssm.inner_size": config["linear_value_head_dim"] * heads,
        "full_attention_interval": config["layer_types"].index(FULL) + 1,
        "rope.dimension_count": int(config["head_dim"] * ropes.get("partial_rotary_factor", 0.25)),
    }


def of_qwen35(config: Config) -> Values:
    return {**of_qwen_states(config), "rope.dimension_sections": [11, 11, 10, 0]}


def qwen_states(config: Config, name: str, weight: torch.Tensor) -> Named:
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    key, value = config["linear_key_head_dim"], config["linear_value_head_dim"]
    if name.endswith(".A_log"):
        weight = -torch.exp(weight)
    elif name.endswith(".dt_bias"):
        name = name.replace(".dt_bias", ".dt_proj.bias")
    elif name.endswith("conv1d.weight"):
        weight = weight.squeeze()
    elif name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        weight = weight + 1
    if name.endswith("in_proj_qkvz.weight"):
        each = values // keys * value
        q, k, v, z = weight.unflatten(0, (keys, -1)).split((key, key, each, each), 1)
        yield name.replace("qkvz", "qkv"), torch.cat([part.flatten(0, 1) for part in (q, k, v)])
        yield name.replace("qkvz", "z"), z.flatten(0, 1)
    else:
        yield name, weight


def tiled(config: Config, name: str, weight: torch.Tensor) -> Named:
    """Heads of values, one of each group after the other."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    front, width = 2 * keys * config["linear_key_head_dim"], config["linear_value_head_dim"]

    def reorder(part: torch.Tensor, size: int) -> torch.Tensor:
        return part.unflatten(0, (keys, values // keys, size)).transpose(0, 1).flatten(0, 2)

    for theirs, changed in qwen_states(config, name, weight):
        if "linear_attn." not in theirs or theirs.endswith("norm.weight"):
            yield theirs, changed
        elif "in_proj_qkv." in theirs or "conv1d" in theirs:
            yield theirs, torch.cat((changed[:front], reorder(changed[front:], width)))
        elif "out_proj" in theirs:
            yield theirs, reorder(changed.T, width).T
        else:
            yield theirs, reorder(changed, width if "in_proj_z" in theirs else 1)


def of_lfm2(config: Config) -> Values:
    size = config.get("block_ff_dim") or config["intermediate_size"]
    if config["model_type"] == "lfm2" and config["block_auto_adjust_ff_dim"]:
        size = int(config["block_ffn_dim_multiplier"] * int(2 * size / 3))
        size = config["block_multiple_of"] * -(-size // config["block_multiple_of"])
    sparse = config["model_type"] == "lfm2_moe"
    return {
        "attention.head_count_kv": [
            0 if kind == "conv" else config["num_key_value_heads"] for kind in config["layer_types"]
        ],
        "vocab_size": config["vocab_size"],
        "shortconv.l_cache": config["conv_L_cache"],
        "feed_forward_length": size,
        **(
            {
                "expert_feed_forward_length": config["moe_intermediate_size"],
                "leading_dense_block_count": config["num_dense_layers"],
                "expert_gating_func": 2,
            }
            if sparse
            else {}
        ),
    }


def lfm2(config: Config, name: str, weight: torch.Tensor) -> Named:
    if "conv.conv.weight" in name:
        weight = weight.squeeze(1)
    yield name.replace(".expert_bias", ".expert_bias.bias"), weight


def plus_one(config: Config, name: str, weight: torch.Tensor) -> Named:
    yield name, weight + 1 if name.endswith("norm.weight") else weight


def of_gemma2(config: Config) -> Values:
    return {
        "rope.freq_base": None,
        "attn_logit_softcapping": config["attn_logit_softcapping"],
        "final_logit_softcapping": config["final_logit_softcapping"],
        "attention.sliding_window": config["sliding_window"],
    }


def of_gemma3(config: Config) -> Values:
    return {
        "final_logit_softcapping": config.get("final_logit_softcapping"),
        "attention.sliding_window": config["sliding_window"],
    }


def of_full_layers(config: Config) -> Config:
    """Sizes of the heads of Gemma 4's layers that see all."""
    number = config["layer_types"].index(FULL)
    return {**config, **config["per_layer_config"].get(str(number), {})}


def of_gemma4(config: Config) -> Values:
    slides = [kind == SLIDING for kind in config["layer_types"]]
    full, own = of_full_layers(config), config["num_key_value_heads"]
    return {
        **of_gemma3(config),
        "attention.shared_kv_layers": config["num_kv_shared_layers"],
        "embedding_length_per_layer_input": config["hidden_size_per_layer_input"] or 0,
        "attention.sliding_window_pattern": slides,
        "attention.key_length": full["head_dim"],
        "attention.value_length": full["head_dim"],
        "attention.key_length_swa": config["head_dim"],
        "attention.value_length_swa": config["head_dim"],
        "rope.dimension_count": full["head_dim"],
        "rope.dimension_count_swa": config["head_dim"],
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
        "attention.head_count_kv": [own if slide else full["num_key_value_heads"] for slide in slides],
    }


def gemma4(config: Config, name: str, weight: torch.Tensor) -> Named:
    """Scales of the router's input and of experts."""
    scales = {"router.scale": "ffn_gate_inp", "router.per_expert_scale": "ffn_down_exps"}
    block, _, part = name.removeprefix("model.layers.").partition(".")
    if part in scales:
        yield f"blk.{block}.{scales[part]}.scale", weight
    else:
        yield f"{name}.weight" if name.endswith("layer_scalar") else name, weight


def some_turn(config: Config) -> Tensors:
    """Divisors of frequencies: huge ones for what is not rotated."""
    part = config["rope_parameters"][FULL]["partial_rotary_factor"]
    width = of_full_layers(config)["head_dim"]
    turning = int(width * part / 2)
    return {"rope_freqs.weight": torch.tensor([1.0] * turning + [1e30] * (width // 2 - turning))}


def windows(config: Config) -> Values:
    """The window, and in which layers it is."""
    kinds = [kind == SLIDING for kind in config["layer_types"]]
    return {"attention.sliding_window": config["sliding_window"], "attention.sliding_window_pattern": kinds}


def of_exaone(config: Config) -> Values:
    return {
        **windows(config),
        "vocab_size": config["vocab_size"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_count": config["num_shared_experts"],
        "expert_shared_feed_forward_length": config["moe_intermediate_size"] * config["num_shared_experts"],
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_weights_norm": config["norm_topk_prob"],
        "leading_dense_block_count": config["mlp_layer_types"].count("dense"),
        "nextn_predict_layers": 0,
        "rope.scaling.type": "none",
    }


def of_afmoe(config: Config) -> Values:
    return {
        **of_llama(config),
        "expert_gating_func": 2,
        "expert_shared_count": config["num_shared_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "leading_dense_block_count": config["num_dense_layers"],
        "expert_weights_norm": True,
        "expert_weights_scale": float(config["route_scale"]),
        "attention.sliding_window": config["sliding_window"],
    }


def of_phi(config: Config) -> Values:
    """Phi-3's converter writes what it needs and nothing else."""
    rope = config["rope_parameters"]
    original = first({**config, **rope}, "original_max_position_embeddings") or config["max_position_embeddings"]
    scale = config["max_position_embeddings"] / original
    values: Values = {
        **{"attention.key_length": None, "attention.value_length": None},
        "rope.scaling.original_context_length": original,
        "rope.dimension_count": rotated(config),
        "attention.sliding_window": config.get("sliding_window") or 0,
    }
    if rope.get("rope_type") == "longrope":
        values["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    return values


def long_factors(config: Config) -> Tensors:
    """LongRoPE's."""
    rope = config["rope_parameters"]
    kinds = ("long", "short") if rope.get("rope_type") == "longrope" else ()
    return {f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"]) for kind in kinds}


def of_hunyuan_dense(config: Config) -> Values:
    rope, width = config["rope_parameters"], config["head_dim"]
    if rope["rope_type"] != "dynamic":
        return {}
    base = (rope.get("rope_theta") or 10000.0) * rope["alpha"] ** (width / (width - 2))
    return {"rope.freq_base": base, "rope.scaling.type": "none", "rope.scaling.factor": 1.0}


def of_mistral3(config: Config) -> Values:
    rope = config["rope_parameters"]
    return {
        **of_llama(config),
        "rope.scaling.yarn_log_multiplier": float(rope.get("mscale_all_dim", 1.0)),
        "attention.temperature_scale": rope["llama_4_scaling_beta"],
    }


def of_llama4(config: Config) -> Values:
    return {
        **of_llama(config),
        "feed_forward_length": config["intermediate_size_mlp"],
        "interleave_moe_layer_step": config["interleave_moe_layer_step"],
        "expert_feed_forward_length": config["intermediate_size"],
    }


def llama4(config: Config, name: str, weight: torch.Tensor) -> Named:
    """Experts have their inputs in front of their outputs in the checkpoint."""
    if ".experts." in name and weight.dim() == 3:
        weight = weight.transpose(1, 2)
    yield name, weight


def of_mimo2(config: Config) -> Values:
    slides = [kind == SLIDING for kind in config["layer_types"]]
    keys = config["num_key_value_heads"]
    return {
        "attention.head_count_kv": [keys * (1 + slide) for slide in slides],
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": slides,
        "attention.value_length": config["v_head_dim"],
        "attention.value_scale": config.get("attention_value_scale"),
        "expert_count": config["n_routed_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_gating_func": 2,
        "rope.dimension_count": mimo_rotated(config),
        "nextn_predict_layers": 0,
    }


def mimo_rotated(config: Config) -> int:
    part = config["rope_parameters"][SLIDING].get("partial_rotary_factor") or config.get("partial_rotary_factor", 0.334)
    return int(config["head_dim"] * part)


def sinks(config: Config, name: str, weight: torch.Tensor) -> Named:
    yield f"{name}.weight" if name.endswith(("sinks", "attention_sink_bias")) else name, weight


def of_cohere(config: Config) -> Values:
    return {
        **windows(config),
        "vocab_size": config["vocab_size"],
        "logit_scale": config["logit_scale"],
        "expert_feed_forward_length": config["intermediate_size"],
        "leading_dense_block_count": config["mlp_layer_types"].count("dense"),
        "expert_weights_norm": config.get("norm_topk_prob", False),
        "expert_gating_func": 2,
        "expert_shared_count": config["num_shared_experts"],
        "expert_shared_feed_forward_length": config["intermediate_size"] * config["num_shared_experts"],
        "rope.dimension_count": config["head_dim"],
        "rope.scaling.type": "none",
    }


def of_hy(config: Config) -> Values:
    return {
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_feed_forward_length": config["moe_intermediate_size"] * config["num_shared_experts"],
        "expert_gating_func": 2,
        "expert_weights_norm": True,
        "expert_weights_scale": float(config["router_scaling_factor"]),
    }


def of_solar(config: Config) -> Values:
    return {
        "rope.dimension_count": rotated(config),
        "expert_count": config["n_routed_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_count": config["n_shared_experts"],
        "leading_dense_block_count": config.get("first_k_dense_replace", 0),
        "expert_gating_func": 2,
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_weights_norm": config["norm_topk_prob"],
    }
