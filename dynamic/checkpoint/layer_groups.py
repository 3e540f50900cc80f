"""The settings of compressed-tensors: groups of layers, and how each is quantised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...kernels.api.formats import FP8_BLOCK
from .config_reader import ConfigReader
from .stored_layout import WHAT, ModulePattern, setting_error

_KINDS = {("int", 4): 4, ("int", 8): 8, ("float", 8): 8}
_FORMATS = ("dense", "float-quantized", "int-quantized", "mixed-precision", "naive-quantized", "pack-quantized")
# How the codes were found, which modules have none (the tensors say that too), and what scales are stored as.
_HOW = frozenset({"observer", "observer_kwargs", "scale_dtype", "zp_dtype"})
# The cache has a format of its own here, and none where the checkpoint has one: that rounds less.
_AROUND = frozenset({"global_compression_ratio", "ignore", "kv_cache_scheme", "quant_method", "quantization_status"})
_ORDERS = ("weight", "static", "group", "dynamic")  # the last two mean groups that may be scattered


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """A group of layers.

    Arguments:
        names: of modules; patterns: what their names begin with.
        all_linear: it is for every linear layer that no other group names.
        bits: of the weights; kind: ``int`` or ``float``.
        strategy: what shares a scale: ``tensor``, ``channel``, ``group`` or ``block``.
        size: inputs that share one; None: not in groups.
        symmetric: whether weights have no zero points.
        scattered: whether the groups' order is stored.
        rows: what inputs are rounded to: ``int8``, ``fp8`` (of block weights) or nothing.
    """

    names: frozenset[str]
    patterns: tuple[ModulePattern, ...]
    all_linear: bool
    bits: int
    kind: str
    strategy: str
    size: int | None
    symmetric: bool
    scattered: bool
    rows: str

    def has(self, module: str) -> bool:
        """Whether it names a module."""
        return module in self.names or any(pattern.begins(module) for pattern in self.patterns)


def read_groups(settings: Mapping[str, Any]) -> tuple[LayerGroup, ...]:
    """From ``quantization_config``.

    Raises:
        CheckpointError: naming the setting that is not understood.
    """
    reader = ConfigReader(settings, WHAT)
    groups = reader.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise reader.error("config_groups", groups, "an object with at least one group of layers")
    _check_format(reader)
    if (sparse := reader.get("sparsity_config")) and (
        not isinstance(sparse, Mapping) or sparse.get("format", "dense") != "dense"
    ):
        raise reader.error("sparsity_config", sparse, "dense")
    neutral = {"dequantize": (False,), "moe_sparsity_config": ({},), "run_compressed": (False, True),
               "transform_config": ({},), "use_optimized_inference": (False,)}  # fmt: skip
    reader.refuse_unread(_AROUND | {"version"}, neutral)
    return tuple(_group(group) for group in groups.values())


def _check_format(reader: ConfigReader) -> None:
    reader.choice("format", {name: name for name in _FORMATS}, "dense")


def _group(settings: Any) -> LayerGroup:
    if not isinstance(settings, Mapping) or not isinstance(settings.get("weights"), Mapping):
        raise setting_error("config_groups", settings, "groups with settings of their weights")
    reader = ConfigReader(settings, f"{WHAT}: config_groups")
    weights = ConfigReader(reader.get("weights"), f"{WHAT}: config_groups: weights")
    _check_format(reader)
    targets = reader.get("targets", ["Linear"])
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise reader.error("targets", targets, "a list of names")
    patterns = tuple(ModulePattern.of(target[3:]) for target in targets if target.startswith("re:"))
    kind = (weights.get("type", "int"), weights.get("num_bits"))
    if not isinstance(kind[0], str) or not isinstance(kind[1], int) or kind not in _KINDS:
        raise setting_error("config_groups", f"{kind[1]}-bit {kind[0]}", "weights of int 4, int 8 or float 8 bits")
    size = weights.get("group_size")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or not -1 <= size < 2**31):
        raise weights.error("group_size", size, "a whole number")
    strategies = {name: name for name in ("tensor", "channel", "group", "block")}
    strategy = weights.choice("strategy", strategies, "group" if size else "tensor")
    block = weights.get("block_structure")
    if block not in (None, [FP8_BLOCK, FP8_BLOCK]):
        raise weights.error("block_structure", block, f"[{FP8_BLOCK}, {FP8_BLOCK}]")
    order = weights.get("actorder", False)
    if order not in (False, True) and order not in _ORDERS:
        raise weights.error("actorder", order, f"one of {', '.join(_ORDERS)}")
    symmetric = weights.flag("symmetric", True)
    weights.refuse_unread(_HOW, {"dynamic": (False,)})
    rows = _rows(reader, strategy)
    reader.refuse_unread((), {})
    return LayerGroup(
        names=frozenset(targets),
        patterns=patterns,
        all_linear="Linear" in targets,
        bits=_KINDS[kind],
        kind=kind[0],
        strategy=strategy,
        size=size if size is not None and size > 0 else None,
        symmetric=symmetric,
        scattered=order is True or order in ("group", "dynamic"),
        rows=rows,
    )


def _rows(group: ConfigReader, strategy: str) -> str:
    """What inputs are rounded to. How finely the checkpoint would do that is read, and done at least as finely here."""
    settings = group.get("input_activations")
    if not settings:
        return ""
    if not isinstance(settings, Mapping):
        raise group.error("input_activations", settings, "an object or null")
    inputs = ConfigReader(settings, f"{WHAT}: config_groups: input_activations")
    kind = (inputs.get("type", "int"), inputs.get("num_bits"))
    if kind not in (("int", 8), ("float", 8)):
        raise group.error("input_activations", f"{kind[1]}-bit {kind[0]}", "8 bits or none")
    inputs.choice("strategy", {name: name for name in ("tensor", "token", "group", "channel")}, "tensor")
    inputs.refuse_unread(_HOW | {"actorder", "block_structure", "dynamic", "group_size", "symmetric"}, {})
    if kind[0] == "int":
        return "int8"
    return "fp8" if strategy == "block" else ""
