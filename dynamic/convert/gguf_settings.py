"""What the entries in the table of GGUF's architectures are made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint.gguf_file import GgufArray, GgufTensor
from .gguf_metadata import Metadata
from .gguf_parts import Rule

Tensors = Mapping[str, GgufTensor]
Settings = Callable[[Metadata, Tensors], dict[str, Any]]

MOST_EXPERTS = 1 << 16
SOFTMAX, SIGMOID, TOP_K_THEN_SOFTMAX = 1, 2, 3  # llama.cpp's rules of routers
FULL, SLIDING = "full_attention", "sliding_attention"
KV_HEADS, PATTERN = ".attention.head_count_kv", ".attention.sliding_window_pattern"
GRANITE_SCALES = {
    "embedding_multiplier": ".embedding_scale",
    "residual_multiplier": ".residual_scale",
    "logits_scaling": ".logit_scale",
}


def heads(meta: Metadata) -> dict[str, Any]:
    """Sizes of heads that are alike in all layers, and rotated as a whole."""
    found = some_rotated(meta)
    if found.pop("partial_rotary_factor") != 1:
        raise meta.error(
            ".rope.dimension_count", meta.get(".rope.dimension_count"), f"the width of a head, {found['head_dim']}"
        )
    return found


def some_rotated(meta: Metadata) -> dict[str, Any]:
    """Sizes of heads, only the first channels of which may be rotated."""
    head_dim = head_dim_of(meta)
    if (values := meta.integer(".attention.value_length", head_dim)) != head_dim:
        raise meta.error(".attention.value_length", values, f"the width of a head, {head_dim}")
    counts = sorted({count for count in meta.by_layer(KV_HEADS, heads_of(meta)) if count})
    if len(counts) > 1:
        raise meta.error(KV_HEADS, counts, "the same for all layers")
    return {
        "num_attention_heads": heads_of(meta),
        "num_key_value_heads": counts[0] if counts else 0,
        "head_dim": head_dim,
        "partial_rotary_factor": rotated_part(meta, head_dim),
    }


def rotated_part(meta: Metadata, head_dim: int) -> float:
    """How much of a head is rotated, as a factor that gives back the number of channels."""
    rotated = meta.integer(".rope.dimension_count", head_dim)
    if not 0 < rotated <= head_dim:
        raise meta.error(".rope.dimension_count", rotated, f"between 1 and the width of a head, {head_dim}")
    factor = rotated / head_dim
    return factor if int(head_dim * factor) == rotated else (rotated + 0.5) / head_dim


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What sets files of one architecture apart.

    Arguments:
        settings: keys of ``config.json`` beyond those that all have; ``model_type`` is one of them.
        heads: keys that say how wide heads are and how many; the settings may say so too.
        rotary_pairs: rows of queries and keys that are rotated together lie next to each other, and not half a head
            apart as Hugging Face has them.
        names: of blocks' tensors beside those that all architectures have: Hugging Face's names, or rules.
        others: likewise, of tensors that belong to no block.
        scaling: more settings of the rotations, where they are scaled.
        latent: YaRN sharpens the scores as with latent attention.
        window_theta: by what base layers with a window rotate, in families that know bases by type of layer, where
            the file names none; 0: by that of the other layers.
        norm_offset: is contained in the weights of the norms that the family adds it to.
        epsilons: what ``config.json`` calls the norms' epsilon, by its keys; the first that is there counts.
    """

    settings: Settings
    heads: Callable[[Metadata], dict[str, Any]] = heads
    rotary_pairs: bool = False
    names: Mapping[str, str | Rule] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)
    scaling: Callable[[Metadata], Mapping[str, Any]] = field(default=lambda meta: {})
    latent: bool = False
    window_theta: float = 0.0
    norm_offset: float = 0.0
    epsilons: Mapping[str, str] = field(default_factory=lambda: {".attention.layer_norm_rms_epsilon": "rms_norm_eps"})


def heads_of(meta: Metadata) -> int:
    heads = meta.of_all_layers(".attention.head_count")
    if heads < 1:
        raise meta.error(".attention.head_count", heads, "at least 1")
    return heads


