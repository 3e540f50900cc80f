"""Quantised experts one after the other, from single ones or from stacks of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch

from .formats import QuantizedWeight


def stack_experts(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights (O, I) or (E, O, I) as the experts of one layer, (E, O, I).

    Raises:
        ValueError: for weights of different formats, groups or shapes.
    """
    kinds = {_kind(weight) for weight in weights}
    if len(kinds) > 1:
        raise ValueError(f"only weights of one format and shape can be stacked, not {sorted(map(str, kinds))}")
    parts: dict[str, list[torch.Tensor]] = {}
    for weight in weights:
        for name, tensor in _tensors(weight).items():
            parts.setdefault(name, []).append(tensor if weight.data.dim() == 3 else tensor[None])
    return replace(weights[0], **{name: torch.cat(tensors) for name, tensors in parts.items()})  # type: ignore[arg-type]


def _tensors(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    values = {f.name: getattr(weight, f.name) for f in fields(weight)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def _kind(weight: QuantizedWeight) -> tuple[object, ...]:
    tensors = _tensors(weight)
    settings = tuple(getattr(weight, f.name) for f in fields(weight) if f.name not in tensors)
    return (type(weight).__name__, weight.out_features, weight.in_features, *sorted(tensors), *settings)
