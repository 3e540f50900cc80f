"""Quantisation while a model is loaded: which weights become what, by name. No calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...kernels.api.formats import (
    FP8,
    FP8_BLOCK,
    FP8_PER_GROUP,
    INT4,
    INT8,
    INT8_PER_GROUP,
    UNQUANTIZED,
    ActivationScheme,
)
from ...kernels.api.quantized_weight import QuantizedWeight
from ...kernels.api.rounding import Rounding

NONE = "none"


@dataclass(frozen=True)
class Method:
    """How the linear layers and experts of a model are quantised.

    Arguments:
        quantize: from a weight, (O, I) or (E, O, I), to its format.
        scheme: how their inputs are rounded.
        group: inputs per scale; None: all of an output's.
        block_out: outputs per scale.
    """

    quantize: Callable[[torch.Tensor], QuantizedWeight]
    scheme: ActivationScheme = UNQUANTIZED
    group: int | None = None
    block_out: int = 1


def _known_methods() -> dict[str, Method]:
    groups = ((64, ""), (32, "-g32"), (128, "-g128"))
    int4 = {
        f"int4{name}{ending}": Method(Rounding(format=INT4, group=group, symmetric=not ending), group=group)
        for group, name in groups
        for ending in ("", "-asym")
    }
    w4a8 = {
        f"w4a8{name}": Method(Rounding(format=INT4, group=group), ActivationScheme("int8", group), group)
        for group, name in groups
    }
    blocks = Rounding(format=FP8, group=FP8_BLOCK, block_out=FP8_BLOCK)
    return {
        "int8": Method(Rounding(format=INT8)),
        "int8-g32": Method(Rounding(format=INT8, group=32), group=32),
        "w8a8": Method(Rounding(format=INT8), INT8_PER_GROUP),
        **int4,
        **w4a8,
        "fp8": Method(Rounding(format=FP8)),
        "fp8-block": Method(blocks, FP8_PER_GROUP, FP8_BLOCK, FP8_BLOCK),
    }


_METHODS = _known_methods()


def methods() -> dict[str, Method]:
    """By name, as ``quantization=`` takes them."""
    return dict(_METHODS)


def register_method(name: str, method: Method) -> None:
    """Make a method known under a name.

    Raises:
        ValueError: for a name that is taken.
    """
    if name in (NONE, *_METHODS):
        raise ValueError(f"there is a quantisation method named {name!r} already")
    _METHODS[name] = method


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What is done to a checkpoint's weights while they are loaded.

    Arguments:
        method: ``none``, or one of :func:`methods`. Routers, norms, gates and exits stay as they are.
        lm_head: whether the LM head and the embedding become int8 as well.

    Raises:
        ValueError: for an unknown method.
    """

    method: str = NONE
    lm_head: bool = True

    def __post_init__(self) -> None:
        if self.method != NONE and self.method not in methods():
            raise ValueError(f"quantization must be {NONE}, {', '.join(methods())}, not {self.method!r}")

    @property
    def layers(self) -> Method | None:
        """What becomes of projections, experts and dense FFNs."""
        return methods().get(self.method)

    @property
    def head(self) -> Method | None:
        """What becomes of the LM head and the embedding."""
        return methods()["int8"] if self.method != NONE and self.lm_head else None

    def __str__(self) -> str:
        """For certificates: equal texts mean equal weights, of one and the same checkpoint."""
        return self.method + (", LM head and embedding int8" if self.head else "")
