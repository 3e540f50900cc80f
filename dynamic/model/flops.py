"""Floating-point operations out of the engine's counters.

The part of attention that grows with the context is left out.
"""

from __future__ import annotations

from .counters import Compute
from .spec import ModelSpec


def layer_flops(spec: ModelSpec, compute: Compute) -> int:
    """Of the layers that were launched: attention and experts, without the experts that a budget left out."""
    by_layer = [spec.layer_flops(layer) for layer in spec.layers]
    flops, first = 0, 0
    for layers, launched in zip(compute.segment_layers, compute.segment_rows, strict=True):
        flops += launched * sum(by_layer[first : first + layers])
        first += layers
    expert = max((spec.expert_flops(layer.moe) for layer in spec.layers if layer.moe), default=0)
    return flops - compute.skipped_experts * expert


def full_layer_flops(spec: ModelSpec, rows: int) -> int:
    """Of all layers with all experts for so many rows."""
    return rows * sum(spec.layer_flops(layer) for layer in spec.layers)


def head_flops(spec: ModelSpec, tokens: int) -> int:
    """Of the LM head for so many tokens."""
    return 2 * spec.hidden_size * spec.vocab_size * tokens


def projection_flops(spec: ModelSpec, compute: Compute) -> int:
    """Of what was propagated to skipped layers, by the rows that did not get to them."""
    skipped = [max(compute.segment_rows) - launched for launched in compute.segment_rows]
    rows = [count for count, layers in zip(skipped, compute.segment_layers, strict=True) for _ in range(layers)]
    layers = zip(rows, spec.layers, strict=True)
    return sum(count * layer.attention.propagation_flops(spec.hidden_size) for count, layer in layers)
