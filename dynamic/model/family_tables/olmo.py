"""Ai2's families with norms of what a block adds, and none in front of it."""

from __future__ import annotations

from ..blocks import POST_NORM
from ..family import Family, blocks_of, norm_of
from .mixtures import every_layer
from .rules import ATTENTION_BIAS, FULL, SLIDING, full_every, windows

_OLMO2 = {
    "qkv_bias": ATTENTION_BIAS,
    "o_bias": ATTENTION_BIAS,
    "qk_norm": "full",
    "norm": norm_of("rms_float32"),
    "blocks": blocks_of(POST_NORM),
    "norm_modules": {"attention_out": "post_attention_layernorm", "ffn_out": "post_feedforward_layernorm"},
}

_OLMO3_LAYERS = full_every(4)

OLMO: dict[str, Family] = {
    "olmo2": Family(norm_eps=1e-5, **_OLMO2),
    "olmo3": Family(
        norm_eps=1e-5,
        window=windows(_OLMO3_LAYERS, 4096),
        rope=_OLMO3_LAYERS,
        thetas={FULL: ("rope_theta", 500000.0), SLIDING: ("", 500000.0)},
        **_OLMO2,
    ),
    "flex_olmo": Family(theta=500000.0, moe=every_layer, **_OLMO2),
}
