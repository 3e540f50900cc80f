"""The table of GGUF's architectures: their metadata as a ``config.json``, their tensors under Hugging Face's names.

A new architecture is a new entry here. Rules and defaults are those of llama.cpp, which the files are made for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..checkpoint.gguf_file import GgufTensor
from ..checkpoint.weights import CheckpointError
from ..model.families import FAMILIES
from ..model.family import one_each
from .gguf_latent import DEEPSEEK2
from .gguf_metadata import Metadata
from .gguf_rope import ROPE_FREQUENCIES, rope_scaling
from .gguf_settings import TOP_K_THEN_SOFTMAX, Architecture, Tensors, experts_of, has_bias, head_dim_of, heads_of
from .gguf_shared_experts import SHARED_EXPERTS

STACKED = "_exps."  # in the names of tensors that hold all experts of a layer
_MOST_LAYERS = 1 << 12
_SMALLEST_EXPERT = 1024  # bytes of a projection: no file may name far more tensors than it has bytes for
# Frequencies of the rotary embedding, which follow from the metadata: old files have them, llama.cpp skips them.
_SKIPPED = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")
_BLOCK_TENSOR = re.compile(
    r"blk\.(?P<block>0|[1-9]\d{0,4})\.(?P<part>\w+?)(\.(?P<expert>0|[1-9]\d{0,4}))?\.(?P<kind>weight|bias)"
)
_OTHER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    **{f"ffn_{part}_shexp": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")},
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_EXPERTS = {"ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down"}
CLASSES = {
    **{"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM"},
    **{"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "olmoe": "OlmoeForCausalLM"},
    **{"qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"},
    **{"granitemoe": "GraniteMoeForCausalLM", "gpt_oss": "GptOssForCausalLM"},
    **{"granitemoeshared": "GraniteMoeSharedForCausalLM", "glm4_moe": "Glm4MoeForCausalLM"},
    **{"dots1": "Dots1ForCausalLM", "ernie4_5_moe": "Ernie4_5_MoeForCausalLM"},
    "hunyuan_v1_moe": "HunYuanMoEV1ForCausalLM",
    **{"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"},
}


def _llama(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    """Llama, Mistral and Mixtral, and what has Llama's shape and biases."""
    window = {"sliding_window": meta.integer(".attention.sliding_window", 0) or None}
    if meta.integer(".expert_count", 0):
        return {"model_type": "mixtral", **window, **experts_of(meta, tensors, "num_local_experts", normalised=True)}
    if window["sliding_window"]:
        return {"model_type": "mistral", **window}
    if has_bias(tensors, "attn_q") and not has_bias(tensors, "attn_output"):
        return {"model_type": "qwen2", "use_sliding_window": False}
    return {
        "model_type": "llama",
        "attention_bias": has_bias(tensors, "attn_q", "attn_output"),
        "mlp_bias": has_bias(tensors, "ffn_up"),
    }


