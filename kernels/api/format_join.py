"""Several quantised weights as one: outputs one after the other, or experts side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TypeVar

import torch

from .formats import FP8_BLOCK, Fp8Weight, QuantizedWeight

Weight = TypeVar("Weight", bound=QuantizedWeight)


def concatenate(weights: Sequence[Weight]) -> Weight:
    """Layers with the same inputs as one, their outputs one after the other: query, key and value projections.

    Raises:
        ValueError: for weights of different formats, groups or inputs.
    """
    blocks = [w for w in weights if isinstance(w, Fp8Weight)]
    if any(w.out_features % FP8_BLOCK for w in blocks[:-1]) or len({w.block_out for w in blocks}) > 1:
        weights = [w.per_output() if isinstance(w, Fp8Weight) else w for w in weights]  # type: ignore[assignment]
    _check_alike([(*_format(w), w.num_experts) for w in weights], "joined")
    dim = weights[0].data.dim() - 2
    parts = {name: torch.cat([w.tensors()[name] for w in weights], dim) for name in weights[0].tensors()}
    return replace(weights[0], **parts)  # type: ignore[arg-type]


def stack_experts(weights: Sequence[Weight]) -> Weight:
    """Weights (O, I) or (E, O, I) as the experts of one layer, (E, O, I).

    Raises:
        ValueError: for weights of different formats, groups or shapes.
    """
    _check_alike([(*_format(w), w.out_features) for w in weights], "stacked")
    parts: dict[str, list[torch.Tensor]] = {}
    for weight in weights:
        for name, tensor in weight.tensors().items():
            parts.setdefault(name, []).append(tensor if weight.num_experts is not None else tensor[None])
    return replace(weights[0], **{name: torch.cat(tensors) for name, tensors in parts.items()})  # type: ignore[arg-type]


def _format(weight: QuantizedWeight) -> tuple[object, ...]:
    """What weights must have in common to become one."""
    tensors = weight.tensors()
    settings = tuple(getattr(weight, f.name) for f in fields(weight) if f.name not in tensors)
    return (type(weight).__name__, weight.in_features, *sorted(tensors), *settings)


def _check_alike(kinds: list[tuple[object, ...]], what: str) -> None:
    if len(set(kinds)) > 1:
        raise ValueError(f"only weights of one format can be {what}, not {sorted(set(map(str, kinds)))}")