def head_dim_of(meta: Metadata) -> int:
    """Channels of a head."""
    head_dim = meta.integer(".attention.key_length", meta.integer(".embedding_length") // heads_of(meta))
    if head_dim < 1:
        raise meta.error(".attention.key_length", head_dim, "at least 1")
    return head_dim


def has_bias(tensors: Tensors, *parts: str) -> bool:
    """Whether one of the parts has a bias in some block; queries may be in one tensor with keys and values."""
    endings = tuple(f".{part}.bias" for part in (*parts, *(("attn_qkv",) if "attn_q" in parts else ())))
    return any(name.endswith(endings) for name in tensors)


def first_size(tensors: Tensors, ending: str) -> int:
    """Rows of the first tensor whose name ends so; 0 where there is none."""
    return next((t.shape[-2] for name, t in tensors.items() if name.endswith(ending) and len(t.shape) > 1), 0)


def mlp_types(meta: Metadata, tensors: Tensors) -> list[str]:
    """Of every layer, from the tensors that it has; files may name the dense ones in front as well."""
    dense = set(dense_layers(meta, tensors))
    if (named := meta.integer(".leading_dense_block_count", len(dense))) != len(dense):
        raise meta.error(".leading_dense_block_count", named, f"{len(dense)}, as the tensors say")
    return ["dense" if layer in dense else "sparse" for layer in range(meta.num_layers)]


def dense_layers(meta: Metadata, tensors: Tensors) -> list[int]:
    """Layers without experts."""
    return [layer for layer in range(meta.num_layers) if f"blk.{layer}.ffn_gate.weight" in tensors]


def experts_of(meta: Metadata, tensors: Tensors, count_key: str, *, normalised: bool = False) -> dict[str, Any]:
    """How many experts there are and are used, and how wide they are.

    Arguments:
        count_key: what ``config.json`` calls their number.
        normalised: the family's rule makes the weights of a token's experts add up to 1.
    """
    count = meta.integer(".expert_count")
    if not 1 <= count <= MOST_EXPERTS:
        raise meta.error(".expert_count", count, f"between 1 and {MOST_EXPERTS}")
    if normalised and not meta.flag(".expert_weights_norm", True):
        raise meta.error(".expert_weights_norm", False, "true")
    # One tensor for all experts of a layer, with the gates or without, or in old files one each.
    up = re.compile(r"blk\.\d+\.ffn_(?P<both>gate_)?up(_exps|\.\d+)\.weight")
    found = ((up.fullmatch(name), t.shape) for name, t in tensors.items() if len(t.shape) > 1)
    size = next((shape[-2] // (2 if match["both"] else 1) for match, shape in found if match), 0)
    return {
        count_key: count,
        "num_experts_per_tok": meta.integer(".expert_used_count"),
        "intermediate_size": meta.of_all_layers(".expert_feed_forward_length", size),
    }


def routed_by(meta: Metadata, wanted: int) -> None:
    """Check the rule of the routers, which files may leave away."""
    if (rule := meta.integer(".expert_gating_func", wanted)) not in (0, wanted):
        raise meta.error(".expert_gating_func", rule, f"{wanted}, or left away")


def mixture(meta: Metadata, tensors: Tensors, count_key: str, shared_key: str) -> dict[str, Any]:
    """Experts of a width of their own, and shared ones of the same width."""
    experts = experts_of(meta, tensors, count_key)
    size, shared = experts.pop("intermediate_size"), meta.integer(".expert_shared_count", 0)
    # Some converters write another number here; the tensors' shapes are checked.
    meta.get(".expert_shared_feed_forward_length")
    return {**experts, "moe_intermediate_size": size, shared_key: shared}


def sigmoid_router(meta: Metadata) -> dict[str, Any]:
    """DeepSeek's rule of routers, without the number of experts."""
    routed_by(meta, SIGMOID)
    return {
        "routed_scaling_factor": weights_scale(meta),
        "norm_topk_prob": meta.flag(".expert_weights_norm", False),
        "n_group": meta.integer(".expert_group_count", 0) or 1,
        "topk_group": meta.integer(".expert_group_used_count", 0) or 1,
    }


def weights_scale(meta: Metadata) -> float:
    """Factor on the weights of the experts; 0 is one that is not there."""
    return meta.number(".expert_weights_scale", 0.0) or 1.0


def rotations_wanted(meta: Metadata) -> None:
    """Refuse Granite without rotations."""
    if not meta.flag(key := ".rope.scaling.finetuned", True):
        raise meta.error(key, False, "true: Granite without rotations is not supported")


def granite_scales(meta: Metadata) -> dict[str, float]:
    """Granite's factors; 0 is one that is not there."""
    return {
        "attention_multiplier": meta.number(".attention.scale", 0.0) or head_dim_of(meta) ** -0.5,
        **{ours: value for ours, theirs in GRANITE_SCALES.items() if (value := meta.number(theirs, 0.0))},
    }


def slides(meta: Metadata, period: int) -> list[bool]:
    """Which layers have a window: the pattern is an entry for each, or of so many layers the last has none.

    Arguments:
        period: where the file does not say.
    """
    if isinstance(meta.get(PATTERN), GgufArray):
        return [bool(flag) for flag in meta.array_of_layers(PATTERN)]
    if (every := meta.integer(PATTERN, period)) < 1:
        raise meta.error(PATTERN, every, "at least 1")
    return [layer % every < every - 1 for layer in range(meta.num_layers)]


def windows(meta: Metadata, period: int, default: int = 0) -> dict[str, Any]:
    """The window and the types of layers; without a window all layers see everything."""
    size = meta.integer(".attention.sliding_window", default)
    kinds = [SLIDING if slide and size else FULL for slide in slides(meta, period)]
    return {"sliding_window": size or None, "layer_types": kinds}
