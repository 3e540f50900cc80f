"""GPTQ's layout of int4 weights (``qweight``, ``qzeros``, ``scales``, ``g_idx``).

Shape suffixes: O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...kernels.api.formats import UNQUANTIZED, ActivationScheme
from ...kernels.api.quantized_weight import QuantizedWeight
from .config_reader import ConfigReader
from .stored_codes import NIBBLES, packed_inputs, some_nibbles, words_of
from .stored_groups import check_order, grouped_int4, groups_of, int4_step, known_group
from .stored_layout import (
    CALIBRATION_KEYS,
    FLOATS,
    WHAT,
    ModulePattern,
    StoredLayout,
    group_size,
    setting_error,
    two_sizes,
    want,
)
from .stored_weight import StoredWeight

_NEUTRAL: dict[str, tuple[Any, ...]] = {"adapter": ({},), "is_marlin_format": (False,), "pack_dtype": ("int32",)}


@dataclass(frozen=True, kw_only=True)
class GptqGrid:
    """What codes of 4 bits stand for.

    Arguments:
        group: inputs that share a scale; -1: all of them.
        symmetric: the zero points are 8, although they are stored.
    """

    group: int
    symmetric: bool


@dataclass(frozen=True, kw_only=True)
class Gptq(StoredLayout):
    """GPTQ's layout: words along the inputs, a scale and a zero point per group.

    Arguments:
        grid: of most weights.
        zero_offset: is added to the zero points as they are stored: 1 in the layout's first version.
        ordered: every weight says which group each input is in.
        exceptions: patterns of module names and their grid; None where they have no 4 bits. The first one counts.
    """

    markers: ClassVar[tuple[str, ...]] = ("qweight",)
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")
    grid: GptqGrid
    zero_offset: int
    ordered: bool = False
    exceptions: tuple[tuple[ModulePattern, GptqGrid | None], ...] = ()

    def scheme(self, weight: StoredWeight) -> ActivationScheme:
        return UNQUANTIZED

    def shape(self, weight: StoredWeight) -> tuple[int, ...]:
        words, outputs = two_sizes(weight, "qweight")
        inputs = words * NIBBLES
        group = self._of(weight).group
        group = known_group(weight, inputs if group == -1 else group, inputs)
        groups = -(-inputs // group)
        weight.shaped("scales", (groups, outputs), *FLOATS)
        weight.shaped("qzeros", (groups, -(-outputs // NIBBLES)), "I32")
        if self.ordered or weight.has("g_idx"):
            weight.shaped("g_idx", (inputs,), "I32", "I64")
        return outputs, inputs

    def input_step(self, weight: StoredWeight) -> int:
        """Parts may begin at multiples of so many inputs."""
        return int4_step(self._of(weight).group, self.shape(weight))

    def load(self, weight: StoredWeight) -> QuantizedWeight:
        shape, grid = self.shape(weight), self._of(weight)
        rows, columns = weight.kept.of(shape)
        groups = groups_of(shape[1] if grid.group == -1 else grid.group, columns, shape[1])
        check_order(weight, "g_idx", columns, groups.theirs)
        data = packed_inputs(weight.read("qweight", words_of(columns), rows).T, columns)
        zero_GO = (some_nibbles(weight.read("qzeros", groups.stored, words_of(rows)), rows) + self.zero_offset) & 15
        plain = grid.symmetric and bool((zero_GO == 8).all())
        scale_OG = weight.scale("scales", groups.stored, rows).T.contiguous()
        return grouped_int4(data, scale_OG, None if plain else zero_GO.T, columns, groups)

    def _of(self, weight: StoredWeight) -> GptqGrid:
        for module, grid in self.exceptions:
            if module.begins(weight.listed):
                if grid is None:
                    raise weight.error(f"config.json (dynamic, {module.pattern.pattern!r}) says that it has no 4 bits")
                return grid
        return self.grid


def open_gptq(settings: Mapping[str, Any]) -> Gptq:
    """From ``quantization_config``; raises CheckpointError for what is not understood."""
    reader = ConfigReader(settings, WHAT)
    want(settings, "bits", 4)
    layouts = {"gptq": "gptq", "gptq_v2": "gptq_v2"}
    layout = reader.choice("format", layouts, reader.choice("checkpoint_format", layouts, "gptq"))
    symmetric, group, dynamic = reader.flag("sym", True), group_size(settings), reader.get("dynamic", {})
    if reader.choice("checkpoint_format", layouts, layout) != layout:
        raise reader.error("format", layout, f"the same as checkpoint_format, {settings['checkpoint_format']}")
    if not isinstance(dynamic, Mapping):
        raise reader.error("dynamic", dynamic, "an object: settings by patterns of module names")
    ordered = reader.flag("desc_act", False) and not reader.flag("static_groups", False)
    reader.refuse_unread(CALIBRATION_KEYS | {"bits", "group_size"}, _NEUTRAL)
    own = GptqGrid(group=group, symmetric=symmetric)
    return Gptq(
        grid=own,
        zero_offset=0 if layout == "gptq_v2" else 1,
        ordered=ordered,
        exceptions=tuple(_exception(key, value, own) for key, value in dynamic.items()),
    )


def _exception(key: str, changes: Any, own: GptqGrid) -> tuple[ModulePattern, GptqGrid | None]:
    """An entry of ``dynamic``: which modules it is for, and their grid; None: they are not quantised, or not so."""
    found = ModulePattern.of(key.removeprefix("-:").removeprefix("+:"))
    if key.startswith("-:"):
        return found, None
    if not isinstance(changes, Mapping):
        raise setting_error(f"dynamic[{key!r}]", changes, "an object")
    reader = ConfigReader(changes, f"{WHAT}: dynamic[{key!r}]")
    group = group_size(changes) if reader.get("group_size") is not None else own.group
    grid = GptqGrid(group=group, symmetric=reader.flag("sym", own.symmetric))
    bits = reader.integer("bits", 4)
    reader.refuse_unread(CALIBRATION_KEYS, _NEUTRAL)
    return found, grid if bits == 4 else None
