"""Layers as a backend's stack runs them, where it can."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ...kernels.api.stack import Stack, StackBlock, StackExit, StackExperts, StackNorm, StackShape
from ...kernels.torch.backend import TorchBackend
from .blocks import Attention, Block, FeedForward, Norm
from .exits import DecoderExit
from .layer_weights import LayerWeights
from .norms import NORM_KINDS
from .spec import LayerSpec, ModelSpec


def make_stack(
    backend: TorchBackend, spec: ModelSpec, layers: Sequence[LayerWeights], held: range, exits: Iterable[DecoderExit]
) -> Stack | None:
    """Layers and exits as one thing, where the backend has that and can do what the model needs.

    Arguments:
        spec: with the heads that are here.
        layers: of the whole model.
        held: numbers of those that are taken.
    """
    # Stacks have one table of rotations, and norms of one kind.
    if NORM_KINDS[spec.norm].centred or any(rope != spec.rope for rope in spec.ropes):
        return None
    stacked = []
    for number in held:
        blocks = [_stack_block(backend, spec.layers[number], layers[number], b) for b in spec.layers[number].blocks]
        known = [block for block in blocks if block is not None]
        if len(known) < len(blocks):
            return None
        stacked.append(known)
    shape = StackShape(hidden_size=spec.hidden_size, norm_eps=spec.norm_eps, residual_scale=spec.residual_scale)
    exits = tuple(exits)
    if exits and len({layer.keys_alike for layer in spec.layers}) > 1:
        return None  # keys and values of all layers behind an exit are made at once
    stacked_exits = [
        StackExit(after_layers=e.after_layers, down=e.down, up=e.up, probe=e.probe, projections=e.projections)
        for e in exits
    ]
    return backend.make_stack(shape, stacked, stacked_exits)


def _stack_block(backend: TorchBackend, layer: LayerSpec, weights: LayerWeights, block: Block) -> StackBlock | None:
    """A block as stacks run it; None where they do not."""
    if isinstance(block, Norm):
        weight_D: torch.Tensor = weights.norms[block.weight]
        return StackNorm(weight_D=weight_D) if weight_D.dtype == backend.dtype else None
    if isinstance(block, Attention):
        return layer.attention.stack_block(weights.attention)
    moe = layer.moe if layer.moe and not layer.moe.is_dense else None
    if not isinstance(block, FeedForward) or (moe and moe.num_always_on):
        return None
    if moe and (
        moe.latent_size
        or moe.router.weight_on_input
        or moe.router.input_norm_eps is not None
        or moe.shared_scale != 1.0
    ):
        return None
    return StackExperts(
        ffn=weights.ffn,
        router=weights.router if moe else None,
        rule=moe.router if moe else None,
        contribution_scale_E=weights.contribution_scale_E,
        **(weights.routing if moe else {}),
        shared=weights.shared,
        shared_gate=weights.shared_gate,
    )
