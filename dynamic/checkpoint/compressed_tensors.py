"""What compressed-tensors writes: packed int4 and int8, plain int8, fp8; how it is read.

Shape suffixes: O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

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
from .stored_codes import NIBBLES, packed_inputs, some_nibbles, width, words_of
from .stored_groups import Groups, check_order, grouped_int4, groups_of, known_group
from .stored_layout import FLOATS, setting_error
from .stored_weight import StoredWeight


@dataclass(frozen=True, kw_only=True)
class CompressedTensors:
    """What compressed-tensors writes: packed int4 or int8, plain int8, fp8. Offsets are an addition of ours.

    Arguments:
        weights: the weights' settings of every group of layers.
        int8_activations: inputs of int8 weights become int8.
        fp8_activations: inputs of fp8 weights in blocks become fp8.
    """

    markers: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale")
    parts: ClassVar[tuple[str, ...]] = (
        *("weight_packed", "weight_scale", "weight_zero_point", "weight_offset", "weight_shape", "weight_g_idx"),
        *("input_scale", "input_zero_point", "output_scale", "k_scale", "v_scale"),
    )
    weights: tuple[Mapping[str, Any], ...]
    int8_activations: bool = False
    fp8_activations: bool = False

    def scheme(self, weight: StoredWeight) -> ActivationScheme:
        if weight.has("weight_packed"):
            return UNQUANTIZED
        if weight.info("weight", "I8", "F8_E4M3").dtype == "I8":
            scale = weight.info("weight_scale", *FLOATS).shape
            return INT8_PER_GROUP if self.int8_activations and math.prod(scale[1:]) == 1 else UNQUANTIZED
        return FP8_PER_GROUP if self.fp8_activations else UNQUANTIZED

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
            if weight.has("weight_offset"):
                weight.shaped("weight_offset", scale.shape, *FLOATS)
            if weight.has("weight_zero_point") or self._asymmetric:
                weight.shaped("weight_zero_point", (-(-outputs // NIBBLES), scale.shape[1]), "I32")
        elif weight.has("weight_zero_point"):
            raise weight.error("int8 with zero points has no counterpart here")
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
        zero = offset = None
        if weight.has("weight_zero_point"):
            zero = some_nibbles(weight.read("weight_zero_point", words_of(rows), stored).T, rows).T
        if weight.has("weight_offset"):
            offset = groups.spread(weight.scale("weight_offset", rows, stored))
        check_order(weight, "weight_g_idx", columns, groups.theirs)
        data = packed_inputs(weight.read("weight_packed", rows, words_of(columns)), columns)
        return replace(grouped_int4(data, scale, zero, columns, groups), offset=offset)

    @property
    def _asymmetric(self) -> bool:
        """Whether every int4 weight has zero points."""
        kinds = [w.get("symmetric", True) for w in self.weights if w.get("num_bits") == 4]
        return not any(kinds)

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
        if groups == 1 and any(w.get("strategy") in ("channel", "tensor") for w in self.weights):
            return inputs
        sizes = {w.get("group_size") for w in self.weights if w.get("num_bits") == bits}
        fitting = [s for s in sizes if isinstance(s, int) and s > 0 and -(-inputs // s) == groups]
        if len(fitting) != 1:
            raise weight.error(
                f"{groups} groups of {inputs} inputs fit none of the group sizes in config.json: {sizes}"
            )
        return known_group(weight, fitting[0], inputs)


def open_compressed_tensors(settings: Mapping[str, Any]) -> CompressedTensors:
    """From ``quantization_config``; raises CheckpointError for what is not understood."""
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise setting_error("config_groups", groups, "an object with at least one group of layers")
    if settings.get("sparsity_config") and settings["sparsity_config"].get("format", "dense") != "dense":
        raise setting_error("sparsity_config", settings["sparsity_config"], "dense")
    weights, activations = [], []
    for group in groups.values():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise setting_error("config_groups", group, "groups with settings of their weights")
        kind = (group["weights"].get("type", "int"), group["weights"].get("num_bits"))
        if kind not in (("int", 4), ("int", 8), ("float", 8)):
            raise setting_error("config_groups", f"{kind[1]}-bit {kind[0]}", "weights of int 4, int 8 or float 8 bits")
        weights.append(group["weights"])
        inputs = group.get("input_activations")
        activations.append(None if not inputs else (inputs.get("type", "int"), inputs.get("num_bits")))
    strange = [kind for kind in activations if kind not in (None, ("int", 8), ("float", 8))]
    if strange:
        raise setting_error("input_activations", f"{strange[0][1]}-bit {strange[0][0]}", "8 bits or none")
    blocks = any(w.get("strategy") == "block" for w in weights)
    return CompressedTensors(
        weights=tuple(weights),
        int8_activations=("int", 8) in activations,
        fp8_activations=blocks and ("float", 8) in activations,
    )
