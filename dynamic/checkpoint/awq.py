"""AWQ's layout of int4 weights (``qweight``, ``qzeros``, ``scales``).

Shape suffixes: O outputs, I inputs, G groups of inputs, W words of 32 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...kernels.api.codes import pack_int4
from ...kernels.api.formats import UNQUANTIZED, ActivationScheme
from ...kernels.api.quantized_weight import QuantizedWeight
from .config_reader import ConfigReader
from .stored_codes import NIBBLES, from_first_word, nibbles, words_of
from .stored_groups import grouped_int4, groups_of, int4_step, known_group
from .stored_layout import CALIBRATION_KEYS, FLOATS, WHAT, StoredLayout, group_size, setting_error, two_sizes, want
from .stored_weight import StoredWeight

_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # positions of the codes of outputs 0 … 7 in a word


@dataclass(frozen=True, kw_only=True)
class Awq(StoredLayout):
    """AWQ's layout: words along the outputs, with its own order within a word.

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
        inputs, words = two_sizes(weight, "qweight")
        group = known_group(weight, inputs if self.group == -1 else self.group, inputs)
        groups, outputs = -(-inputs // group), words * NIBBLES
        weight.shaped("scales", (groups, outputs), *FLOATS)
        if self.zero_points or weight.has("qzeros"):
            weight.shaped("qzeros", (groups, words), "I32")
        return outputs, inputs

    def input_step(self, weight: StoredWeight) -> int:
        """Parts may begin at multiples of so many inputs."""
        return int4_step(self.group, self.shape(weight))

    def load(self, weight: StoredWeight) -> QuantizedWeight:
        shape = self.shape(weight)
        rows, columns = weight.kept.of(shape)
        groups = groups_of(shape[1] if self.group == -1 else self.group, columns, shape[1])
        codes_OI = self._codes(weight.read("qweight", columns, words_of(rows)), rows).T.contiguous()
        zero = None
        if weight.has("qzeros"):
            zero = self._codes(weight.read("qzeros", groups.stored, words_of(rows)), rows).T
        scale_OG = weight.scale("scales", groups.stored, rows).T.contiguous()
        return grouped_int4(pack_int4(codes_OI), scale_OG, zero, columns, groups)

    def _codes(self, words_XW: torch.Tensor, kept: slice) -> torch.Tensor:
        eights = nibbles(words_XW).unflatten(-1, (-1, NIBBLES))
        return from_first_word(eights[..., list(_ORDER)].flatten(-2), kept)


def open_awq(settings: Mapping[str, Any]) -> Awq:
    """From ``quantization_config``; raises CheckpointError for what is not understood."""
    reader = ConfigReader(settings, WHAT)
    want(settings, "bits", 4, alias="w_bit")
    for key in ("version", "format", "checkpoint_format"):
        if str(version := reader.get(key, "gemm")).lower() != "gemm":
            raise setting_error(key, version, "gemm, the only layout of AWQ that is understood")
    zero_points = reader.flag("zero_point", True)
    group = group_size(settings, alias="q_group_size")
    known = CALIBRATION_KEYS | {"bits", "w_bit", "group_size", "q_group_size", "sym"}
    reader.refuse_unread(known, {"dynamic": ({},), "pack_dtype": ("int32",)})
    return Awq(group=group, zero_points=zero_points)
