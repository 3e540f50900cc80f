"""How the range of positions was stretched, in the words of GGUF's metadata."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ..checkpoint.gguf_file import GgufTensor
from ..checkpoint.weights import CheckpointError
from ..model.rope import yarn_attention_factor
from .gguf_metadata import Metadata

ROPE_FREQUENCIES = "rope_freqs.weight"


def rope_scaling(
    meta: Metadata,
    tensors: Mapping[str, GgufTensor],
    read: Callable[[GgufTensor], torch.Tensor],
    latent: bool = False,
) -> dict[str, Any] | None:
    """How the range of positions was stretched, as ``rope_scaling`` of a ``config.json``; a factor of 0 or 1 is none.

    Arguments:
        read: the numbers of a small tensor, float32.
        latent: YaRN sharpens the scores as with latent attention.

    Raises:
        CheckpointError: naming a key or tensor that is not understood.
    """
    factor = meta.number(".rope.scaling.factor", meta.number(".rope.scale_linear", 0.0)) or 1.0
    kind = meta.text(".rope.scaling.type", "linear")
    # -1: what the type says, which is 1 for YaRN.
    known = {"yarn_ext_factor": (-1.0, float(kind == "yarn")), "yarn_attn_factor": (-1.0, 0.0, 1.0)}
    for name in (*known, *(() if latent else ("yarn_log_multiplier",)), "alpha"):
        key, values = f".rope.scaling.{name}", known.get(name, (0.0,))
        if meta.number(key, values[0]) not in values:
            raise meta.error(key, meta.get(key), "left away; nothing else is supported")
    original = meta.integer(".rope.scaling.original_context_length", 0) or meta.integer(".context_length")
    attention_factor = meta.number(".rope.scaling.attn_factor", 0.0) or 1.0
    if kind not in ("none", "linear", "yarn"):
        raise meta.error(".rope.scaling.type", kind, "none, linear or yarn; nothing else is supported")
    if kind != "yarn" and attention_factor != 1:
        raise meta.error(".rope.scaling.attn_factor", attention_factor, f"1 with the scaling {kind!r}")
    if (tensor := tensors.get(ROPE_FREQUENCIES)) is not None:
        if kind != "none" and factor != 1:
            raise meta.error(".rope.scaling.type", kind, f"none beside the tensor {ROPE_FREQUENCIES!r}")
        return _rope_factors(meta, tensor, read(tensor), original)
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    # llama.cpp multiplies the factor that YaRN recommends; with latents it takes that back.
    sharpened = {"mscale_all_dim": 10 * meta.number(".rope.scaling.yarn_log_multiplier", 0.0)} if latent else {}
    if latent and attention_factor != 1:
        raise meta.error(".rope.scaling.attn_factor", attention_factor, "1")
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": 1.0 if latent else attention_factor * yarn_attention_factor(factor),
        **sharpened,
        "beta_fast": meta.number(".rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": meta.number(".rope.scaling.yarn_beta_slow", 1.0),
    }


def _rope_factors(meta: Metadata, tensor: GgufTensor, factors_C: torch.Tensor, original: int) -> dict[str, Any]:
    """A divisor for each frequency (Llama 3.1), in the words of LongRoPE. Old files have frequencies in their place."""
    factors = [float(str(np.float32(value))) for value in factors_C.flatten().tolist()]
    if not factors or any(not 1 <= value < 1e6 for value in factors):
        raise CheckpointError(f"{meta.file}: tensor {tensor.name!r} must hold factors of 1 or more, not {factors[-1:]}")
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": original,
        "short_factor": factors,
        "long_factor": factors,
    }
