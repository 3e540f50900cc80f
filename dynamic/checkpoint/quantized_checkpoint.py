"""Checkpoints whose weights are quantised already: read straight into our formats, without a detour over 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...kernels.api.formats import FP8_BLOCK
from .quantized_layouts import Awq, BlockFp8, CompressedTensors, Gptq, StoredLayout
from .stored_weight import ALL, Index, Part, StoredWeight
from .weights import DTYPES, Checkpoint, CheckpointError, StoredWeights, TensorInfo

_KEYS = ("quantization_config", "compression_config")
_NEVER_ALONE = ("qzeros", "scales", "g_idx", "weight_zero_point", "weight_shape")
_METHODS = ("compressed-tensors", "gptq", "awq", "fp8")


def split_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], StoredLayout | None]:
    """A model's configuration without what it says about quantisation, and how its weights are laid out.

    Raises:
        CheckpointError: for a method or a setting of it that is not understood, naming key and value.
    """
    rest = {key: value for key, value in config.items() if key not in _KEYS}
    settings = next((config[key] for key in _KEYS if config.get(key)), None)
    return rest, None if settings is None else _layout(settings)


def open_checkpoint(directory: Path, layout: StoredLayout | None) -> Checkpoint:
    """The checkpoint of a directory, quantised or not.

    Raises:
        CheckpointError: see the classes.
    """
    return Checkpoint(directory) if layout is None else QuantizedCheckpoint(directory, layout)


class QuantizedCheckpoint(Checkpoint):
    """A checkpoint that shows quantised weights under the names and in the shapes that they stand for.

    Raises:
        CheckpointError: when a quantised weight lacks a tensor, or its tensors' shapes do not fit together.
    """

    def __init__(self, directory: Path, layout: StoredLayout) -> None:
        super().__init__(directory)
        self._layout = layout
        self._stored: dict[str, StoredWeight] = {}
        modules = {name.rpartition(".")[0] for name in self._tensors if name.rpartition(".")[2] in layout.markers}
        for name in self._tensors:
            module, _, part = name.rpartition(".")
            if part in _NEVER_ALONE and part in layout.parts and module not in modules:
                raise CheckpointError(
                    f"the quantised weight {module!r} lacks its tensor {module + '.' + layout.markers[0]!r}"
                )
        for module in sorted(modules):
            self._stored[f"{module}.weight"] = StoredWeight(name=module, tensors=self._tensors, load=self._part)
        self._shown = {
            name: info
            for name, info in self._tensors.items()
            if name.rpartition(".")[2] not in layout.parts and name not in self._stored
        }
        for name, weight in self._stored.items():
            anchor = next(self._tensors[f"{weight.name}.{m}"] for m in layout.markers if weight.has(m))
            shape = layout.shape(weight)
            self._shown[name] = TensorInfo(file=anchor.file, dtype="F32", shape=shape, begin=0, end=0)
        loose = [name for name, info in self._shown.items() if info.dtype not in DTYPES and name.endswith(".weight")]
        if loose:
            raise CheckpointError(
                f"tensor {loose[0]!r} in {self._shown[loose[0]].file} has dtype {self._shown[loose[0]].dtype} and no"
                " scales beside it"
            )

    def __getitem__(self, name: str) -> TensorInfo:
        return self._shown[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shown)

    def __len__(self) -> int:
        return len(self._shown)

    def keeps_codes(self, name: str) -> bool:
        """Whether a weight is stored quantised."""
        return name in self._stored

    def input_step(self, name: str) -> int:
        """Inputs of a quantised weight whose multiples are where a part of them may begin, from the files' headers."""
        return self._layout.input_step(self._stored[name])

    def restrict(self, parts: Mapping[str, Part], load: Callable[[str, Index], torch.Tensor]) -> None:
        """Show only parts of some quantised weights from now on.

        Arguments:
            parts: by name; their inputs begin at multiples of :meth:`input_step`.
            load: reads a part of a tensor in place of this class.
        """
        for name, weight in self._stored.items():
            self._stored[name] = replace(weight, kept=parts.get(name, ALL), load=load)

    def _part(self, name: str, index: Index) -> torch.Tensor:
        return self.raw(name)[index]

    def view(self, name: str) -> torch.Tensor:
        """As it was stored, or dequantised: for the small weights that nothing runs quantised, such as routers."""
        stored = self._stored.get(name)
        return super().view(name) if stored is None else self._layout.load(stored).dequantize()

    def quantized(self, *names: str) -> StoredWeights | None:
        """Weights that are stored quantised.

        Raises:
            CheckpointError: when some of these are and others are not, or one makes no sense.
        """
        stored = [self._stored.get(name) for name in names]
        if not any(stored):
            return None
        weights, schemes = [], set()
        for name, weight in zip(names, stored, strict=True):
            if weight is None:
                raise CheckpointError(f"{name!r} is not quantised, but {names[stored.index(None) - 1]!r} beside it is")
            try:
                weights.append(self._layout.load(weight))
            except CheckpointError:
                raise
            except ValueError as error:
                raise weight.error(str(error)) from error
            schemes.add(self._layout.scheme(weight))
        if len(schemes) > 1:
            raise CheckpointError(f"{names[0]!r} and what lies beside it differ in how their inputs are rounded")
        return StoredWeights(weights=tuple(weights), scheme=schemes.pop())


