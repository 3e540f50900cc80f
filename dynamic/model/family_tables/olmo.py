"""Ai2's families with norms of what a block adds, and none in front of it."""

from __future__ import annotations

from ..blocks import POST_NORM
from ..family import Family, norm_of
from .rules import ATTENTION_BIAS, every_layer

_OLMO2 = {
    "qkv_bias": ATTENTION_BIAS,
    "o_bias": ATTENTION_BIAS,
    "qk_norm": "full",
    "norm": norm_of("rms_float32"),
    "blocks": POST_NORM,
    "norm_modules": {"attention_out": "post_attention_layernorm", "ffn_out": "post_feedforward_layernorm"},
}

OLMO: dict[str, Family] = {
    "olmo2": Family(norm_eps=1e-5, **_OLMO2),
    "flex_olmo": Family(theta=500000.0, moe=every_layer, **_OLMO2),
}
