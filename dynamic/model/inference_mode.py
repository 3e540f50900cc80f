"""Torch's inference mode around functions that call each other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def in_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """The function under ``torch.inference_mode``, which it enters only where its caller has not: a step would enter it
    four times."""
    entering = torch.inference_mode()(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return (function if torch.is_inference_mode_enabled() else entering)(*args, **kwargs)

    return call
