"""What the entries in the table of GGUF's architectures are made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint.gguf_file import GgufTensor
from .gguf_metadata import Metadata

Tensors = Mapping[str, GgufTensor]
Settings = Callable[[Metadata, Tensors], dict[str, Any]]

_MOST_EXPERTS = 1 << 16
SOFTMAX, SIGMOID, TOP_K_THEN_SOFTMAX = 1, 2, 3  # llama.cpp's rules of routers


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What sets files of one architecture apart.

    Arguments:
        settings: keys of ``config.json`` beyond those that all have; ``model_type`` is one of them.
        rotary_pairs: rows of queries and keys that are rotated together lie next to each other, and not half a head
            apart as Hugging Face has them.
        names: of blocks' tensors beside those that all architectures have.
        yarn: more settings of YaRN.
        partial_rotary: only the first channels of a head may be rotated.
        latent: heads have the sizes that ``settings`` reads.
        further_tokens: the last blocks may be layers that predict further tokens, which are left out.
    """

    settings: Settings
    rotary_pairs: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    yarn: Mapping[str, Any] = field(default_factory=dict)
    partial_rotary: bool = False
    latent: bool = False
    further_tokens: bool = False

    def layers(self, meta: Metadata) -> int:
        """How many layers a file's model has."""
        return meta.integer(".block_count") - (meta.integer(".nextn_predict_layers", 0) if self.further_tokens else 0)


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
    endings = tuple(f".{part}.bias" for part in parts)
    return any(name.endswith(endings) for name in tensors)


def experts_of(meta: Metadata, tensors: Tensors, count_key: str, *, normalised: bool = False) -> dict[str, Any]:
    """How many experts there are and are used, and how wide they are.

    Arguments:
        count_key: what ``config.json`` calls their number.
        normalised: the family's rule makes the weights of a token's experts add up to 1.
    """
    count = meta.integer(".expert_count")
    if not 1 <= count <= _MOST_EXPERTS:
        raise meta.error(".expert_count", count, f"between 1 and {_MOST_EXPERTS}")
    if normalised and not meta.flag(".expert_weights_norm", True):
        raise meta.error(".expert_weights_norm", False, "true")
    # One tensor for all experts of a layer, or in old files one each.
    up = re.compile(r"blk\.\d+\.(ffn_up_exps|ffn_up\.\d+)\.weight")
    size = next((t.shape[-2] for name, t in tensors.items() if up.fullmatch(name) and len(t.shape) > 1), 0)
    return {
        count_key: count,
        "num_experts_per_tok": meta.integer(".expert_used_count"),
        "intermediate_size": meta.integer(".expert_feed_forward_length", size),
    }
