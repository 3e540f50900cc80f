"""Checkpoints whose weights are quantised already: read directly into our formats, without going through 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...kernels.api.format_join import concatenate
from ...kernels.api.quantized_weight import QuantizedWeight
from .awq import open_awq
from .block_fp8 import open_block_fp8
from .compressed_tensors import CompressedTensors
from .gguf_layout import METHOD, open_gguf_blocks
from .gptq import open_gptq
from .layer_groups import read_groups
from .mxfp4 import open_mxfp4
from .stored_layout import StoredLayout, setting_error
from .stored_weight import ALL, Index, Part, Runs, StoredWeight
from .weights import DTYPES, Checkpoint, CheckpointError, Divide, Rename, StoredCodes, TensorInfo

_KEYS = ("quantization_config", "compression_config")
_NEVER_ALONE = ("qzeros", "scales", "g_idx", "weight_zero_point", "weight_shape")
_PACKED = ("qweight", "weight_packed", "blocks")


def _open_compressed_tensors(settings: Mapping[str, Any]) -> CompressedTensors:
    return CompressedTensors(groups=read_groups(settings))


OpenLayout = Callable[[Mapping[str, Any]], StoredLayout]
_LAYOUTS: dict[str, OpenLayout] = {
    "compressed-tensors": _open_compressed_tensors,
    "gptq": open_gptq,
    "awq": open_awq,
    "fp8": open_block_fp8,
    "mxfp4": open_mxfp4,
    METHOD: open_gguf_blocks,
}


def register_layout(method: str, open_layout: OpenLayout) -> None:
    """Register a layout.

    Arguments:
        method: the ``quant_method`` of ``quantization_config``.
        open_layout: from those settings; raises CheckpointError for what it does not understand.

    Raises:
        ValueError: for a method that is registered already.
    """
    if method in _LAYOUTS:
        raise ValueError(f"there is a layout of quantised weights named {method!r} already")
    _LAYOUTS[method] = open_layout


def split_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], StoredLayout | None]:
    """A model's configuration without its quantisation settings, and the layout of its weights.

    Raises:
        CheckpointError: for a method or a setting of it that is not understood, naming key and value.
    """
    rest = {key: value for key, value in config.items() if key not in _KEYS}
    given = [config[key] for key in _KEYS if config.get(key)]
    if given and given[0] != given[-1]:
        raise setting_error(_KEYS[1], given[-1], f"the same as {_KEYS[0]}, or absent")
    return rest, _layout(given[0]) if given else None


def open_checkpoint(
    directory: Path, layout: StoredLayout | None, rename: Rename | None = None, divide: Divide | None = None
) -> Checkpoint:
    """The checkpoint of a directory, quantised or not.

    Raises:
        CheckpointError: see the classes.
    """
    if layout is None:
        return Checkpoint(directory, rename, divide)
    return QuantizedCheckpoint(directory, layout, rename, divide)


class QuantizedCheckpoint(Checkpoint):
    """A checkpoint that shows quantised weights under the names and in the shapes that they stand for.

    Raises:
        CheckpointError: when a quantised weight lacks a tensor, or its tensors' shapes do not fit together.
    """

    def __init__(
        self, directory: Path, layout: StoredLayout, rename: Rename | None = None, divide: Divide | None = None
    ) -> None:
        super().__init__(directory, rename, divide)
        self._layout = layout
        self._stored: dict[str, StoredWeight] = {}
        self._runs: dict[str, Runs] = {}
        modules = {name.rpartition(".")[0] for name in self._tensors if name.rpartition(".")[2] in layout.markers}
        for name in self._tensors:
            module, _, part = name.rpartition(".")
            if part in _NEVER_ALONE and part in layout.parts and module not in modules:
                raise CheckpointError(
                    f"the quantised weight {module!r} lacks its tensor {module + '.' + layout.markers[0]!r}"
                )
        for module in sorted(modules):
            anchor = next(f"{module}.{part}" for part in layout.markers if f"{module}.{part}" in self._tensors)
            listed = self.name_in_files(anchor).rpartition(".")[0]
            weight = StoredWeight(name=module, listed=listed, tensors=self._tensors, load=self._part)
            if any(weight.has(part) for part in _PACKED) and weight.has("weight"):
                raise weight.error("it is stored twice, packed and as a tensor 'weight'")
            self._stored[f"{module}.weight"] = weight
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
        """A part of a quantised weight may begin at multiples of this many inputs; from the files' headers."""
        return self._layout.input_step(self._stored[name])

    def restrict(self, parts: Mapping[str, Part | Runs], load: Callable[[str, Index], torch.Tensor]) -> None:
        """Show only parts of some quantised weights from now on.

        Arguments:
            parts: by name; their inputs begin at multiples of :meth:`input_step`.
            load: reads a part of a tensor in place of this class.
        """
        self._runs = {name: part for name, part in parts.items() if isinstance(part, Runs)}
        for name, weight in self._stored.items():
            part = parts.get(name, ALL)
            self._stored[name] = replace(weight, kept=ALL if isinstance(part, Runs) else part, load=load)

    def _part(self, name: str, index: Index) -> torch.Tensor:
        return self.raw(name)[index]

    def view(self, name: str) -> torch.Tensor:
        """As it was stored, or dequantised: for the small weights that nothing runs quantised, such as routers."""
        if (stored := self._stored.get(name)) is None:
            return super().view(name)
        weights = [self._load(run) for run in self._runs_of(name, stored)]
        plain = [weight if isinstance(weight, torch.Tensor) else weight.dequantize() for weight in weights]
        return torch.cat(plain) if len(plain) > 1 else plain[0]

    def _runs_of(self, name: str, stored: StoredWeight) -> list[StoredWeight]:
        """A weight as the runs of outputs that are wanted of it."""
        runs = self._runs.get(name)
        return [stored] if runs is None else [replace(stored, kept=part) for part in runs.parts]

    def admit(self, *, dequantize: bool) -> None:
        """Check that all weights may run as they would: those of some layouts have no format of ours.

        Arguments:
            dequantize: whether such weights may run dequantised.

        Raises:
            CheckpointError: naming one that may not.
        """
        self._layout.admit(self._stored.values(), dequantize)

    def quantized(self, name: str) -> StoredCodes | None:
        """A weight that is stored quantised; None: it is not, or it can only run dequantised.

        Raises:
            CheckpointError: when it makes no sense.
        """
        stored = self._stored.get(name)
        if stored is None or not self._layout.keeps(stored):
            return None
        codes: list[QuantizedWeight] = []
        for run in self._runs_of(name, stored):
            weight = self._load(run)
            if isinstance(weight, torch.Tensor):
                raise stored.error(f"{type(self._layout).__name__} keeps it, and yet loads it as {weight.dtype}")
            codes.append(weight)
        return StoredCodes(
            weight=concatenate(codes) if len(codes) > 1 else codes[0], scheme=self._layout.scheme(stored)
        )

    def _load(self, stored: StoredWeight) -> QuantizedWeight | torch.Tensor:
        try:
            return self._layout.load(stored)
        except CheckpointError:
            raise
        except ValueError as error:
            raise stored.error(str(error)) from error


def _layout(settings: Any) -> StoredLayout:
    if not isinstance(settings, Mapping):
        raise setting_error("quantization_config", settings, "an object")
    method = settings.get("quant_method")
    if not isinstance(method, str) or method not in _LAYOUTS:
        known = ", ".join(name for name in _LAYOUTS if name != METHOD)
        raise setting_error("quant_method", method, f"one of {known}")
    return _LAYOUTS[method](settings)
