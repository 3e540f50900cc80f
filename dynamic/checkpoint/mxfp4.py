"""Weights of 4-bit floats with a power of two for 32 inputs (OCP's MXFP4), as gpt-oss's checkpoints store them.

Of a weight (O, I): ``blocks`` (O, I / 32, 16), two codes to a byte, the even input in the low nibble; ``scales``
(O, I / 32), exponents with 127 added. Both uint8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...kernels.api.formats import MXFP4, UNQUANTIZED, ActivationScheme
from ...kernels.api.quantized_weight import QuantizedWeight
from .config_reader import ConfigReader
from .stored_layout import WHAT, StoredLayout, setting_error
from .stored_weight import StoredWeight

_GROUP = 32
_NO_NUMBER = 255  # an exponent


@dataclass(frozen=True, kw_only=True)
class Mxfp4(StoredLayout):
    """The layout."""

    markers: ClassVar[tuple[str, ...]] = ("blocks",)
    parts: ClassVar[tuple[str, ...]] = ("blocks", "scales")

    def scheme(self, weight: StoredWeight) -> ActivationScheme:
        return UNQUANTIZED

    def shape(self, weight: StoredWeight) -> tuple[int, ...]:
        shape = weight.info("blocks", "U8").shape
        if len(shape) != 3 or shape[2] != _GROUP // 2:
            raise weight.error(f"blocks has shape {shape} and not (outputs, groups, {_GROUP // 2})")
        weight.shaped("scales", shape[:2], "U8")
        return shape[0], shape[1] * _GROUP

    def input_step(self, weight: StoredWeight) -> int:
        return _GROUP

    def load(self, weight: StoredWeight) -> QuantizedWeight:
        rows, columns = weight.kept.of(self.shape(weight))
        groups = slice(columns.start // _GROUP, columns.stop // _GROUP)
        blocks, scales = weight.read("blocks", rows, groups), weight.read("scales", rows, groups)
        if bool((scales == _NO_NUMBER).any()):
            raise weight.error(f"{int((scales == _NO_NUMBER).sum())} of the {scales.numel()} values of scales are NaN")
        return mxfp4_weight(blocks, scales)


def mxfp4_weight(blocks_OGX: torch.Tensor, scales_OG: torch.Tensor) -> QuantizedWeight:
    """From codes as the layout has them, (O, G, 16), and exponents with 127 added, (O, G); both uint8."""
    return QuantizedWeight(
        format=MXFP4,
        data=blocks_OGX.flatten(1).contiguous(),
        scale=scales_OG.contiguous().view(torch.float8_e8m0fnu),
        inputs=blocks_OGX.shape[1] * _GROUP,
        group=_GROUP,
    )


def open_mxfp4(settings: Mapping[str, Any]) -> Mxfp4:
    """From ``quantization_config``.

    Raises:
        CheckpointError: naming a setting that is not understood.
    """
    reader = ConfigReader(settings, WHAT)
    names = reader.get("modules_to_not_convert", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise setting_error("modules_to_not_convert", names, "a list of names")
    reader.flag("dequantize", False)  # whether another library shall do it while it loads: the numbers are the same
    reader.refuse_unread({"quant_method"}, {})
    return Mxfp4()
