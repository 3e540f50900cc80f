"""How the range of positions was stretched, in the words of GGUF's metadata."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..checkpoint.gguf_file import GgufTensor
from ..checkpoint.weights import CheckpointError
from ..model.rope import yarn_attention_factor
from .gguf_metadata import Metadata

ROPE_FREQUENCIES = "rope_freqs.weight"
_SHORT, _LONG = "rope_factors_short.weight", "rope_factors_long.weight"
# Factors are read here. Frequencies follow from the metadata: old files have them, llama.cpp skips them.
SKIPPED = re.compile(r"rope_(freqs|factors_(long|short))\.weight|blk\.\d+\.attn_rot_embd\.weight")
_STANDS_STILL = 1e29  # a channel pair that is divided by so much does not turn


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
    older = meta.number(".rope.scale_linear", 0.0)
    factor = meta.number(".rope.scaling.factor", older) or older or 1.0
    if older not in (0, factor):
        raise meta.error(".rope.scale_linear", older, f"the same as rope.scaling.factor, {factor}, or left away")
    kind = meta.text(".rope.scaling.type", "linear")
    # -1: what the type says, which is 1 for YaRN.
    recommended = _shown(yarn_attention_factor(factor)) if kind == "yarn" else 1.0
    known = {"yarn_ext_factor": (-1.0, float(kind == "yarn")), "yarn_attn_factor": (-1.0, 0.0, 1.0, recommended)}
    for name in (*known, *(() if latent or kind == "yarn" else ("yarn_log_multiplier",)), "alpha"):
        key, values = f".rope.scaling.{name}", known.get(name, (0.0,))
        if meta.number(key, values[0]) not in values:
            raise meta.error(key, meta.get(key), "left away; nothing else is supported")
    original = meta.integer(".rope.scaling.original_context_length", 0) or meta.integer(".context_length")
    attention_factor = meta.number(".rope.scaling.attn_factor", 0.0) or 1.0
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise meta.error(".rope.scaling.type", kind, "none, linear, yarn or longrope; nothing else is supported")
    given = [tensors[name] for name in (ROPE_FREQUENCIES, _SHORT, _LONG) if name in tensors]
    if given and kind != "longrope" and (kind != "none" and factor != 1):
        raise meta.error(".rope.scaling.type", kind, f"none beside the tensor {given[0].name!r}")
    if kind == "longrope" or any(tensor.name in (_SHORT, _LONG) for tensor in given):
        if [tensor.name for tensor in given] != [_SHORT, _LONG]:
            raise CheckpointError(f"{meta.file}: the tensors {_SHORT!r} and {_LONG!r} go with each other alone")
        return _longrope(meta, given, [read(tensor) for tensor in given], original, attention_factor)
    if kind != "yarn" and attention_factor != 1:
        raise meta.error(".rope.scaling.attn_factor", attention_factor, f"1 with the scaling {kind!r}")
    if given:
        factors_C = read(given[0])
        turning = ~(factors_C >= _STANDS_STILL)
        if bool(turning.all()) or not bool((factors_C[turning] == 1).all() and turning[0]):
            return _longrope(meta, given * 2, [factors_C] * 2, original, 1.0)
        pairs = int(turning.sum())
        if not bool(turning[:pairs].all()):
            raise CheckpointError(f"{meta.file}: tensor {given[0].name!r} must hold factors of the fastest pairs first")
        # Half a channel more, for fractions are rounded down.
        return {"rope_type": "proportional", "partial_rotary_factor": (2 * pairs + 0.5) / (2 * len(factors_C))}
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    # llama.cpp multiplies the factor that YaRN recommends; with latents it takes that back.
    multiplier = meta.number(".rope.scaling.yarn_log_multiplier", 0.0)
    sharpened = {"mscale_all_dim": 10 * multiplier} if latent else {}
    if latent and attention_factor != 1:
        raise meta.error(".rope.scaling.attn_factor", attention_factor, "1")
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": 1.0 if latent else attention_factor * yarn_attention_factor(factor, 1.0, multiplier),
        **sharpened,
        "beta_fast": meta.number(".rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": meta.number(".rope.scaling.yarn_beta_slow", 1.0),
    }


def _longrope(
    meta: Metadata, tensors: Sequence[GgufTensor], factors: Sequence[torch.Tensor], original: int, attention: float
) -> dict[str, Any]:
    """A divisor for each frequency, for short contexts and for long ones (LongRoPE), or for all (Llama 3.1).

    Old files have frequencies in their place.
    """
    values = [[_shown(value) for value in part.flatten().tolist()] for part in factors]
    for tensor, part in zip(tensors, values, strict=True):
        if not part or any(not 1 <= value < 1e6 for value in part):
            raise CheckpointError(
                f"{meta.file}: tensor {tensor.name!r} must hold factors of 1 or more, not {part[-1:]}"
            )
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": attention,
        "original_max_position_embeddings": original,
        "short_factor": values[0],
        "long_factor": values[1],
    }


def _shown(value: float) -> float:
    """The shortest decimal number that rounds to the same float32."""
    return float(str(np.float32(value)))
