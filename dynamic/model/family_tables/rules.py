"""Rules that several families share: types of layers, windows, rotations, flags."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ...checkpoint.config_reader import ConfigReader
from ..family import RopeRule, WindowRule

FULL, SLIDING = "full_attention", "sliding_attention"
LayerTypes = Callable[[ConfigReader, int], str]

LARGEST_WINDOW = 1 << 28  # what kernels count with; no context is that long


def window_everywhere(default: int | None) -> WindowRule:
    def rule(config: ConfigReader, layer: int) -> int | None:
        config.get("sliding_window")
        # Unlike elsewhere, a null here is a statement: no window.
        return positive_window(config, config.values.get("sliding_window", default))

    return rule


def window_by_layer_type(slides: Callable[[int, int], bool], switch: str | None = "use_sliding_window") -> WindowRule:
    """Qwen's rule: ``layer_types`` decides, or where it is missing ``slides(layer, max_window_layers)``.

    Arguments:
        switch: key that turns windows on; None: they are on.
    """

    def rule(config: ConfigReader, layer: int) -> int | None:
        size = config.get("sliding_window", 4096)
        last_full = config.integer("max_window_layers", 28)
        enabled = switch is None or config.flag(switch, False)
        kind = layer_type(config, layer, SLIDING if enabled and slides(layer, last_full) else FULL)
        if kind == FULL:
            return None
        if not enabled:
            raise config.error("layer_types", kind, f"{FULL} or, with {switch}, {SLIDING}")
        return positive_window(config, size)

    return rule


def layer_type(
    config: ConfigReader, layer: int, default: str, kinds: Iterable[str] = (FULL, SLIDING), key: str = "layer_types"
) -> str:
    """What a list with a name for every layer calls a layer.

    Arguments:
        default: where the list is missing.
        kinds: that there are.

    Raises:
        CheckpointError: for a list that is too short, or another kind.
    """
    names = config.get(key)
    if names is None:
        return default
    if not isinstance(names, list) or len(names) < config.integer("num_hidden_layers"):
        raise config.error(key, names, "a list with an entry for every layer")
    if names[layer] not in list(kinds):  # a list asks for equality, whatever the file has
        raise config.error(key, names[layer], " or ".join(kinds))
    return names[layer]


def positive_window(config: ConfigReader, size: Any) -> int | None:
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or not 0 < size < 2**31):
        raise config.error("sliding_window", size, "a positive whole number or null")
    return None if size is None else min(size, LARGEST_WINDOW)


def flag_of(name: str, default: bool) -> Callable[[ConfigReader], bool]:
    return lambda config: config.flag(name, default)


ATTENTION_BIAS = flag_of("attention_bias", False)


def full_every(count: int, key: str = "") -> LayerTypes:
    """What a layer sees, as ``layer_types`` says, or where it is missing: of every so many layers the last sees all.

    Arguments:
        key: of ``count`` in the configuration, which may have none.
    """

    def rule(config: ConfigReader, layer: int) -> str:
        every = config.integer(key, count) if key else count
        if every < 1:
            raise config.error(key, every, "at least 1")
        return layer_type(config, layer, SLIDING if (layer + 1) % every else FULL)

    return rule


def windows(kinds: LayerTypes, size: int) -> WindowRule:
    """Layers of type ``SLIDING`` have a window; ``size`` is the default of ``sliding_window``."""

    def rule(config: ConfigReader, layer: int) -> int | None:
        window = config.integer("sliding_window", size)
        return positive_window(config, window) if kinds(config, layer) == SLIDING else None

    return rule


def rotating_windows(kinds: LayerTypes) -> RopeRule:
    """Layers with a window rotate, the others see no positions."""
    return lambda config, layer: "" if kinds(config, layer) == SLIDING else None


def maybe_number(config: ConfigReader, key: str, default: float | None = None) -> float | None:
    """A positive number, or None where the configuration says null, which is a statement here."""
    config.get(key)
    if (value := config.values.get(key, default)) is None:
        return None
    if (number := config.number(key, default)) <= 0:
        raise config.error(key, value, "greater than 0 or null")
    return number
