"""Every launch that a model's layers can need, planned on tensors without storage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from .exits import ExitCall
from .experts import ExpertsCall
from .launch import Launch
from .norm import NormCall, RopeCall
from .paged_attention import AttentionCall
from .quantized_layers import LinearCall, QuantExpertsCall
from .router import RouteCall
from .shapes import Steps, WarmUpShape
from .variants import Call, NoKernelError, Planner

OPERATIONS = (NormCall, RouteCall, ExpertsCall, ExitCall, RopeCall, AttentionCall, LinearCall, QuantExpertsCall)


def planned_launches(shapes: Sequence[WarmUpShape], dtype: torch.dtype, planner: Planner) -> list[Launch]:
    """The distinct launches of layers of these shapes, over all powers of two of tokens, sequences and contexts."""
    found: dict[tuple, Launch] = {}
    for shape in shapes:
        for launch in layer_launches(shape, Steps.up_to(shape), dtype, planner):
            found.setdefault(launch.variant(), launch)
    return list(found.values())


def layer_launches(
    shape: WarmUpShape,
    steps: Steps,
    dtype: torch.dtype,
    planner: Planner,
    operations: Sequence[type[Call]] = OPERATIONS,
) -> Iterator[Launch]:
    """What a layer launches in these steps. Calls that no variant runs launch nothing."""
    for operation in operations:
        for call in operation.of_layer(shape, steps, dtype, planner):
            with contextlib.suppress(NoKernelError):
                yield from planner.plan(call)[1]
