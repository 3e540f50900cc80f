"""How others lay out quantised weights in a checkpoint, and what each becomes in our formats.

Every layout names the tensor by which a quantised weight is known, and reads one weight or a part of it. Names are
module names, such as ``model.layers.0.self_attn.q_proj``. Shape suffixes: O outputs, I inputs, G groups of inputs, W
words of 32 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from ...kernels.api.formats import (
    FP8_BLOCK,
    FP8_PER_GROUP,
    GROUPS,
    INT8_PER_GROUP,
    ROW_GROUP,
    UNQUANTIZED,
    ActivationScheme,
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    QuantizedWeight,
    pack_int4,
)
from .stored_codes import (
    NIBBLES,
    Groups,
    from_first_word,
    groups_of,
    nibbles,
    packed_inputs,
    some_nibbles,
    width,
    words_of,
)
from .stored_weight import StoredWeight

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where the codes of outputs 0 … 7 lie in a word
FLOATS = ("F32", "F16", "BF16")


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
            return 1 if _one_per_output(weight, scale, shape) else FP8_BLOCK
        return 1 if math.prod(scale[1:]) == 1 else GROUPS[0]

    def load(self, weight: StoredWeight) -> QuantizedWeight:
        shape = self.shape(weight)
        rows, columns = weight.kept.of(shape)
        if not weight.has("weight_packed"):
            if weight.info("weight", "I8", "F8_E4M3").dtype == "I8":
                if weight.has("weight_zero_point") and bool((weight.read("weight_zero_point") != 0).any()):
                    raise weight.error("int8 with zero points has no counterpart here")
                return self._int8(weight, weight.read("weight", rows, columns).clone(), shape)
            return _fp8(weight, "weight_scale", shape)
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
        _check_order(weight, "weight_g_idx", columns, groups.theirs)
        data = packed_inputs(weight.read("weight_packed", rows, words_of(columns)), columns)
        return replace(_int4(data, scale, zero, columns, groups), offset=offset)

    @property
    def _asymmetric(self) -> bool:
        """Whether every int4 weight has zero points."""
        kinds = [w.get("symmetric", True) for w in self.weights if w.get("num_bits") == 4]
        return not any(kinds)

    def _int8(self, weight: StoredWeight, data_OI: torch.Tensor, shape: tuple[int, ...]) -> Int8Weight:
        scale = weight.info("weight_scale", *FLOATS).shape
        rows, columns = weight.kept.of(shape)
        if math.prod(scale) == 1 or math.prod(scale[1:]) == 1:
            if math.prod(scale) not in (1, shape[0]):
                raise weight.error(f"int8 takes one scale per output ({shape[0]}) or for all, not {scale}")
            return Int8Weight(data=data_OI, scale=_per_output(weight, "weight_scale", rows))
        groups = self._stored_groups(weight, shape, 8)
        _check_order(weight, "weight_g_idx", columns, groups.theirs)
        scale_OG = groups.spread(weight.scale("weight_scale", rows, groups.stored))
        return Int8Weight(data=data_OI, scale=scale_OG, group=groups.ours)

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
        return _known_group(weight, fitting[0], inputs)


@dataclass(frozen=True, kw_only=True)
class Gptq:
    """GPTQ's layout: words along the inputs, a scale and a zero point per group.

    Arguments:
        group: inputs that share a scale; -1: all of them.
        zero_offset: is added to the zero points as they are stored: 1 in the layout's first version.
        symmetric: the zero points are 8, although they are stored.
    """

    markers: ClassVar[tuple[str, ...]] = ("qweight",)
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")
    group: int
    zero_offset: int
    symmetric: bool

    def scheme(self, weight: StoredWeight) -> ActivationScheme:
        return UNQUANTIZED

    def shape(self, weight: StoredWeight) -> tuple[int, ...]:
        words, outputs = _two(weight, "qweight")
        inputs = words * NIBBLES
        group = _known_group(weight, inputs if self.group == -1 else self.group, inputs)
        groups = -(-inputs // group)
        weight.shaped("scales", (groups, outputs), *FLOATS)
        weight.shaped("qzeros", (groups, -(-outputs // NIBBLES)), "I32")
        if weight.has("g_idx"):
            weight.shaped("g_idx", (inputs,), "I32", "I64")
        return outputs, inputs

    def input_step(self, weight: StoredWeight) -> int:
        """Parts may begin at multiples of so many inputs."""
        return _int4_step(self.group, self.shape(weight))

    def load(self, weight: StoredWeight) -> QuantizedWeight:
        shape = self.shape(weight)
        rows, columns = weight.kept.of(shape)
        groups = groups_of(shape[1] if self.group == -1 else self.group, columns, shape[1])
        _check_order(weight, "g_idx", columns, groups.theirs)
        data = packed_inputs(weight.read("qweight", words_of(columns), rows).T, columns)
        zero_GO = (some_nibbles(weight.read("qzeros", groups.stored, words_of(rows)), rows) + self.zero_offset) & 15
        plain = self.symmetric and bool((zero_GO == 8).all())
        scale_OG = weight.scale("scales", groups.stored, rows).T.contiguous()
        return _int4(data, scale_OG, None if plain else zero_GO.T, columns, groups)


@dataclass(frozen=True, kw_only=True)
class Awq:
    """AWQ's layout: words along the outputs, with an order of its own within a word.

    Arguments:
        group: inputs that share a scale; -1: all of them.
        zero_points: whether every weight has some.
    """

    markers: ClassVar[tuple[str, ...]] = ("qweight",)
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")
    group: int
    zero_points: bool

    def scheme(self, weight: StoredWeight) -> ActivationScheme:
        return UNQUANTIZED

    def shape(self, weight: StoredWeight) -> tuple[int, ...]:
        inputs, words = _two(weight, "qweight")
        group = _known_group(weight, inputs if self.group == -1 else self.group, inputs)
        groups, outputs = -(-inputs // group), words * NIBBLES
        weight.shaped("scales", (groups, outputs), *FLOATS)
        if self.zero_points or weight.has("qzeros"):
            weight.shaped("qzeros", (groups, words), "I32")
        return outputs, inputs

    def input_step(self, weight: StoredWeight) -> int:
        """Parts may begin at multiples of so many inputs."""
        return _int4_step(self.group, self.shape(weight))

    def load(self, weight: StoredWeight) -> QuantizedWeight:
        shape = self.shape(weight)
        rows, columns = weight.kept.of(shape)
        groups = groups_of(shape[1] if self.group == -1 else self.group, columns, shape[1])
        codes_OI = self._codes(weight.read("qweight", columns, words_of(rows)), rows).T.contiguous()
        zero = None
        if weight.has("qzeros"):
            zero = self._codes(weight.read("qzeros", groups.stored, words_of(rows)), rows).T
        scale_OG = weight.scale("scales", groups.stored, rows).T.contiguous()
        return _int4(pack_int4(codes_OI), scale_OG, zero, columns, groups)

    def _codes(self, words_XW: torch.Tensor, kept: slice) -> torch.Tensor:
        eights = nibbles(words_XW).unflatten(-1, (-1, NIBBLES))
        return from_first_word(eights[..., list(_AWQ_ORDER)].flatten(-2), kept)


@dataclass(frozen=True, kw_only=True)
class BlockFp8:
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
        return 1 if _one_per_output(weight, scale, self.shape(weight)) else FP8_BLOCK

    def load(self, weight: StoredWeight) -> QuantizedWeight:
        return _fp8(weight, self._scales(weight), self.shape(weight))

    def _scales(self, weight: StoredWeight) -> str:
        return "weight_scale_inv" if weight.has("weight_scale_inv") else "weight_scale"


StoredLayout = CompressedTensors | Gptq | Awq | BlockFp8


def _two(weight: StoredWeight, part: str) -> tuple[int, int]:
    shape = weight.info(part, "I32").shape
    if len(shape) != 2:
        raise weight.error(f"{part} has shape {shape} and not two dimensions")
    return shape[0], shape[1]


def _known_group(weight: StoredWeight, group: int, inputs: int) -> int:
    """The group size; one that spans all inputs, or several of ours, is split later."""
    if group not in GROUPS and (group < 1 or group % GROUPS[0]) and group < inputs:
        raise weight.error(f"groups of {group} inputs are no multiple of {GROUPS[0]}")
    return group


def _check_order(weight: StoredWeight, part: str, inputs: slice, group: int) -> None:
    """Groups must lie side by side."""
    if not weight.has(part):
        return
    index_I = weight.read(part, inputs).long()
    if not torch.equal(index_I, torch.arange(inputs.start, inputs.stop) // group) and not bool((index_I == -1).all()):
        raise weight.error(
            f"its groups are scattered over the inputs ({part}); only checkpoints whose groups are contiguous load:"
            " quantise without desc_act, or with static groups"
        )


def _int4_step(group: int, shape: tuple[int, ...]) -> int:
    return 1 if group == -1 or group >= shape[1] else GROUPS[0]


def _int4(
    data: torch.Tensor, scale_OG: torch.Tensor, zero_OG: torch.Tensor | None, inputs: slice, groups: Groups
) -> Int4Weight:
    return Int4Weight(
        data=data.contiguous(),
        scale=groups.spread(scale_OG),
        inputs=width(inputs),
        group=groups.ours,
        zero=None if zero_OG is None else groups.spread(zero_OG).contiguous(),
    )


def _per_output(weight: StoredWeight, part: str, rows: slice) -> torch.Tensor:
    """Scales of some outputs, of scales per output or for all, (O)."""
    one = math.prod(weight.info(part, *FLOATS).shape) == 1
    return weight.scale(part, *(() if one else (rows,))).flatten().expand(width(rows)).contiguous()


def _one_per_output(weight: StoredWeight, scale: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether scales of fp8 weights are for outputs or for all, and not for blocks."""
    block = math.prod(scale) == 1 and len(scale) == 2 and weight.has("weight_scale_inv")
    return math.prod(scale) in (1, shape[0]) and (len(scale) < 2 or scale[-1] == 1) and not block


