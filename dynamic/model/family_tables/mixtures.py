"""Rules of mixtures that several families share, and what the tensors of FFNs are called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ....kernels.api.router_spec import RouterSpec
from ....moe.router_specs import router_spec
from ...checkpoint.config_reader import ConfigReader
from ...checkpoint.weights import CheckpointError
from ..family import QWEN_EXPERTS, ExpertNames
from ..moe_spec import MoESpec
from .rules import layer_type

ONE_EACH = QWEN_EXPERTS[0]
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Rules that routers with a selection bias compute, where a configuration spells them out.
SIGMOID: dict[str, tuple[Any, ...]] = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}
DEEPSEEK_RULES = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True}


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


def ffn_names(*modules: str) -> tuple[ExpertNames, ...]:
    """Gate, up and down projection below one of some modules."""
    return tuple(
        ExpertNames(gate=f"{module}.gate_proj.weight", up=f"{module}.up_proj.weight", down=f"{module}.down_proj.weight")
        for module in modules
    )


def with_shared(config: ConfigReader, layer: int, count_key: str) -> MoESpec:
    """A mixture beside shared experts of the same width, which run as one wide FFN."""
    size = config.integer("moe_intermediate_size")
    return MoESpec(
        router=router(config, layer), expert_size=size, shared_size=size * config.integer(count_key, most=1 << 16)
    )


def dense_first(config: ConfigReader, layer: int) -> MoESpec | None:
    """DeepSeek's rule: some dense layers, then mixtures."""
    mixture = with_shared(config, layer, "n_shared_experts")
    return None if layer < config.integer("first_k_dense_replace", 0) else mixture


def mlp_type(config: ConfigReader, layer: int, default: str) -> str:
    """``dense`` or ``sparse``, as ``mlp_layer_types`` calls a layer; ``default`` where the list is missing."""
    return layer_type(config, layer, default, ("dense", "sparse"), "mlp_layer_types")
