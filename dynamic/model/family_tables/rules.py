"""Rules that several families share: mixtures, windows, flags, and what the tensors of FFNs are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ....kernels.api.router_spec import RouterSpec
from ....moe.router_specs import router_spec
from ...checkpoint.config_reader import ConfigReader
from ...checkpoint.weights import CheckpointError
from ..family import QWEN_EXPERTS, RopeRule, WindowRule
from ..moe_spec import MoESpec

FULL, SLIDING = "full_attention", "sliding_attention"
ONE_EACH = QWEN_EXPERTS[0]
LayerTypes = Callable[[ConfigReader, int], str]
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

LARGEST_WINDOW = 1 << 28  # what kernels count with; no context is that long


class _RouterKeys(Mapping[str, Any]):
    """A configuration whose keys are checked, and count as read, when a routing rule asks for them."""

    _INTEGERS = frozenset((*_EXPERT_COUNTS, "num_experts_per_tok", "moe_k", "n_group", "topk_group", "top_k_experts"))
    _NUMBERS = frozenset(
        ("routed_scaling_factor", "router_scaling_factor", "route_scale", "moe_norm_min", "router_jitter_noise")
    )
    _FLAGS = frozenset(("norm_topk_prob", "use_expert_bias"))

    def __init__(self, config: ConfigReader) -> None:
        self._config = config

    def __getitem__(self, key: str) -> Any:
        if (value := self._config.get(key)) is None:
            raise KeyError(key)
        if key in self._INTEGERS:
            return self._config.integer(key)
        if key in self._NUMBERS:
            return self._config.number(key)
        return self._config.flag(key, False) if key in self._FLAGS else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._config.values)

    def __len__(self) -> int:
        return len(self._config.values)


def router(config: ConfigReader, layer: int) -> RouterSpec:
    """The routing rule of a layer, from the table of all families' rules."""
    counts = {key: config.integer(key) for key in _EXPERT_COUNTS if config.values.get(key) is not None}
    first, *others = counts or ("",)
    for other in others:
        if counts[first] != counts[other]:
            raise config.error(first, counts[first], f"the same as {other}, {counts[other]}")
    try:
        return router_spec(_RouterKeys(config), layer)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from error


def every_layer(config: ConfigReader, layer: int) -> MoESpec:
    return MoESpec(router=router(config, layer), expert_size=config.integer("intermediate_size"))


def qwen_moe(config: ConfigReader, layer: int) -> MoESpec | None:
    step = config.integer("decoder_sparse_step", 1)
    if layer in config.integers("mlp_only_layers") or step < 1 or (layer + 1) % step:
        return None
    return MoESpec(router=router(config, layer), expert_size=config.integer("moe_intermediate_size"))


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
        if kind != SLIDING or not enabled:
            raise config.error("layer_types", kind, "full_attention or, with use_sliding_window, sliding_attention")
        return positive_window(config, size)

    return rule


def layer_type(config: ConfigReader, layer: int, default: str, key: str = "layer_types") -> str:
    """What a list with a name for every layer calls a layer; ``default`` where the list is missing."""
    kinds = config.get(key)
    if kinds is None:
        return default
    if not isinstance(kinds, list) or len(kinds) < config.integer("num_hidden_layers"):
        raise config.error(key, kinds, "a list with an entry for every layer")
    return kinds[layer]


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
        kind = layer_type(config, layer, SLIDING if (layer + 1) % every else FULL)
        if kind not in (FULL, SLIDING):
            raise config.error("layer_types", kind, f"{FULL} or {SLIDING}")
        return kind

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
