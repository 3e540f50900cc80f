"""Rules that several families share: mixtures, windows, flags, and what the tensors of FFNs are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ....kernels.api.router_spec import RouterSpec
from ....moe.router_specs import router_spec
from ...checkpoint.config_reader import ConfigReader
from ...checkpoint.weights import CheckpointError
from ..family import QWEN_EXPERTS, ExpertNames, WindowRule
from ..moe_spec import MoESpec

DENSE_FFN = ExpertNames(gate="mlp.gate_proj.weight", up="mlp.up_proj.weight", down="mlp.down_proj.weight")
SHARED_EXPERT = ExpertNames(
    gate="mlp.shared_expert.gate_proj.weight",
    up="mlp.shared_expert.up_proj.weight",
    down="mlp.shared_expert.down_proj.weight",
)
FULL = "full_attention"
ONE_EACH = QWEN_EXPERTS[0]


def router(config: ConfigReader, layer: int) -> RouterSpec:
    for key in ("num_experts", "num_local_experts", "num_experts_per_tok"):
        config.integer(key, 1)  # checks the type; the rule itself comes from the table of routers
    one, other = config.get("num_experts"), config.get("num_local_experts")
    if None not in (one, other) and one != other:
        raise config.error("num_experts", one, f"the same as num_local_experts, {other}")
    config.flag("norm_topk_prob", False)
    try:
        return router_spec(config.values, layer)
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


def window_by_layer_type(slides: Callable[[int, int], bool]) -> WindowRule:
    """Qwen's rule: ``layer_types`` decides, or where it is missing ``slides(layer, max_window_layers)``."""

    def rule(config: ConfigReader, layer: int) -> int | None:
        size = config.get("sliding_window", 4096)
        last_full = config.integer("max_window_layers", 28)
        enabled = config.flag("use_sliding_window", False)
        kind = layer_type(config, layer, "sliding_attention" if enabled and slides(layer, last_full) else FULL)
        if kind == FULL:
            return None
        if kind != "sliding_attention" or not enabled:
            raise config.error("layer_types", kind, "full_attention or, with use_sliding_window, sliding_attention")
        return positive_window(config, size)

    return rule


def layer_type(config: ConfigReader, layer: int, default: str) -> str:
    """What ``layer_types`` calls a layer; ``default`` where the list is missing."""
    kinds = config.get("layer_types")
    if kinds is None:
        return default
    if not isinstance(kinds, list) or len(kinds) < config.integer("num_hidden_layers"):
        raise config.error("layer_types", kinds, "a list with an entry for every layer")
    return kinds[layer]


def positive_window(config: ConfigReader, size: Any) -> int | None:
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or not 0 < size < 2**31):
        raise config.error("sliding_window", size, "a positive whole number or null")
    return size


def flag_of(name: str, default: bool) -> Callable[[ConfigReader], bool]:
    return lambda config: config.flag(name, default)


ATTENTION_BIAS = flag_of("attention_bias", False)
