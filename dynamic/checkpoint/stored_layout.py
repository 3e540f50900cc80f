"""The interface of a layout of quantised weights in a checkpoint, and checks that layouts share.

A layout names the tensor that marks a quantised weight, and reads one weight or a part of it. Names are module
names, such as ``model.layers.0.self_attn.q_proj``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from ...kernels.api.formats import ActivationScheme
from ...kernels.api.quantized_weight import QuantizedWeight
from .stored_weight import StoredWeight
from .weights import CheckpointError

FLOATS = ("F32", "F16", "BF16")


class StoredLayout(Protocol):
    """How a checkpoint's quantised weights are stored. Equal checkpoints have equal ``repr``.

    Attributes:
        markers: the last part of tensor names by which a module is known to be quantised.
        parts: the last part of the names of all tensors that belong to such modules.
    """

    markers: ClassVar[tuple[str, ...]]
    parts: ClassVar[tuple[str, ...]]

    def scheme(self, weight: StoredWeight) -> ActivationScheme:
        """How the inputs of a weight are rounded."""
        ...

    def shape(self, weight: StoredWeight) -> tuple[int, ...]:
        """(O, I), from the files' headers; raises CheckpointError where the tensors do not fit together."""
        ...

    def input_step(self, weight: StoredWeight) -> int:
        """Parts may begin at multiples of so many inputs."""
        ...

    def load(self, weight: StoredWeight) -> QuantizedWeight:
        """What is wanted of a weight (:attr:`StoredWeight.kept`); raises ValueError where it is inconsistent."""
        ...


def setting_error(key: str, value: Any, expected: str) -> CheckpointError:
    """For a setting of ``quantization_config`` that is not understood."""
    return CheckpointError(f"config.json: quantisation: {key} must be {expected}, not {str(value)[:200]!r}")


def want(settings: Mapping[str, Any], key: str, wanted: Any, alias: str = "") -> None:
    """Raises CheckpointError unless a setting has the only value that is understood."""
    value = settings.get(key, settings.get(alias))
    if value != wanted:
        raise setting_error(key, value, f"{wanted}")


def group_size(settings: Mapping[str, Any], alias: str = "group_size") -> int:
    """Inputs that share a scale; -1: all of them.

    Raises:
        CheckpointError: for anything else.
    """
    value = settings.get("group_size", settings.get(alias))
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise setting_error("group_size", value, "a positive whole number, or -1 for all inputs")
    return value


def two_sizes(weight: StoredWeight, part: str) -> tuple[int, int]:
    """The shape of a tensor of 32-bit words.

    Raises:
        CheckpointError: when it has not two dimensions.
    """
    shape = weight.info(part, "I32").shape
    if len(shape) != 2:
        raise weight.error(f"{part} has shape {shape} and not two dimensions")
    return shape[0], shape[1]
