"""Reading the rotary embedding out of a ``config.json``."""

from __future__ import annotations

import math
from typing import Any

from ..checkpoint.config_reader import LARGEST_NUMBER, ConfigReader
from ..checkpoint.weights import shown
from .family import Family
from .rope import ROPE_TYPES, RopeSpec, yarn_attention_factor, yarn_score_factor

ROPE_KEYS = frozenset(
    {
        *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"),
        *("attention_factor", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim", "finetuned"),
        *("low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "partial_rotary_factor"),
    }
)


def rope_spec(
    config: ConfigReader, family: Family, layer: int, rotated: int, unrotated: int, max_position: int
) -> RopeSpec:
    """How a layer rotates, from the keys of transformers 5 (``rope_parameters``) or the older ones.

    Arguments:
        rotated, unrotated: channels of one head that are rotated, and those that are not.
        max_position: the model's longest context.

    Raises:
        ValueError: for a kind of scaling, or a key of it, that is not supported; the message names it.
    """
    name = family.rope(config, layer)
    rope = rope_values(config, family, name)
    rope.refuse_unread(ROPE_KEYS | family.rope_keys)
    kinds = {**{kind: kind for kind in ROPE_TYPES}, **family.rope_types}
    kind = rope.choice("rope_type" if "rope_type" in rope.values else "type", kinds, "default")
    if rope.choice("type", kinds, kind) != kind:
        raise rope.error("type", rope.values["type"], f"the same as rope_type, {kind}")
    if name is None:
        config.get("rope_theta")
        return RopeSpec(head_dim=0, unrotated=rotated + unrotated)
    key, default = family.thetas.get(name, ("rope_theta", family.theta))
    older = config.number(key) if key and config.get(key) is not None else None
    theta = rope.number("rope_theta", default if older is None else older)
    if older not in (None, theta):
        raise config.error(key, older, f"what rope_parameters says, {theta}, or absent")
    theta = family.layer_theta(config, layer) or theta
    if kind == "dynamic" and "alpha" in family.rope_keys and rope.number("alpha", 0.0):
        # A fixed stretch of the base, whatever the length of the context.
        kind, theta = "default", theta * rope.number("alpha") ** (rotated / (rotated - 2))
    original = rope.integer("original_max_position_embeddings", max_position)
    if not name:
        original = config.integer("original_max_position_embeddings", original)
    required = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    scaled: dict[str, Any] = {name: rope.number(name) for name in required.get(kind, ())}
    if kind == "longrope":
        if original < 2:
            raise rope.error("original_max_position_embeddings", original, "at least 2")
        scaled = _longrope_values(rope, max_position / original, original)
    if kind == "proportional":
        part = _part(rope)
        scaled = {"factor": rope.number("factor", 1.0), "pairs": int(part * rotated // 2)}
    if kind == "yarn":
        scaled = _yarn_values(rope, max_position / max(original, 1))
    if "short_mscale" in family.rope_keys and kind != "default":
        short, long = rope.number("short_mscale"), rope.number("long_mscale")
        scaled["attention_factor"] = short
        scaled["longest"] = original if short != long else scaled.get("longest", 0)
    return RopeSpec(
        head_dim=rotated,
        unrotated=unrotated,
        theta=theta,
        rope_type=kind,
        original_max_position=original,
        **scaled,
    )


def rotated_channels(config: ConfigReader, family: Family, layer: int, head_dim: int) -> int:
    """How many channels of a head are rotated; of a layer that does not rotate, as in the others.

    Raises:
        ValueError: for a part that the family does not have, or that makes no sense.
    """
    name = family.rope(config, layer)
    rope, default = rope_values(config, family, name), 1.0
    if rope.get("rope_type") == "proportional":  # all are, some of them by no angle
        return head_dim
    # Of several sets, those that are scaled do not know the family's default.
    if family.partial_rotary is not None and not (name and rope.get("rope_type", "default") != "default"):
        default = config.number("partial_rotary_factor", family.partial_rotary(config))
    factor = rope.number("partial_rotary_factor", default)
    if not 0 < factor <= 1 or (factor != 1 and family.partial_rotary is None):
        expected = "1" if family.partial_rotary is None else "greater than 0 and at most 1"
        raise rope.error("partial_rotary_factor", factor, expected)
    return int(head_dim * factor)


def score_factor(config: ConfigReader, family: Family, layer: int) -> float:
    """What sharpens the scores where the range of positions was stretched, in families that read ``mscale_all_dim``."""
    rope = rope_values(config, family, family.rope(config, layer))
    multiplier = rope.number("mscale_all_dim", 0.0)
    if not multiplier or rope.get("rope_type", rope.get("type", "default")) == "default":
        return 1.0
    return yarn_score_factor(rope.number("factor"), multiplier)


def _part(rope: ConfigReader) -> float:
    part = rope.number("partial_rotary_factor", 1.0)
    if not 0 < part <= 1:
        raise rope.error("partial_rotary_factor", part, "greater than 0 and at most 1")
    return part


def rope_values(config: ConfigReader, family: Family, name: str | None) -> ConfigReader:
    """The set of values of this name; of a layer that does not rotate, those of the others."""
    older, newer = config.get("rope_scaling"), config.get("rope_parameters")
    if name:
        return ConfigReader(_named(config, family, name, older, newer), f"config.json: rope_parameters: {name}")
    values = dict(family.default_rope) if older is None and newer is None else older or newer or {}
    if older and newer and _scaling(older) != _scaling(newer):
        raise config.error("rope_scaling", older, f"what rope_parameters says, {shown(newer)}, or absent")
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        raise config.error("rope_parameters", values, "one set of values for all layers")
    return ConfigReader(values, "config.json: rope_parameters")


def _named(config: ConfigReader, family: Family, name: str, older: Any, newer: Any) -> dict[str, Any]:
    """One of several sets. The older keys scale the rotations of layers with full attention only."""
    key, _ = family.thetas.get("full_attention", ("", 0.0))  # empty: the family never had the older keys
    if not newer and (key or not older):
        values = older if name == "full_attention" else {}
    elif older:
        raise config.error("rope_scaling", older, "absent: rope_parameters says how each type of layers rotates")
    elif not isinstance(newer, dict) or not all(value is None or isinstance(value, dict) for value in newer.values()):
        raise config.error("rope_parameters", newer, "a set of values for every type of layers")
    else:
        values = newer.get(name)
        if values is None and name not in family.thetas:
            raise config.error("rope_parameters", newer, f"a set of values for every type of layers, {name} too")
    if values is not None and not isinstance(values, dict):
        raise config.error("rope_scaling", values, "an object")
    return values or {}


def _scaling(values: Any) -> Any:
    """What says how the range is stretched, whichever keys it is under."""
    if not isinstance(values, dict):
        return values
    rest = {key: value for key, value in values.items() if key not in ("type", "rope_type", "rope_theta")}
    return values.get("rope_type", values.get("type")), rest


def _longrope_values(rope: ConfigReader, default_factor: float, original: int) -> dict[str, Any]:
    """One divisor for each frequency, which long contexts may have others of."""
    short, long = (_numbers(rope, key) for key in ("short_factor", "long_factor"))
    factor = rope.number("factor", default_factor)
    recommended = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "factors": short,
        "attention_factor": rope.number("attention_factor", recommended),
        "longest": 0 if short == long else original,
    }


def _numbers(rope: ConfigReader, key: str) -> tuple[float, ...]:
    values = rope.get(key)
    if not isinstance(values, list) or not all(type(v) in (int, float) and abs(v) < LARGEST_NUMBER for v in values):
        raise rope.error(key, values, "a list of numbers")
    return tuple(map(float, values))


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
