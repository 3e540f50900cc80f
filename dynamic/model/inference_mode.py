"""A cheap way into torch's inference mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def in_inference_mode(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function under ``torch.inference_mode``, which it enters only where its caller has not: a step would enter it
    four times."""
    entering = torch.inference_mode()(function)

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        return (function if torch.is_inference_mode_enabled() else entering)(*args, **kwargs)

    return call
