"""Several quantised weights as one: outputs one after the other, or experts side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .quantized_weight import QuantizedWeight


def concatenate(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Layers with the same inputs as one, their outputs one after the other: query, key and value projections.

    Raises:
        ValueError: for weights of different formats, groups or inputs.
    """
    if any(w.out_features % w.block_out for w in weights[:-1]) or len({w.block_out for w in weights}) > 1:
        weights = [w.per_output() for w in weights]
    _check_alike([(*kind(w), w.num_experts) for w in weights], "joined")
    parts = {name: torch.cat([w.tensors()[name] for w in weights], -2) for name in weights[0].tensors()}
    return replace(weights[0], **parts)  # type: ignore[arg-type]


def stack_experts(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights (O, I) or (E, O, I) as the experts of one layer, (E, O, I).

    Raises:
        ValueError: for weights of different formats, groups or shapes.
    """
    _check_alike([(*kind(w), w.out_features) for w in weights], "stacked")
    parts: dict[str, list[torch.Tensor]] = {}
    for weight in weights:
        for name, tensor in weight.tensors().items():
            parts.setdefault(name, []).append(tensor if weight.num_experts is not None else tensor[None])
    return replace(weights[0], **{name: torch.cat(tensors) for name, tensors in parts.items()})  # type: ignore[arg-type]


def kind(weight: QuantizedWeight) -> tuple[object, ...]:
    """What weights must have in common to become one."""
    return (weight.format, weight.in_features, weight.group, weight.block_out, *sorted(weight.tensors()))


def _check_alike(kinds: list[tuple[object, ...]], what: str) -> None:
    if len(set(kinds)) > 1:
        raise ValueError(f"only weights of one format can be {what}, not {sorted(set(map(str, kinds)))}")
