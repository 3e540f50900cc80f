"""Metadata and tensors of GGUF files as llama.cpp's converters make them, for the families that have one of their own.

Names of tensors come from the ``gguf`` package; what converters change besides is written down here, family by family.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

Config, Values, Named = dict[str, Any], dict[str, Any], Iterator[tuple[str, torch.Tensor]]
FULL, SLIDING = "full_attention", "sliding_attention"
_EXPERT = re.compile(r"(model\.layers\.\d+\.(?:\w+\.)?experts)\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True, kw_only=True)
class Converter:
    """What sets the converter of a family apart.

    Arguments:
        architecture: of the file; names: whose names its tensors have, where the package does not know it.
        values: more metadata, without the architecture in front.
        change: the tensors that become of one.
        renamed: of names that the package does not know, as regular expressions.
        permuted: queries and keys are rotated as neighbouring channels.
    """

    architecture: str
    names: str = ""
    values: Callable[[Config], Values] = field(default=lambda config: {})
    change: Callable[[Config, str, torch.Tensor], Named] = field(
        default=lambda config, name, weight: iter([(name, weight)])
    )
    renamed: dict[str, str] = field(default_factory=dict)
    permuted: bool = False


def as_converted(config: Config, weights: dict[str, torch.Tensor]) -> tuple[str, Values, dict[str, torch.Tensor]]:
    """The architecture, metadata by key without it, and tensors of a checkpoint."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    converter = CONVERTERS[config["model_type"]]
    known = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(known[converter.names or converter.architecture], config["num_hidden_layers"])
    assert isinstance(known["llama"], MODEL_ARCH)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in _together(config, converter, weights):
        theirs = name if name.endswith(".scale") else names.get_name(name, (".weight", ".bias"))
        assert theirs is not None, name
        assert theirs not in tensors, theirs
        tensors[theirs] = weight.contiguous()
    tensors |= _rope_tensors(config, converter)
    values = {**_common(config), **converter.values(config)}
    return converter.architecture, {key: value for key, value in values.items() if value is not None}, tensors


def _together(config: Config, converter: Converter, weights: dict[str, torch.Tensor]) -> Named:
    """Experts in one tensor; what the converter changes."""
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for full, stored in weights.items():
        if match := _EXPERT.fullmatch(full):
            experts.setdefault(f"{match[1]}.{match[3]}.weight", {})[int(match[2])] = stored.float()
    stacked = {name: torch.stack([of[n] for n in sorted(of)]) for name, of in experts.items()}
    rest = {name: weight.float() for name, weight in weights.items() if not _EXPERT.fullmatch(name)}
    for full, whole in {**rest, **stacked}.items():
        for name, weight in converter.change(config, full, whole):
            for pattern, replacement in converter.renamed.items():
                name = re.sub(pattern, replacement, name)
            if name.endswith("experts.gate_up_proj") and config["model_type"] != "gemma4_text":
                halves = zip(("gate", "up"), weight.chunk(2, 1), strict=True)
                yield from ((name.replace("gate_up_proj", f"{part}_proj.weight"), half) for part, half in halves)
            elif name.endswith(("experts.down_proj", "experts.gate_up_proj")):
                yield f"{name}.weight", weight
            elif converter.permuted and re.search(r"\.[qk]_proj\.", name):
                heads = config["num_attention_heads" if ".q_proj" in name else "num_key_value_heads"]
                yield name, weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
            else:
                yield name.replace("e_score_correction_bias", "e_score_correction.bias"), weight


def _common(config: Config) -> Values:
    """What every converter writes."""
    ropes = config.get("rope_parameters") or {}
    rope = ropes.get(FULL, ropes)
    eps, layer_eps = first(config, "rms_norm_eps", "norm_eps"), config.get("layer_norm_eps")
    values = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config.get("intermediate_size"),
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config.get("num_key_value_heads"),
        "attention.layer_norm_rms_epsilon": eps,
        "attention.layer_norm_epsilon": layer_eps,
        "attention.key_length": config.get("head_dim"),
        "attention.value_length": config.get("head_dim"),
        "rope.freq_base": maybe_float(rope.get("rope_theta")),
        "rope.freq_base_swa": maybe_float(ropes.get(SLIDING, {}).get("rope_theta")),
        "expert_count": first(config, "num_local_experts", "num_experts"),
        "expert_used_count": first(config, "num_experts_per_tok", "top_k_experts"),
        "expert_group_count": config.get("n_group"),
        "expert_group_used_count": config.get("topk_group"),
        "expert_gating_func": {"sigmoid": 2, "softmax": 1}.get(
            first(config, "score_function", "scoring_func", "score_func")
        ),
    }
    kind = rope.get("rope_type")
    if kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        values |= {
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_attn_factor": maybe_float(rope.get("attention_factor")),
            "rope.scaling.yarn_beta_fast": maybe_float(rope.get("beta_fast")),
            "rope.scaling.yarn_beta_slow": maybe_float(rope.get("beta_slow")),
        }
    return values


