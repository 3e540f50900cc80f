"""Metadata and tensors of GGUF files as llama.cpp's converters make them, for the families that have one of their own.

Names of tensors come from the ``gguf`` package, what converters change besides from ``gguf_changes``. The package that
the tests pin does not know the architectures of ``mellum``, ``cohere2_moe``, ``hy_v3`` and ``granitemoe_swa``: their
tensors have the names
of an architecture like theirs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from gguf_changes import (
    FULL,
    SLIDING,
    Config,
    Named,
    Tensors,
    Values,
    first,
    gemma4,
    granite_hybrid,
    lfm2,
    llama4,
    long_factors,
    maybe_float,
    of_afmoe,
    of_bamba,
    of_cohere,
    of_exaone,
    of_gemma2,
    of_gemma3,
    of_gemma4,
    of_granite,
    of_granite_hybrid,
    of_hunyuan_dense,
    of_hy,
    of_lfm2,
    of_llama,
    of_llama4,
    of_mimo2,
    of_mistral3,
    of_phi,
    of_qwen35,
    of_qwen_states,
    of_solar,
    plus_one,
    qwen_states,
    rotated,
    sinks,
    some_turn,
    tiled,
    windows,
)
from gguf_state_changes import (
    granite_swa,
    jamba,
    kimi_linear,
    nemotron,
    of_granite_swa,
    of_jamba,
    of_kimi_linear,
    of_nemotron,
)

_EXPERT = re.compile(r"((?:model|backbone)\.layers\.\d+\.(?:\w+\.)?experts)\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True, kw_only=True)
class Converter:
    """What sets the converter of a family apart.

    Arguments:
        architecture: of the file; names: whose names its tensors have, where the package does not know it.
        values: more metadata, without the architecture in front.
        change: the tensors that become of one.
        renamed: of names that the package does not know, as regular expressions.
        permuted: queries and keys are rotated as neighbouring channels.
        fused: gates and ups of experts stay in one tensor.
        rope_tensors: that the file has and the checkpoint has not.
    """

    architecture: str
    names: str = ""
    values: Callable[[Config], Values] = field(default=lambda config: {})
    change: Callable[[Config, str, torch.Tensor], Named] = field(
        default=lambda config, name, weight: iter([(name, weight)])
    )
    renamed: dict[str, str] = field(default_factory=dict)
    permuted: bool = False
    fused: bool = False
    rope_tensors: Callable[[Config], Tensors] = field(default=lambda config: {})


def as_converted(config: Config, weights: Tensors) -> tuple[str, Values, Tensors]:
    """The architecture, metadata by key without it, and tensors of a checkpoint."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    converter = CONVERTERS[config["model_type"]]
    known = {name: architecture for architecture, name in MODEL_ARCH_NAMES.items()}
    assert bool(converter.names) == (converter.architecture not in known), "the package's own names, where it has them"
    names = get_tensor_name_map(known[converter.names or converter.architecture], 8)
    tensors: Tensors = {}
    for name, weight in _together(config, converter, weights):
        theirs = name if name.endswith(".scale") else names.get_name(name, (".weight", ".bias"))
        if theirs is None and converter.names and name.startswith("blk."):
            theirs = name
        assert theirs is not None, name
        assert theirs not in tensors, theirs
        tensors[theirs] = weight.contiguous()
    tensors |= converter.rope_tensors(config)
    values = {**_common(config), **converter.values(config)}
    return converter.architecture, {key: value for key, value in values.items() if value is not None}, tensors


def _together(config: Config, converter: Converter, weights: Tensors) -> Named:
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
            if name.endswith("experts.gate_up_proj") and not converter.fused:
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
        "block_count": config.get("num_hidden_layers"),
        "context_length": config.get("max_position_embeddings"),
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


MIXTRAL = {
    r"\.mlp\.gate\.weight": ".block_sparse_moe.gate.weight",
    r"(?:mlp|block_sparse_moe)\.experts\.w1": "mlp.experts.gate_proj",
    r"(?:mlp|block_sparse_moe)\.experts\.w2": "mlp.experts.down_proj",
    r"(?:mlp|block_sparse_moe)\.experts\.w3": "mlp.experts.up_proj",
}
CONVERTERS: dict[str, Converter] = {
    "qwen3_next": Converter(architecture="qwen3next", values=of_qwen_states, change=qwen_states),
    "qwen3_5_text": Converter(architecture="qwen35", values=of_qwen35, change=tiled),
    "qwen3_5_moe_text": Converter(architecture="qwen35moe", values=of_qwen35, change=tiled),
    "granitemoehybrid": Converter(
        architecture="granitehybrid", values=of_granite_hybrid, change=granite_hybrid, permuted=True
    ),
    "bamba": Converter(architecture="granitehybrid", values=of_bamba, change=granite_hybrid, permuted=True),
    "granitemoe_swa": Converter(
        architecture="granite_swa", names="granitemoe", values=of_granite_swa, change=granite_swa, permuted=True
    ),
    "jamba": Converter(
        architecture="jamba", values=of_jamba, change=jamba, renamed={r"feed_forward\.experts": "mlp.experts"}
    ),
    "nemotron_h": Converter(
        architecture="nemotron_h_moe",
        values=of_nemotron,
        change=nemotron,
        renamed={r"^\w+(\.layers\.\d+)\.mixer\.experts": r"model\1.mlp.experts"},
    ),
    "kimi_linear": Converter(
        architecture="kimi-linear",
        values=of_kimi_linear,
        change=kimi_linear,
        renamed={r"block_sparse_moe\.((gate|up|down)_proj)": r"mlp.\1", **MIXTRAL},
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
    "phi3": Converter(architecture="phi3", values=of_phi, rope_tensors=long_factors),
    "phimoe": Converter(architecture="phimoe", values=of_phi, renamed=MIXTRAL, rope_tensors=long_factors),
    "glm": Converter(architecture="chatglm", values=lambda c: {"rope.dimension_count": rotated(c, 0.5)}),
    "glm4": Converter(architecture="glm4", values=lambda c: {"rope.dimension_count": rotated(c, 0.5)}),
    "gemma2": Converter(architecture="gemma2", values=of_gemma2, change=plus_one),
    "gemma3_text": Converter(architecture="gemma3", values=of_gemma3, change=plus_one),
    "gemma4_text": Converter(
        architecture="gemma4", values=of_gemma4, change=gemma4, fused=True, rope_tensors=some_turn
    ),
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
