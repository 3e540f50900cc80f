"""The part of a model that one of several processes keeps, as the loader sees it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ...kernels.api.types import LinearWeights

if TYPE_CHECKING:
    from ...kernels.api.quantized_weight import QuantizedWeight
    from ...kernels.torch.backend import TorchBackend
    from ..checkpoint.weights import Checkpoint, StoredCodes
    from .decoder import Decoder
    from .layer_weights import LayerWeights
    from .layout import Layout
    from .quantization import Method, Quantization
    from .spec import ModelSpec


class Source(Protocol):
    """A checkpoint, or one process's part of it."""

    def view(self, name: str) -> torch.Tensor: ...

    def quantized(self, name: str) -> StoredCodes | None: ...

    def release(self) -> None: ...


class Placement(Protocol):
    """What one process keeps of a model that several share.

    Attributes:
        spec: the model with this process's heads only.
        held: the layers that this process runs.
    """

    spec: ModelSpec
    held: range

    def layout(self, layout: Layout) -> Layout:
        """The layout of this process's part."""
        ...

    def check_quantization(self, name: str, method: Method) -> None:
        """Raise ValueError unless parts of quantised tensors are those of the whole tensors quantised.

        Arguments:
            name: of the method, for the message.
        """
        ...

    def checkpoint(self, whole: Checkpoint) -> Source:
        """The checkpoint, of which only this process's part is read."""
        ...

    def quantize(self, name: str, weight: torch.Tensor, method: Method) -> QuantizedWeight:
        """This process's part of a weight, (O, I) or (E, O, I), with the scales that the whole weight would have."""
        ...

    def kept(self, number: int, layer: LayerWeights, backend: TorchBackend) -> LayerWeights:
        """A layer that was just read, as this process keeps it."""
        ...

    def all_layers(self, layers: Sequence[LayerWeights], source: Any) -> list[LayerWeights]:
        """The layers of the whole model, with stand-ins for those that other processes hold."""
        ...

    def make_decoder(self, spec: ModelSpec, backend: TorchBackend, **parts: Any) -> Decoder:
        """The decoder of this process; takes what :class:`Decoder` takes."""
        ...


# Meets the other processes: (spec, path, backend, quantisation, how the checkpoint is quantised, exit layers).
Join = Callable[["ModelSpec", Path, "TorchBackend", "Quantization", object, Collection[int]], Placement]


def absent_linear(outputs: int, inputs: int) -> LinearWeights:
    """A linear layer that another process holds."""
    return LinearWeights(out_features=outputs, in_features=inputs, dtype=torch.float32, data=None)