def _layout(settings: Any) -> StoredLayout:
    if not isinstance(settings, Mapping):
        raise _error("quantization_config", settings, "an object")
    method = settings.get("quant_method")
    if method in ("compressed-tensors", "dynamoe"):
        return _compressed_tensors(settings)
    if method == "gptq":
        _want(settings, "bits", 4)
        group = _group_size(settings)
        v2 = settings.get("checkpoint_format") == "gptq_v2"
        return Gptq(group=group, zero_offset=0 if v2 else 1, symmetric=settings.get("sym", True) is True)
    if method == "awq":
        _want(settings, "bits", 4, alias="w_bit")
        version = str(settings.get("version", "gemm")).lower()
        if version != "gemm":
            raise _error("version", version, "gemm, the only layout of AWQ that is understood")
        zero_points = settings.get("zero_point", True) is not False
        return Awq(group=_group_size(settings, alias="q_group_size"), zero_points=zero_points)
    if method == "fp8":
        block = settings.get("weight_block_size")
        if block is not None and list(block) != [FP8_BLOCK, FP8_BLOCK]:
            raise _error("weight_block_size", block, f"[{FP8_BLOCK}, {FP8_BLOCK}]")
        if settings.get("fmt", "e4m3") != "e4m3":
            raise _error("fmt", settings["fmt"], "e4m3")
        return BlockFp8(dynamic=settings.get("activation_scheme", "dynamic") == "dynamic")
    raise _error("quant_method", method, f"one of {', '.join(_METHODS)}")


def _compressed_tensors(settings: Mapping[str, Any]) -> CompressedTensors:
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _error("config_groups", groups, "an object with at least one group of layers")
    if settings.get("sparsity_config") and settings["sparsity_config"].get("format", "dense") != "dense":
        raise _error("sparsity_config", settings["sparsity_config"], "dense")
    weights, activations = [], []
    for group in groups.values():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise _error("config_groups", group, "groups with settings of their weights")
        kind = (group["weights"].get("type", "int"), group["weights"].get("num_bits"))
        if kind not in (("int", 4), ("int", 8), ("float", 8)):
            raise _error("config_groups", f"{kind[1]}-bit {kind[0]}", "weights of int 4, int 8 or float 8 bits")
        weights.append(group["weights"])
        inputs = group.get("input_activations")
        activations.append(None if not inputs else (inputs.get("type", "int"), inputs.get("num_bits")))
    strange = [kind for kind in activations if kind not in (None, ("int", 8), ("float", 8))]
    if strange:
        raise _error("input_activations", f"{strange[0][1]}-bit {strange[0][0]}", "8 bits or none")
    blocks = any(w.get("strategy") == "block" for w in weights)
    return CompressedTensors(
        weights=tuple(weights),
        int8_activations=("int", 8) in activations,
        fp8_activations=blocks and ("float", 8) in activations,
    )


def _group_size(settings: Mapping[str, Any], alias: str = "group_size") -> int:
    value = settings.get("group_size", settings.get(alias))
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise _error("group_size", value, "a positive whole number, or -1 for all inputs")
    return value


def _want(settings: Mapping[str, Any], key: str, wanted: Any, alias: str = "") -> None:
    value = settings.get(key, settings.get(alias))
    if value != wanted:
        raise _error(key, value, f"{wanted}")


def _error(key: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(f"config.json: quantisation: {key} must be {expected}, not {str(value)[:200]!r}")