def _qwen2(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    return {"model_type": "qwen2", **_window(meta)}


def _qwen3(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    return {"model_type": "qwen3", "attention_bias": has_bias(tensors, "attn_q"), **_window(meta)}


def _olmoe(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    clip = meta.number(".attention.clamp_kqv", 0.0)
    return {
        "model_type": "olmoe",
        "attention_bias": has_bias(tensors, "attn_q"),
        "clip_qkv": clip or None,
        "norm_topk_prob": meta.flag(".expert_weights_norm", False),
        **experts_of(meta, tensors, "num_experts"),
    }


def _qwen2moe(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    shared = next((t.shape[0] for name, t in tensors.items() if name.endswith(".ffn_up_shexp.weight")), 0)
    if meta.integer(".expert_shared_count", 1) != 1:
        raise meta.error(".expert_shared_count", meta.get(".expert_shared_count"), "1")
    return {
        "model_type": "qwen2_moe",
        "qkv_bias": has_bias(tensors, "attn_q"),
        "shared_expert_intermediate_size": meta.integer(".expert_shared_feed_forward_length", shared),
        **_window(meta),
        **_sparse_qwen(meta, tensors, normalised=False),
    }


def _qwen3moe(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    window = _window(meta)
    if "full_attention" in window.pop("layer_types", ()):
        raise meta.error(".attention.sliding_window_pattern", "some layers", "all layers, or none")
    bias = {"attention_bias": has_bias(tensors, "attn_q")}
    return {"model_type": "qwen3_moe", **bias, **window, **_sparse_qwen(meta, tensors, normalised=True)}


def _gpt_oss(meta: Metadata, tensors: Tensors) -> dict[str, Any]:
    if (rule := meta.integer(".expert_gating_func", 0)) not in (0, TOP_K_THEN_SOFTMAX):
        raise meta.error(".expert_gating_func", rule, f"{TOP_K_THEN_SOFTMAX}, or left away")
    return {
        "model_type": "gpt_oss",
        "attention_bias": has_bias(tensors, "attn_q", "attn_output"),
        "sliding_window": meta.integer(".attention.sliding_window"),
        **experts_of(meta, tensors, "num_local_experts", normalised=True),
    }


def _sparse_qwen(meta: Metadata, tensors: Tensors, *, normalised: bool) -> dict[str, Any]:
    dense = [n for n in range(meta.integer(".block_count")) if f"blk.{n}.ffn_gate.weight" in tensors]
    experts = experts_of(meta, tensors, "num_experts")
    return {
        "norm_topk_prob": meta.flag(".expert_weights_norm", normalised),
        "moe_intermediate_size": experts.pop("intermediate_size"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        **experts,
    }


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(settings=_llama, rotary_pairs=True),
    "qwen2": Architecture(settings=_qwen2),
    "qwen2moe": Architecture(settings=_qwen2moe),
    "qwen3": Architecture(settings=_qwen3),
    "qwen3moe": Architecture(settings=_qwen3moe),
    "olmoe": Architecture(settings=_olmoe),
    "deepseek2": DEEPSEEK2,
    "gpt-oss": Architecture(
        settings=_gpt_oss,
        names={"post_attention_norm.weight": "post_attention_layernorm.weight", "attn_sinks.weight": "self_attn.sinks"},
        yarn={"truncate": False},  # which the files do not say
    ),
    **SHARED_EXPERTS,
}


def model_config(
    meta: Metadata, tensors: Tensors, read: Callable[[GgufTensor], torch.Tensor]
) -> tuple[dict[str, Any], Architecture]:
    """The ``config.json`` of a file, without what belongs to its tokenizer, and its entry in the table.

    Arguments:
        read: the numbers of a small tensor, float32.

    Raises:
        CheckpointError: naming an architecture, a key or a tensor that is missing or not understood.
    """
    if meta.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise meta.error("general.architecture", meta.architecture, f"one of {known}; nothing else is supported")
    architecture = ARCHITECTURES[meta.architecture]
    if (embedding := tensors.get("token_embd.weight")) is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{meta.file} lacks the tensor 'token_embd.weight' of two dimensions")
    layers = architecture.layers(meta)
    if not 0 <= layers <= (most := min(len(tensors), _MOST_LAYERS)):
        raise meta.error(".block_count", meta.get(".block_count"), f"at most {most}, for {len(tensors)} tensors")
    hidden, heads, head_dim = meta.integer(".embedding_length"), heads_of(meta), head_dim_of(meta)
    for key in () if architecture.latent else (".attention.value_length", ".rope.dimension_count"):
        if meta.integer(key, head_dim) != head_dim and not (architecture.partial_rotary and key.startswith(".rope")):
            raise meta.error(key, meta.get(key), f"the width of a head, {head_dim}")
    vocabulary = meta.integer(".vocab_size", embedding.shape[0])
    if vocabulary != embedding.shape[0]:
        raise meta.error(".vocab_size", vocabulary, f"the rows of 'token_embd.weight', {embedding.shape[0]}")
    own = architecture.settings(meta, tensors)
    scaling = rope_scaling(meta, tensors, read, architecture.latent)
    if scaling is not None and scaling["rope_type"] == "yarn":
        scaling |= architecture.yarn
    return {
        "architectures": [CLASSES[own["model_type"]]],
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": meta.of_all_layers(".feed_forward_length", 0),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": meta.of_all_layers(".attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": meta.integer(".context_length"),
        "rms_norm_eps": meta.number(".attention.layer_norm_rms_epsilon"),
        "rope_theta": meta.number(".rope.freq_base", 10000.0),
        "rope_scaling": scaling,
        "tie_word_embeddings": "output.weight" not in tensors,
        **own,
    }, architecture


def hugging_face_names(
    tensor: GgufTensor, architecture: Architecture, config: Mapping[str, Any], num_experts: int
) -> list[str]:
    """What Hugging Face calls a tensor: one name, or one for each expert that it holds; none for one that is skipped.

    Raises:
        CheckpointError: for a name that is not known.
    """
    name, family = tensor.name, FAMILIES[config["model_type"]]
    if name in _OTHER_NAMES:
        return [_OTHER_NAMES[name]]
    if name == ROPE_FREQUENCIES or _SKIPPED.fullmatch(name):
        return []
    block = re.match(r"blk\.(\d{1,6})\.", name)
    if architecture.further_tokens and block and int(block[1]) >= config["num_hidden_layers"]:
        return []
    match = _BLOCK_TENSOR.fullmatch(name)
    if match:
        part, kind, prefix = match["part"], match["kind"], f"model.layers.{match['block']}."
        if (own := architecture.names.get(f"{part}.{kind}")) is not None:
            return [prefix + own]
        if match["expert"]:
            if part in _EXPERTS and kind == "weight":
                return [prefix + getattr(one_each(family), _EXPERTS[part]).replace("{e}", match["expert"])]
        elif part in _BLOCK_NAMES:
            return [f"{prefix}{_BLOCK_NAMES[part]}.{kind}"]
        elif part == "ffn_gate_inp":
            return [prefix + of_kind(family.router[0], kind)]
        elif (stem := part.removesuffix("_exps")) in _EXPERTS and stem != part:
            dimensions, smallest = (3, num_experts * _SMALLEST_EXPERT) if kind == "weight" else (2, 0)
            if (
                len(tensor.shape) != dimensions
                or tensor.shape[0] != num_experts
                or tensor.end - tensor.begin < smallest
            ):
                raise CheckpointError(
                    f"{tensor.file}: tensor {name!r} has shape {tensor.shape}, and there are {num_experts} experts"
                )
            pattern = of_kind(getattr(one_each(family), _EXPERTS[stem]), kind)
            return [prefix + pattern.replace("{e}", str(expert)) for expert in range(num_experts)]
    raise CheckpointError(f"{tensor.file}: tensor {name[:100]!r} is not one of the model's")


def of_kind(weight: str, kind: str) -> str:
    """The name of a weight, or of its bias."""
    return weight.removesuffix("weight") + kind


def gguf_names(architecture: Architecture, model_type: str, message: str) -> str:
    """A message in which tensors are called what the file calls them."""
    names = {theirs: ours for ours, theirs in _OTHER_NAMES.items()}
    parts = {
        f"{theirs}.{kind}": f"{ours}.{kind}" for ours, theirs in _BLOCK_NAMES.items() for kind in ("weight", "bias")
    }
    parts |= {of_kind(FAMILIES[model_type].router[0], kind): f"ffn_gate_inp.{kind}" for kind in ("weight", "bias")}
    parts |= {theirs: ours for ours, theirs in architecture.names.items()}

    def renamed(match: re.Match[str]) -> str:
        name = match[1]
        block, _, part = name.removeprefix("model.layers.").partition(".")
        if part in parts:
            name = f"blk.{block}.{parts[part]}"
        elif (expert := re.search(r"experts\.(\d+)\.(\w+)", part)) is not None:
            kind = {"w1": "gate", "w2": "down", "w3": "up"}.get(expert[2], expert[2].removesuffix("_proj"))
            name = f"blk.{block}.ffn_{kind}_exps.{part.rpartition('.')[2]}"
        return repr(names.get(name, name))

    return re.sub(r"'((?:model|lm_head)\.[\w.]+)'", renamed, message)


def _window(meta: Metadata) -> dict[str, Any]:
    """Qwen's sliding windows, in the layers that a pattern names."""
    size, layers = meta.integer(".attention.sliding_window", 0), meta.integer(".block_count")
    pattern = ".attention.sliding_window_pattern"
    if not size or (size >= meta.integer(".context_length") and not meta.has(pattern)):
        return {"use_sliding_window": False}
    # Without a pattern some layers slide and others do not, and the file does not say which.
    slides = [bool(value) for value in meta.numbers(pattern, layers)]
    kinds = ["sliding_attention" if value else "full_attention" for value in slides]
    return {"use_sliding_window": True, "sliding_window": size, "layer_types": kinds}
