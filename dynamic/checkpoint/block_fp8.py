"""Weights in fp8 as DeepSeek stores them, and what other layouts of fp8 share with it.

Shape suffixes: O outputs, G groups of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ...kernels.api.formats import FP8, FP8_BLOCK, FP8_PER_GROUP, UNQUANTIZED, ActivationScheme
from ...kernels.api.quantized_weight import QuantizedWeight
from .config_reader import ConfigReader
from .stored_codes import width, words_of
from .stored_layout import FLOATS, WHAT, StoredLayout
from .stored_weight import StoredWeight

# The tensors themselves say which modules are quantised; the cache has a format of its own here.
_IRRELEVANT = frozenset(
    {"ignored_layers", "kv_cache_scheme", "modules_to_convert", "modules_to_not_convert", "quant_method"}
)


@dataclass(frozen=True, kw_only=True)
class BlockFp8(StoredLayout):
    """DeepSeek's layout, and the plain fp8 one: scales per block of 128 by 128, per output or for all."""

    markers: ClassVar[tuple[str, ...]] = ("weight_scale_inv", "weight_scale")
    parts: ClassVar[tuple[str, ...]] = ("weight_scale_inv", "weight_scale", "input_scale")
    dynamic: bool = field(default=True)

    def scheme(self, weight: StoredWeight) -> ActivationScheme:
        block = weight.has("weight_scale_inv")
        return FP8_PER_GROUP if block and self.dynamic else UNQUANTIZED

    def shape(self, weight: StoredWeight) -> tuple[int, ...]:
        info = weight.info("weight", "F8_E4M3")
        if len(info.shape) != 2:
            raise weight.error(f"it has shape {info.shape} and not two dimensions")
        outputs, inputs = info.shape
        if weight.has("weight_scale_inv"):
            weight.shaped("weight_scale_inv", (-(-outputs // FP8_BLOCK), -(-inputs // FP8_BLOCK)), *FLOATS)
        return info.shape

    def input_step(self, weight: StoredWeight) -> int:
        """Parts may begin at multiples of so many inputs."""
        scale = weight.info(self._scales(weight), *FLOATS).shape
        return 1 if one_per_output(weight, scale, self.shape(weight)) else FP8_BLOCK

    def load(self, weight: StoredWeight) -> QuantizedWeight:
        return load_fp8(weight, self._scales(weight), self.shape(weight))

    def _scales(self, weight: StoredWeight) -> str:
        return "weight_scale_inv" if weight.has("weight_scale_inv") else "weight_scale"


def open_block_fp8(settings: Mapping[str, Any]) -> BlockFp8:
    """From ``quantization_config``; raises CheckpointError for what is not understood."""
    reader = ConfigReader(settings, WHAT)
    block = reader.get("weight_block_size", [FP8_BLOCK, FP8_BLOCK])
    if block != [FP8_BLOCK, FP8_BLOCK]:
        raise reader.error("weight_block_size", block, f"[{FP8_BLOCK}, {FP8_BLOCK}]")
    reader.choice("fmt", {"e4m3": "e4m3"}, "e4m3")
    schemes = {"dynamic": "dynamic", "static": "static"}
    dynamic = reader.choice("activation_scheme", schemes, "dynamic") == "dynamic"
    neutral = {"dequantize": (False,), "expert_dtype": ("fp8",), "scale_fmt": ("float",)}
    reader.refuse_unread(_IRRELEVANT, neutral)
    return BlockFp8(dynamic=dynamic)


def scale_per_output(weight: StoredWeight, part: str, rows: slice) -> torch.Tensor:
    """Scales of some outputs, of scales per output or for all, (O, 1)."""
    one = math.prod(weight.info(part, *FLOATS).shape) == 1
    return weight.scale(part, *(() if one else (rows,))).flatten().expand(width(rows)).contiguous()[:, None]


def one_per_output(weight: StoredWeight, scale: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether scales of fp8 weights are for outputs or for all, and not for blocks."""
    block = math.prod(scale) == 1 and len(scale) == 2 and weight.has("weight_scale_inv")
    return math.prod(scale) in (1, shape[0]) and (len(scale) < 2 or scale[-1] == 1) and not block


def load_fp8(weight: StoredWeight, part: str, shape: tuple[int, ...]) -> QuantizedWeight:
    """A weight, or a part of it, with its scales: per output, for all, or per block.

    Arguments:
        part: the name of the scales.
        shape: of the whole weight.
    """
    rows, columns = weight.kept.of(shape)
    scale = weight.info(part, *FLOATS).shape
    data = weight.read("weight", rows, columns).clone()
    if bool(data.float().isnan().any()):
        raise weight.error("some of its codes are not numbers")
    if one_per_output(weight, scale, shape):
        return QuantizedWeight(format=FP8, data=data, scale=scale_per_output(weight, part, rows))
    if scale != tuple(-(-size // FP8_BLOCK) for size in shape):
        raise weight.error(
            f"fp8 takes scales per output, for all, or per {FP8_BLOCK} x {FP8_BLOCK} block,"
            f" not {scale} for {shape[0]} x {shape[1]}"
        )
    blocks = weight.scale(part, words_of(rows, FP8_BLOCK), words_of(columns, FP8_BLOCK)).contiguous()
    if (first := rows.start % FP8_BLOCK) == 0:
        return QuantizedWeight(format=FP8, data=data, scale=blocks, block_out=FP8_BLOCK, group=FP8_BLOCK)
    scale_OG = blocks.repeat_interleave(FP8_BLOCK, 0)[first : first + width(rows)].contiguous()
    return QuantizedWeight(format=FP8, data=data, scale=scale_OG, group=FP8_BLOCK)
