"""GPTQ's layout of int4 weights (``qweight``, ``qzeros``, ``scales``, ``g_idx``).

Shape suffixes: O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...kernels.api.formats import UNQUANTIZED, ActivationScheme
from ...kernels.api.quantized_weight import QuantizedWeight
from .stored_codes import NIBBLES, packed_inputs, some_nibbles, words_of
from .stored_groups import check_order, grouped_int4, groups_of, int4_step, known_group
from .stored_layout import FLOATS, group_size, two_sizes, want
from .stored_weight import StoredWeight


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
        words, outputs = two_sizes(weight, "qweight")
        inputs = words * NIBBLES
        group = known_group(weight, inputs if self.group == -1 else self.group, inputs)
        groups = -(-inputs // group)
        weight.shaped("scales", (groups, outputs), *FLOATS)
        weight.shaped("qzeros", (groups, -(-outputs // NIBBLES)), "I32")
        if weight.has("g_idx"):
            weight.shaped("g_idx", (inputs,), "I32", "I64")
        return outputs, inputs

    def input_step(self, weight: StoredWeight) -> int:
        """Parts may begin at multiples of so many inputs."""
        return int4_step(self.group, self.shape(weight))

    def load(self, weight: StoredWeight) -> QuantizedWeight:
        shape = self.shape(weight)
        rows, columns = weight.kept.of(shape)
        groups = groups_of(shape[1] if self.group == -1 else self.group, columns, shape[1])
        check_order(weight, "g_idx", columns, groups.theirs)
        data = packed_inputs(weight.read("qweight", words_of(columns), rows).T, columns)
        zero_GO = (some_nibbles(weight.read("qzeros", groups.stored, words_of(rows)), rows) + self.zero_offset) & 15
        plain = self.symmetric and bool((zero_GO == 8).all())
        scale_OG = weight.scale("scales", groups.stored, rows).T.contiguous()
        return grouped_int4(data, scale_OG, None if plain else zero_GO.T, columns, groups)


def open_gptq(settings: Mapping[str, Any]) -> Gptq:
    """From ``quantization_config``; raises CheckpointError for what is not understood."""
    want(settings, "bits", 4)
    v2 = settings.get("checkpoint_format") == "gptq_v2"
    symmetric = settings.get("sym", True) is True
    return Gptq(group=group_size(settings), zero_offset=0 if v2 else 1, symmetric=symmetric)
