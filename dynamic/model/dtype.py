"""Which device and which dtype a model runs in."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from ..checkpoint.weights import CheckpointError, shown

logger = logging.getLogger(__name__)

DTYPE_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """``auto`` (a GPU when there is one), or a torch device.

    Raises:
        ValueError: for a device that does not exist or is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but torch sees no GPU")
    return device


def choose_dtype(
    name: str, config: Mapping[str, Any], stored: torch.dtype, device: torch.device, *, coded: bool
) -> torch.dtype:
    """What a model computes in.

    ``auto`` is the checkpoint's own, but no CPU kernel computes in float16. There a float16 checkpoint becomes float32,
    which holds all of its numbers exactly; with quantised weights bfloat16, because codes and scales stay as they are
    and only the rest, which is small, is rounded.

    Arguments:
        name: ``auto``, or one of ``DTYPE_NAMES``.
        config: ``config.json``.
        stored: what the embedding is stored in.
        device: where it runs.
        coded: whether the layers' weights are quantised.

    Raises:
        ValueError: for an unknown name.
        CheckpointError: when ``config.json`` names a dtype that is none.
    """
    if name not in ("auto", *DTYPE_NAMES):
        raise ValueError(f"dtype must be auto, {', '.join(DTYPE_NAMES)}, not {name!r}")
    named = config.get("dtype") or config.get("torch_dtype")
    if isinstance(named, str):
        named = named.removeprefix("torch.")
    if named is not None and (not isinstance(named, str) or not isinstance(getattr(torch, named, None), torch.dtype)):
        raise CheckpointError(f"config.json: dtype must be the name of a dtype, not {shown(named)!r}")
    if name != "auto":
        if name == "float16" and device.type == "cpu":
            text = "dtype=float16 has no CPU kernels and runs on torch's own operations, many times slower"
            warnings.warn(f"{text}: dtype=auto takes float32 or bfloat16", RuntimeWarning, stacklevel=3)
        return DTYPE_NAMES[name]
    own = DTYPE_NAMES.get(named or "", torch.float32 if stored == torch.float64 else stored)
    if own != torch.float16 or device.type != "cpu":
        return own
    chosen, why, other = torch.float32, "holds the same numbers", "bfloat16 halves the memory and rounds the weights"
    if coded:
        chosen, why, other = torch.bfloat16, "leaves codes and scales as they are", "float32 rounds nothing"
    logger.warning(
        "the checkpoint is float16, which no CPU kernel computes in: it runs in %s, which %s; dtype=%s",
        str(chosen).removeprefix("torch."),
        why,
        other,
    )
    return chosen


@cache
def rounded(value: float, dtype: torch.dtype) -> float:
    """The number of a dtype that is next to a value."""
    return float(torch.tensor(value, dtype=dtype))
