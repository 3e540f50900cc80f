"""Granite's mixtures with sinks, sliding windows, and a base of the rotations for every layer."""

from __future__ import annotations

from dataclasses import replace

from ...checkpoint.config_reader import ConfigReader
from .rules import FULL, SLIDING, layer_type, positive_window
from .shared_experts import SHARED_EXPERTS


def _window(config: ConfigReader, layer: int) -> int | None:
    """Every fourth layer, from the first on, sees all, unless ``layer_types`` says which."""
    size = config.get("sliding_window", 128)
    kind = layer_type(config, layer, SLIDING if layer % 4 else FULL)
    if kind == SLIDING and config.values.get("sliding_window", 128) is None:
        raise config.error("sliding_window", None, f"a positive whole number where layer_types has {SLIDING}")
    return positive_window(config, size) if kind == SLIDING else None


def _theta(config: ConfigReader, layer: int) -> float | None:
    """Of ``layer_rope_theta``; None where that is missing, 0 for a layer that does not rotate."""
    thetas = config.get("layer_rope_theta")
    if thetas is None:
        return None
    if not isinstance(thetas, list) or len(thetas) != config.integer("num_hidden_layers"):
        raise config.error("layer_rope_theta", thetas, "a list with an entry for every layer")
    theta = ConfigReader({"layer_rope_theta": thetas[layer]}).number("layer_rope_theta")
    if theta != 0 and theta <= 1:
        raise config.error("layer_rope_theta", theta, "0, or greater than 1")
    return theta


_GRANITE = SHARED_EXPERTS["granitemoeshared"]
GRANITE_SWA = {
    "granitemoe_swa": replace(
        _GRANITE,
        window=_window,
        rope=lambda config, layer: None if _theta(config, layer) == 0 else "",
        layer_theta=_theta,
        attention_parts=lambda config, layer: {**_GRANITE.attention_parts(config, layer), "sinks": True},
    ),
}