def _fp8(weight: StoredWeight, part: str, shape: tuple[int, ...]) -> Fp8Weight:
    rows, columns = weight.kept.of(shape)
    scale = weight.info(part, *FLOATS).shape
    data = weight.read("weight", rows, columns).clone()
    if bool(data.float().isnan().any()):
        raise weight.error("some of its codes are not numbers")
    if _one_per_output(weight, scale, shape):
        return Fp8Weight(data=data, scale=_per_output(weight, part, rows)[:, None])
    if scale != tuple(-(-size // FP8_BLOCK) for size in shape):
        raise weight.error(
            f"fp8 takes scales per output, for all, or per {FP8_BLOCK} x {FP8_BLOCK} block,"
            f" not {scale} for {shape[0]} x {shape[1]}"
        )
    blocks = weight.scale(part, words_of(rows, FP8_BLOCK), words_of(columns, FP8_BLOCK)).contiguous()
    if (first := rows.start % FP8_BLOCK) == 0:
        return Fp8Weight(data=data, scale=blocks, block_out=FP8_BLOCK, block_in=FP8_BLOCK)
    scale_OG = blocks.repeat_interleave(FP8_BLOCK, 0)[first : first + width(rows)].contiguous()
    return Fp8Weight(data=data, scale=scale_OG, block_in=FP8_BLOCK)
