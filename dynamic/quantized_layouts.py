"""How others lay out quantised weights in a checkpoint, and what each becomes in our formats.

Every layout names the tensor by which a quantised weight is known, and reads one weight. Names are module names, such
as ``model.layers.0.self_attn.q_proj``. Shape suffixes: O outputs, I inputs, G groups of inputs, W words of 32 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from ..kernels.formats import (
    FP8_BLOCK,
    FP8_PER_GROUP,
    GROUPS,
    INT8_PER_GROUP,
    UNQUANTIZED,
    ActivationScheme,
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    QuantizedWeight,
    pack_int4,
    unpack_int4,
)
from .weights import CheckpointError, TensorInfo

_NIBBLES = 8  # codes of 4 bits in a word
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where the codes of outputs 0 … 7 lie in a word


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """One weight's tensors.

    Arguments:
        name: of the module.
        tensors: what the files' headers say.
        load: reads a tensor by its full name.
    """

    name: str
    tensors: Mapping[str, TensorInfo]
    load: Callable[[str], torch.Tensor]

    def has(self, part: str) -> bool:
        """Whether there is a tensor ``name.part``."""
        return f"{self.name}.{part}" in self.tensors

    def info(self, part: str, *dtypes: str) -> TensorInfo:
        """A tensor's header.

        Raises:
            CheckpointError: when it is missing, or has none of these dtypes.
        """
        full = f"{self.name}.{part}"
        if full not in self.tensors:
            raise CheckpointError(f"the quantised weight {self.name!r} lacks its tensor {full!r}")
        info = self.tensors[full]
        if info.dtype not in dtypes:
            raise CheckpointError(
                f"tensor {full!r} in {info.file} has dtype {info.dtype}; its layout wants {' or '.join(dtypes)}"
            )
        return info

    def shaped(self, part: str, shape: tuple[int, ...], *dtypes: str) -> None:
        """Raises CheckpointError unless a tensor is there in this shape."""
        info = self.info(part, *dtypes)
        if info.shape != shape:
            raise CheckpointError(
                f"tensor {self.name + '.' + part!r} in {info.file} has shape {info.shape};"
                f" the rest of the quantised weight implies {shape}"
            )

    def read(self, part: str) -> torch.Tensor:
        """A tensor over the mapped file."""
        return self.load(f"{self.name}.{part}")

    def scale(self, part: str) -> torch.Tensor:
        """Scales in float32.

        Raises:
            CheckpointError: when some are not finite.
        """
        scale = self.read(part).float()
        if not bool(scale.isfinite().all()):
            raise self.error(f"{int((~scale.isfinite()).sum())} of the {scale.numel()} values of {part} are not finite")
        return scale

    def error(self, reason: str) -> CheckpointError:
        """For a weight that cannot be represented or makes no sense."""
        return CheckpointError(f"the quantised weight {self.name!r} cannot be loaded: {reason}")


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
                weight.shaped("weight_zero_point", (-(-outputs // _NIBBLES), scale.shape[1]), "I32")
        elif weight.has("weight_zero_point"):
            raise weight.error("int8 with zero points has no counterpart here")
        return shape

    def load(self, weight: StoredWeight) -> QuantizedWeight:
        outputs, inputs = self.shape(weight)
        scale = weight.scale("weight_scale")
        if not weight.has("weight_packed"):
            if weight.info("weight", "I8", "F8_E4M3").dtype == "I8":
                if weight.has("weight_zero_point") and bool((weight.read("weight_zero_point") != 0).any()):
                    raise weight.error("int8 with zero points has no counterpart here")
                return self._int8(weight, weight.read("weight").clone(), scale)
            return _fp8(weight, scale, outputs, inputs)
        data = weight.read("weight_packed").contiguous().view(torch.uint8)
        if data.shape[1] >= inputs:
            signed = (data[:, :inputs] ^ 128).view(torch.int8)
            return self._int8(weight, signed, scale)
        zero = None
        if weight.has("weight_zero_point"):
            zero = _nibbles(weight.read("weight_zero_point").T)[:, :outputs].T
        group = self._groups(weight, (outputs, inputs), scale.shape, 4)
        _check_order(weight, "weight_g_idx", inputs, group)
        packed = _int4(data[:, : -(-inputs // 2)], scale, zero, inputs, group)
        return replace(packed, offset=weight.scale("weight_offset")) if weight.has("weight_offset") else packed

    @property
    def _asymmetric(self) -> bool:
        """Whether every int4 weight has zero points."""
        kinds = [w.get("symmetric", True) for w in self.weights if w.get("num_bits") == 4]
        return not any(kinds)

    def _int8(self, weight: StoredWeight, data_OI: torch.Tensor, scale: torch.Tensor) -> Int8Weight:
        outputs, inputs = data_OI.shape
        if scale.numel() == 1 or scale.shape[1:].numel() == 1:
            return Int8Weight(data=data_OI, scale=_per_output(weight, scale, outputs))
        group, index_G = _ours(self._groups(weight, (outputs, inputs), scale.shape, 8), inputs)
        _check_order(weight, "weight_g_idx", inputs, group)
        return Int8Weight(data=data_OI, scale=scale[:, index_G], group=group)

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
        inputs = words * _NIBBLES
        group = _known_group(weight, inputs if self.group == -1 else self.group, inputs)
        groups = -(-inputs // group)
        weight.shaped("scales", (groups, outputs), *FLOATS)
        weight.shaped("qzeros", (groups, -(-outputs // _NIBBLES)), "I32")
        if weight.has("g_idx"):
            weight.shaped("g_idx", (inputs,), "I32", "I64")
        return outputs, inputs

    def load(self, weight: StoredWeight) -> QuantizedWeight:
        outputs, inputs = self.shape(weight)
        group = inputs if self.group == -1 else self.group
        _check_order(weight, "g_idx", inputs, group)
        data = weight.read("qweight").T.contiguous().view(torch.uint8)
        zero_GO = (_nibbles(weight.read("qzeros"))[:, :outputs] + self.zero_offset) & 15
        plain = self.symmetric and bool((zero_GO == 8).all())
        return _int4(data, weight.scale("scales").T.contiguous(), None if plain else zero_GO.T, inputs, group)


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
        groups, outputs = -(-inputs // group), words * _NIBBLES
        weight.shaped("scales", (groups, outputs), *FLOATS)
        if self.zero_points or weight.has("qzeros"):
            weight.shaped("qzeros", (groups, words), "I32")
        return outputs, inputs

    def load(self, weight: StoredWeight) -> QuantizedWeight:
        _, inputs = self.shape(weight)
        group = inputs if self.group == -1 else self.group
        codes_OI = self._codes(weight.read("qweight")).T.contiguous()
        zero = self._codes(weight.read("qzeros")).T if weight.has("qzeros") else None
        return _int4(pack_int4(codes_OI), weight.scale("scales").T.contiguous(), zero, inputs, group)

    def _codes(self, words_XW: torch.Tensor) -> torch.Tensor:
        nibbles = _nibbles(words_XW).unflatten(-1, (-1, _NIBBLES))
        return nibbles[..., list(_AWQ_ORDER)].flatten(-2)


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

    def load(self, weight: StoredWeight) -> QuantizedWeight:
        outputs, inputs = self.shape(weight)
        part = "weight_scale_inv" if weight.has("weight_scale_inv") else "weight_scale"
        return _fp8(weight, weight.scale(part), outputs, inputs)


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


def _check_order(weight: StoredWeight, part: str, inputs: int, group: int) -> None:
    """Groups must lie side by side."""
    if not weight.has(part):
        return
    index_I = weight.read(part).long()
    if not torch.equal(index_I, torch.arange(inputs) // group) and not bool((index_I == -1).all()):
        raise weight.error(
            f"its groups are scattered over the inputs ({part}); only checkpoints whose groups are contiguous load:"
            " quantise without desc_act, or with static groups"
        )


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """(…, W) words of 32 bits → (…, 8 W) codes, the lowest bits first, uint8."""
    return unpack_int4(words.contiguous().view(torch.uint8))


def _int4(
    data: torch.Tensor, scale_OG: torch.Tensor, zero_OG: torch.Tensor | None, inputs: int, group: int
) -> Int4Weight:
    ours, index_G = _ours(group, inputs)
    scale_OG = scale_OG[:, index_G]
    zero_OG = None if zero_OG is None else zero_OG[:, index_G]
    return Int4Weight(
        data=data.contiguous(),
        scale=scale_OG,
        inputs=inputs,
        group=ours,
        zero=None if zero_OG is None else zero_OG.contiguous(),
    )


def _ours(group: int, inputs: int) -> tuple[int, torch.Tensor]:
    """The size of the groups that a group is cut into, and which of the stored scales each of them takes, (G)."""
    ours = group if group in GROUPS else next(g for g in reversed(GROUPS) if group >= inputs or group % g == 0)
    return ours, torch.arange(-(-inputs // ours)) * ours // group


def _per_output(weight: StoredWeight, scale: torch.Tensor, outputs: int) -> torch.Tensor:
    if scale.numel() not in (1, outputs):
        raise weight.error(f"int8 takes one scale per output ({outputs}) or for all, not {tuple(scale.shape)}")
    return scale.flatten().expand(outputs).contiguous()


def _fp8(weight: StoredWeight, scale: torch.Tensor, outputs: int, inputs: int) -> Fp8Weight:
    data = weight.read("weight").clone()
    if bool(data.float().isnan().any()):
        raise weight.error("some of its codes are not numbers")
    if (
        scale.numel() in (1, outputs)
        and (scale.dim() < 2 or scale.shape[-1] == 1)
        and not (scale.numel() == 1 and scale.dim() == 2 and weight.has("weight_scale_inv"))
    ):
        return Fp8Weight(data=data, scale=scale.flatten().expand(outputs)[:, None].contiguous())
    if scale.shape != (-(-outputs // FP8_BLOCK), -(-inputs // FP8_BLOCK)):
        raise weight.error(
            f"fp8 takes scales per output, for all, or per {FP8_BLOCK} x {FP8_BLOCK} block,"
            f" not {tuple(scale.shape)} for {outputs} x {inputs}"
        )
    return Fp8Weight(data=data, scale=scale.contiguous(), block_out=FP8_BLOCK, block_in=FP8_BLOCK)