def _rope_tensors(config: Config, converter: Converter) -> dict[str, torch.Tensor]:
    ropes = config.get("rope_parameters") or {}
    if converter.architecture == "gemma4":
        part, width = ropes[FULL]["partial_rotary_factor"], of_full_layers(config)["head_dim"]
        turning = int(width * part / 2)
        return {"rope_freqs.weight": torch.tensor([1.0] * turning + [1e30] * (width // 2 - turning))}
    if converter.architecture in ("phi3", "phimoe") and ropes.get("rope_type") == "longrope":
        kinds = ("long", "short")
        return {f"rope_factors_{kind}.weight": torch.tensor(ropes[f"{kind}_factor"]) for kind in kinds}
    return {}


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


def of_granite_hybrid(config: Config) -> Values:
    attends = [kind in ("attention", FULL) for kind in config["layer_types"]]
    return {
        **of_granite(config),
        "expert_shared_feed_forward_length": config["shared_intermediate_size"],
        "ssm.conv_kernel": config["mamba_d_conv"],
        "ssm.state_size": config["mamba_d_state"],
        "ssm.group_count": config["mamba_n_groups"],
        "ssm.inner_size": config["mamba_expand"] * config["hidden_size"],
        "ssm.time_step_rank": config["mamba_n_heads"],
        "attention.head_count_kv": [config["num_key_value_heads"] if attends_ else 0 for attends_ in attends],
        "rope.scaling.finetuned": config.get("position_embedding_type") == "rope",
        **({} if config.get("position_embedding_type") == "rope" else {"context_length": 2**20}),
    }


def granite_hybrid(config: Config, name: str, weight: torch.Tensor) -> Named:
    ending = "_shexp" if config["num_local_experts"] else ""
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
    sections = {} if config["model_type"] == "qwen3_next" else {"rope.dimension_sections": [11, 11, 10, 0]}
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
        **sections,
    }


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
        "expert_shared_count": config["num_shared_experts"],
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


MIXTRAL = {
    r"\.mlp\.gate\.weight": ".block_sparse_moe.gate.weight",
    r"(?:mlp|block_sparse_moe)\.experts\.w1": "mlp.experts.gate_proj",
    r"(?:mlp|block_sparse_moe)\.experts\.w2": "mlp.experts.down_proj",
    r"(?:mlp|block_sparse_moe)\.experts\.w3": "mlp.experts.up_proj",
}
CONVERTERS: dict[str, Converter] = {
    "qwen3_next": Converter(architecture="qwen3next", values=of_qwen_states, change=qwen_states),
    "qwen3_5_text": Converter(architecture="qwen35", values=of_qwen_states, change=tiled),
    "qwen3_5_moe_text": Converter(architecture="qwen35moe", values=of_qwen_states, change=tiled),
    "granitemoehybrid": Converter(
        architecture="granitehybrid", values=of_granite_hybrid, change=granite_hybrid, permuted=True
    ),
    "lfm2": Converter(architecture="lfm2", values=of_lfm2, change=lfm2),
    "lfm2_moe": Converter(
        architecture="lfm2moe",
        values=of_lfm2,
        change=lfm2,
        renamed={r"model\.(layers\.\d+\.feed_forward\.experts\.w)": r"\1"},
    ),
    "granite": Converter(architecture="granite", values=of_granite, permuted=True),
    "smollm3": Converter(architecture="smollm3", values=of_llama, permuted=True),
    "phi3": Converter(architecture="phi3", values=of_phi),
    "phimoe": Converter(architecture="phimoe", values=of_phi, renamed=MIXTRAL),
    "glm": Converter(architecture="chatglm", values=lambda c: {"rope.dimension_count": rotated(c, 0.5)}),
    "glm4": Converter(architecture="glm4", values=lambda c: {"rope.dimension_count": rotated(c, 0.5)}),
    "gemma2": Converter(architecture="gemma2", values=of_gemma2, change=plus_one),
    "gemma3_text": Converter(architecture="gemma3", values=of_gemma3, change=plus_one),
    "gemma4_text": Converter(architecture="gemma4", values=of_gemma4, change=gemma4),
    "olmo2": Converter(architecture="olmo2"),
    "olmo3": Converter(architecture="olmo2", values=windows),
    "ernie4_5": Converter(architecture="ernie4_5"),
    "exaone_moe": Converter(architecture="exaone-moe", values=of_exaone),
    "afmoe": Converter(architecture="afmoe", values=of_afmoe, renamed={r"\.expert_bias$": ".expert_bias.bias"}),
    "hunyuan_v1_dense": Converter(architecture="hunyuan-dense", values=of_hunyuan_dense),
    "minimax_m2": Converter(
        architecture="minimax-m2",
        values=lambda c: {
            "expert_feed_forward_length": c["intermediate_size"],
            "expert_gating_func": 2,
            "rope.dimension_count": rotated(c),
        },
        renamed=MIXTRAL,
    ),
    "llama4_text": Converter(architecture="llama4", values=of_llama4, change=llama4),
    "mimo_v2_flash": Converter(architecture="mimo2", values=of_mimo2, change=sinks),
    "ministral3": Converter(architecture="mistral3", values=of_mistral3, permuted=True),
    "mellum": Converter(
        architecture="mellum",
        names="qwen3moe",
        values=lambda c: {"expert_feed_forward_length": c["moe_intermediate_size"], **windows(c)},
    ),
    "cohere2_moe": Converter(architecture="cohere2moe", names="dots1", values=of_cohere),
    "hy_v3": Converter(architecture="hy_v3", names="dots1", values=of_hy),
    "solar_open": Converter(architecture="glm4moe", values=of_solar),
}
