"""Weights that an imported checkpoint keeps in the blocks of a GGUF file: ``weight_q4_k`` and the like, uint8."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...kernels.api.formats import UNQUANTIZED, ActivationScheme
from ...kernels.api.quantized_weight import QuantizedWeight
from .gguf_blocks import WIDENED, block_sizes, dequantized, gguf_weight, has_format
from .stored_codes import width
from .stored_layout import StoredLayout, setting_error
from .stored_weight import StoredWeight
from .weights import CheckpointError

logger = logging.getLogger(__name__)

METHOD = "gguf"
_PREFIX = "weight_"
_BYTES = 2  # of a number of a weight that runs dequantised in 16 bits


def stored_name(name: str, kind: str) -> str:
    """What the blocks of a weight are called.

    Arguments:
        name: of the weight, with ``.weight`` at its end.
        kind: GGUF's name of the type.
    """
    return f"{name.removesuffix('.weight')}.{_PREFIX}{kind.lower()}"


@dataclass(frozen=True, kw_only=True)
class GgufBlocks(StoredLayout):
    """The layout. The type of a weight stands in the name of its tensor, (outputs, bytes of a row)."""

    markers: ClassVar[tuple[str, ...]] = tuple(_PREFIX + kind.lower() for kind in block_sizes())
    parts: ClassVar[tuple[str, ...]] = markers

    def scheme(self, weight: StoredWeight) -> ActivationScheme:
        return UNQUANTIZED

    def shape(self, weight: StoredWeight) -> tuple[int, ...]:
        kind = self.kind(weight)
        block, size = block_sizes()[kind]
        shape = weight.info(_PREFIX + kind.lower(), "U8").shape
        if len(shape) != 2 or shape[1] % size:
            raise weight.error(f"bytes of shape {shape} are no blocks of {kind}, which take {size} bytes each")
        return shape[0], shape[1] // size * block

    def input_step(self, weight: StoredWeight) -> int:
        """Parts may begin at multiples of so many inputs."""
        return block_sizes()[self.kind(weight)][0]

    def load(self, weight: StoredWeight) -> QuantizedWeight | torch.Tensor:
        kind = self.kind(weight)
        block, size = block_sizes()[kind]
        rows, columns = weight.kept.of(self.shape(weight))
        blocks = slice(columns.start // block * size, columns.stop // block * size)
        raw_OX = weight.read(_PREFIX + kind.lower(), rows, blocks)
        shape = (width(rows), width(columns))
        found = gguf_weight(raw_OX, kind, shape)
        return dequantized(raw_OX, kind, shape) if found is None else found

    def keeps(self, weight: StoredWeight) -> bool:
        """Whether a weight stays at its width."""
        return has_format(self.kind(weight))

    def kind(self, weight: StoredWeight) -> str:
        """GGUF's name of a weight's type.

        Raises:
            CheckpointError: for a weight that is there in two types.
        """
        kinds = [kind for kind in block_sizes() if weight.has(_PREFIX + kind.lower())]
        if len(kinds) > 1:
            raise weight.error(f"it is there as {' and as '.join(kinds)}")
        return kinds[0]

    def admit(self, weights: Iterable[StoredWeight], dequantize: bool) -> None:
        """Warn of weights that run dequantised, with their size.

        Arguments:
            dequantize: whether types are allowed that are far smaller than what they become.

        Raises:
            CheckpointError: naming a weight of such a type that is not allowed, and the option that allows it.
        """
        kinds: Counter[str] = Counter()
        stored = widened = 0
        refused = ""
        for weight in weights:
            kind = self.kind(weight)
            if self.keeps(weight):
                continue
            outputs, inputs = self.shape(weight)
            block, size = block_sizes()[kind]
            kinds[kind] += 1
            stored += outputs * inputs // block * size
            widened += outputs * inputs * _BYTES
            refused = refused or ("" if dequantize or kind in WIDENED else f"{weight.name}.weight is {kind}")
        sizes = f"{widened / 2**30:.3g} GiB in 16 bits instead of {stored / 2**30:.3g} GiB"
        if refused:
            raise CheckpointError(
                f"{refused}, a type that has no format here; dequantize=true loads such weights dequantised: {sizes}"
            )
        if kinds:
            what = ", ".join(f"{count} of type {kind}" for kind, count in kinds.most_common())
            logger.warning("Weights without a format here are dequantised (%s): %s", what, sizes)


def open_gguf_blocks(settings: Mapping[str, Any]) -> GgufBlocks:
    """From ``quantization_config``, which says no more than the method; raises CheckpointError for anything else."""
    for key, value in settings.items():
        if key != "quant_method":
            raise setting_error(key, value, f"left away with quant_method {METHOD}")
    return GgufBlocks()
