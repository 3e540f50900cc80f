"""Reading the rotary embedding out of a ``config.json``."""

from __future__ import annotations

from typing import Any

from ..checkpoint.config_reader import LARGEST_NUMBER, ConfigReader
from ..checkpoint.weights import shown
from .rope import ROPE_TYPES, RopeSpec, yarn_attention_factor

ROPE_KEYS = frozenset(
    {
        *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"),
        *("attention_factor", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim", "finetuned"),
        *("low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
    }
)


def rope_spec(config: ConfigReader, head_dim: int, max_position: int, default_theta: float) -> RopeSpec:
    """How a model rotates, from the keys of transformers 5 (``rope_parameters``) or the older ones.

    Arguments:
        head_dim: channels of one head.
        max_position: the model's longest context.
        default_theta: the family's ``rope_theta``.

    Raises:
        ValueError: for a kind of scaling, or a key of it, that is not supported; the message names it.
    """
    older, newer = config.get("rope_scaling"), config.get("rope_parameters")
    values = older or newer or {}
    if older and newer and _scaling(older) != _scaling(newer):
        raise config.error("rope_scaling", older, f"what rope_parameters says, {shown(newer)}, or absent")
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        raise config.error("rope_parameters", values, "one set of values for all layers")
    rope = ConfigReader(values, "config.json: rope_parameters")
    rope.refuse_unread(ROPE_KEYS)
    kinds = {kind: kind for kind in ROPE_TYPES}
    kind = rope.choice("rope_type" if "rope_type" in values else "type", kinds, "default")
    if rope.choice("type", kinds, kind) != kind:
        raise rope.error("type", values["type"], f"the same as rope_type, {kind}")
    theta = rope.number("rope_theta", config.number("rope_theta", default_theta))
    original = config.integer(
        "original_max_position_embeddings", rope.integer("original_max_position_embeddings", max_position)
    )
    required = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    scaled: dict[str, Any] = {name: rope.number(name) for name in required.get(kind, ())}
    if kind == "longrope":
        scaled = _longrope_values(rope)
    if kind == "yarn":
        scaled = _yarn_values(rope, max_position / max(original, 1))
    return RopeSpec(head_dim=head_dim, theta=theta, rope_type=kind, original_max_position=original, **scaled)


def _scaling(values: Any) -> Any:
    """What says how the range is stretched, whichever keys it is under."""
    if not isinstance(values, dict):
        return values
    rest = {key: value for key, value in values.items() if key not in ("type", "rope_type", "rope_theta")}
    return values.get("rope_type", values.get("type")), rest


def _longrope_values(rope: ConfigReader) -> dict[str, Any]:
    """One divisor for each frequency, whatever the length of the context."""
    factors = rope.get("long_factor")
    numeric = isinstance(factors, list) and all(type(f) in (int, float) and f < LARGEST_NUMBER for f in factors)
    if not numeric or rope.get("short_factor") != factors:
        raise rope.error("short_factor", rope.get("short_factor"), "numbers, and the same as long_factor")
    return {"factors": tuple(map(float, factors)), "attention_factor": rope.number("attention_factor")}


def _yarn_values(rope: ConfigReader, default_factor: float) -> dict[str, Any]:
    factor = rope.number("factor", default_factor)
    recommended = yarn_attention_factor(factor, rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0))
    return {
        "factor": factor,
        "attention_factor": rope.number("attention_factor", recommended),
        "beta_fast": rope.number("beta_fast", 32.0) or 32.0,
        "beta_slow": rope.number("beta_slow", 1.0) or 1.0,
        "truncate": rope.flag("truncate", True),
    }
