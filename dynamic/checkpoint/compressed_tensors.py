"""What compressed-tensors writes: packed int4 and int8, plain int8, fp8; how it is read.

Shape suffixes: O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...kernels.api.formats import (
    FP8_BLOCK,
    FP8_PER_GROUP,
    GROUPS,
    INT8,
    INT8_PER_GROUP,
    ROW_GROUP,
    UNQUANTIZED,
    ActivationScheme,
)
from ...kernels.api.quantized_weight import QuantizedWeight
from .block_fp8 import load_fp8, one_per_output, scale_per_output
from .layer_groups import LayerGroup
from .stored_codes import NIBBLES, packed_inputs, some_nibbles, width, words_of
from .stored_groups import Groups, check_order, grouped_int4, groups_of, known_group
from .stored_layout import FLOATS, StoredLayout
from .stored_weight import StoredWeight


@dataclass(frozen=True, kw_only=True)
class CompressedTensors(StoredLayout):
    """What compressed-tensors writes: packed int4 or int8, plain int8, fp8.

    Arguments:
        groups: of layers, each with settings of its own.
    """

    markers: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale")
    parts: ClassVar[tuple[str, ...]] = (
        *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
        *("input_scale", "input_zero_point", "output_scale", "k_scale", "v_scale"),
    )
    groups: tuple[LayerGroup, ...]

    def scheme(self, weight: StoredWeight) -> ActivationScheme:
        if weight.has("weight_packed"):
            return UNQUANTIZED
        if weight.info("weight", "I8", "F8_E4M3").dtype == "I8":
            scale = weight.info("weight_scale", *FLOATS).shape
            asked = any(group.rows == "int8" for group in self._groups_of(weight))
            return INT8_PER_GROUP if asked and math.prod(scale[1:]) == 1 else UNQUANTIZED
        return FP8_PER_GROUP if any(group.rows == "fp8" for group in self._groups_of(weight)) else UNQUANTIZED

    def shape(self, weight: StoredWeight) -> tuple[int, ...]:
        """(O, I); what belongs to the weight is checked."""
        if not weight.has("weight_packed"):
            info = weight.info("weight", "I8", "F8_E4M3")
            if len(info.shape) != 2:
                raise weight.error(f"it has shape {info.shape} and not two dimensions")
            scale = weight.info("weight_scale", *FLOATS)
            if info.dtype == "I8" and math.prod(scale.shape[1:]) != 1:
                self._groups(weight, info.shape, scale.shape, 8)
            return info.shape
        packed, scale = weight.info("weight_packed", "I32"), weight.info("weight_scale", *FLOATS)
        weight.shaped("weight_shape", (2,), "I64", "I32")
        shape = tuple(weight.read("weight_shape").tolist())
        outputs, inputs = shape
        per_word = {-(-inputs * bits // 32): bits for bits in (4, 8)}
        if len(packed.shape) != 2 or packed.shape[0] != outputs or packed.shape[1] not in per_word:
            raise weight.error(f"{packed.shape} words hold no weight of shape {shape} in 4 or 8 bits")
        bits = per_word[packed.shape[1]]
        self._groups(weight, shape, scale.shape, bits)
        if bits == 4:
            if weight.has("weight_zero_point") or self._asymmetric(weight):
                weight.shaped("weight_zero_point", (-(-outputs // NIBBLES), scale.shape[1]), "I32")
        elif weight.has("weight_zero_point"):
            raise weight.error("int8 with zero points has no counterpart here")
        if any(group.scattered for group in self._groups_of(weight)):
            weight.info("weight_g_idx", "I32", "I64")
        return shape

    def input_step(self, weight: StoredWeight) -> int:
        """Parts may begin at multiples of so many inputs."""
        shape, scale = self.shape(weight), weight.info("weight_scale", *FLOATS).shape
        if self.scheme(weight) != UNQUANTIZED:
            return ROW_GROUP
        if not weight.has("weight_packed") and weight.info("weight", "I8", "F8_E4M3").dtype != "I8":
            return 1 if one_per_output(weight, scale, shape) else FP8_BLOCK
        return 1 if math.prod(scale[1:]) == 1 else GROUPS[0]

    def load(self, weight: StoredWeight) -> QuantizedWeight:
        shape = self.shape(weight)
        rows, columns = weight.kept.of(shape)
        if not weight.has("weight_packed"):
            if weight.info("weight", "I8", "F8_E4M3").dtype == "I8":
                if weight.has("weight_zero_point") and bool((weight.read("weight_zero_point") != 0).any()):
                    raise weight.error("int8 with zero points has no counterpart here")
                return self._int8(weight, weight.read("weight", rows, columns).clone(), shape)
            return load_fp8(weight, "weight_scale", shape)
        packed = weight.info("weight_packed", "I32").shape
        if packed[1] * 4 >= shape[1]:
            bytes_OX = weight.read("weight_packed", rows, words_of(columns, 4)).contiguous().view(torch.uint8)
            first = columns.start % 4
            return self._int8(weight, (bytes_OX[:, first : first + width(columns)] ^ 128).view(torch.int8), shape)
        groups = self._stored_groups(weight, shape, 4)
        stored = groups.stored
        scale = weight.scale("weight_scale", rows, stored)
        zero = None
        if weight.has("weight_zero_point"):
            zero = some_nibbles(weight.read("weight_zero_point", words_of(rows), stored).T, rows).T
        check_order(weight, "weight_g_idx", columns, groups.theirs)
        data = packed_inputs(weight.read("weight_packed", rows, words_of(columns)), columns)
        return grouped_int4(data, scale, zero, columns, groups)

    def _asymmetric(self, weight: StoredWeight) -> bool:
        """Whether an int4 weight has zero points."""
        return not any(group.symmetric for group in self._groups_of(weight) if group.bits == 4)

    def _groups_of(self, weight: StoredWeight) -> tuple[LayerGroup, ...]:
        """The settings of a weight: those that name it, else those of all linear layers, else any."""
        if len(self.groups) == 1:
            return self.groups
        named = tuple(group for group in self.groups if group.has(weight.listed))
        return named[:1] or tuple(group for group in self.groups if group.all_linear) or self.groups

    def _int8(self, weight: StoredWeight, data_OI: torch.Tensor, shape: tuple[int, ...]) -> QuantizedWeight:
        scale = weight.info("weight_scale", *FLOATS).shape
        rows, columns = weight.kept.of(shape)
        if math.prod(scale) == 1 or math.prod(scale[1:]) == 1:
            if math.prod(scale) not in (1, shape[0]):
                raise weight.error(f"int8 takes one scale per output ({shape[0]}) or for all, not {scale}")
            return QuantizedWeight(format=INT8, data=data_OI, scale=scale_per_output(weight, "weight_scale", rows))
        groups = self._stored_groups(weight, shape, 8)
        check_order(weight, "weight_g_idx", columns, groups.theirs)
        scale_OG = groups.spread(weight.scale("weight_scale", rows, groups.stored))
        return QuantizedWeight(format=INT8, data=data_OI, scale=scale_OG, group=groups.ours)

    def _stored_groups(self, weight: StoredWeight, shape: tuple[int, ...], bits: int) -> Groups:
        group = self._groups(weight, shape, weight.info("weight_scale", *FLOATS).shape, bits)
        return groups_of(group, weight.kept.of(shape)[1], shape[1])

    def _groups(self, weight: StoredWeight, shape: tuple[int, ...], scales: tuple[int, ...], bits: int) -> int:
        """Inputs that share one of the scales, whose shape is given."""
        outputs, inputs = shape
        if len(scales) != 2 or scales[0] != outputs:
            raise weight.error(f"scales of shape {tuple(scales)} do not fit the shape {shape}")
        groups = scales[1]
        own = [group for group in self._groups_of(weight) if group.bits == bits]
        if groups == 1 and any(group.strategy in ("channel", "tensor") for group in own):
            return inputs
        sizes = {group.size for group in own}
        fitting = [size for size in sizes if size and -(-inputs // size) == groups]
        if len(fitting) != 1:
            raise weight.error(
                f"{groups} groups of {inputs} inputs fit none of the group sizes in config.json: {sizes}"
            )
        return known_group(weight, fitting[0], inputs)
