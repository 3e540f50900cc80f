"""Layers as a backend's stack runs them, where it can."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ...kernels.api.stack import (
    NotStacked,
    Stack,
    StackAdd,
    StackApart,
    StackAttention,
    StackBlock,
    StackExit,
    StackExperts,
    StackLatentAttention,
    StackNorm,
    StackOutNorm,
    StackRead,
    StackScale,
    StackShape,
)
from ...kernels.torch.backend import TorchBackend
from .blocks import Add, Attention, Block, FeedForwards, Norm, OutNorm, Read, Scale
from .exits import DecoderExit
from .layer_weights import LayerWeights
from .norms import NORM_KINDS
from .spec import ModelSpec

log = logging.getLogger(__name__)


def make_stack(
    backend: TorchBackend, spec: ModelSpec, layers: Sequence[LayerWeights], held: range, exits: Sequence[DecoderExit]
) -> Stack | None:
    """:func:`build_stack`, without the exits where it is they that cannot be; None where layers run operation by
    operation. The log says either once for a model."""
    if type(backend).make_stack is TorchBackend.make_stack:  # each operation is a call of its own
        return None
    for taken, what in ((exits, "exits"), ((), "layers")) if exits else (((), "layers"),):
        try:
            return build_stack(backend, spec, layers, held, taken)
        except NotStacked as reason:
            log.info("%s run operation by operation: %s", what, reason)
    return None


def build_stack(
    backend: TorchBackend, spec: ModelSpec, layers: Sequence[LayerWeights], held: range, exits: Iterable[DecoderExit]
) -> Stack:
    """Layers and exits as one thing.

    Arguments:
        spec: with the heads that are here.
        layers: of the whole model.
        held: numbers of those that are taken.

    Raises:
        NotStacked: the backend has no such thing, or cannot do what the model needs; the message says what.
    """
    stacked = [
        [_stack_block(spec, number, layers[number], block) for block in spec.layers[number].blocks] for number in held
    ]
    shape = StackShape(hidden_size=spec.hidden_size, norm_eps=spec.norm_eps, residual_scale=spec.residual_scale)
    stacked_exits = [
        StackExit(after_layers=e.after_layers, down=e.down, up=e.up, probe=e.probe, projections=e.projections)
        for e in exits
    ]
    return backend.make_stack(shape, stacked, stacked_exits)


def _stack_block(spec: ModelSpec, number: int, weights: LayerWeights, block: Block) -> StackBlock:
    """A block as stacks run it."""
    if isinstance(block, Norm):
        return _norm(spec, weights, block.weight)
    if isinstance(block, OutNorm):
        return StackOutNorm(**vars(_norm(spec, weights, block.weight)))
    if isinstance(block, Read):
        return StackRead()
    if isinstance(block, Add):
        return StackAdd()
    if isinstance(block, Scale):
        return StackScale(factor=weights.norms[block.weight])
    layer = spec.layers[number]
    if isinstance(block, Attention):
        stacked = layer.attention.stack_block(weights.attention)
        if not isinstance(stacked, StackAttention | StackLatentAttention):
            return stacked
        return replace(stacked, table=spec.distinct_ropes.index(spec.ropes[number]))
    moe = layer.moe if layer.moe and not layer.moe.is_dense else None
    if moe is None:
        return StackExperts(ffn=weights.ffn, router=None, rule=None, shared=weights.shared)
    if moe.latent_size:
        raise NotStacked("experts that read and give latents")
    rule = moe.router
    apart = None
    if isinstance(block, FeedForwards):
        assert rule.input_norm_eps is not None
        assert weights.router_norm_D is not None
        apart = StackApart(
            router=weights.router_norm_D,
            router_eps=rule.input_norm_eps,
            mixture=_norm(spec, weights, block.mixture),
            mixture_out=_norm(spec, weights, block.mixture_out),
            shared_out=_norm(spec, weights, block.shared_out),
        )
    elif rule.input_norm_eps is not None:
        raise NotStacked("a router whose input has a norm of its own")
    return StackExperts(
        ffn=weights.ffn,
        router=weights.router,
        rule=rule,
        contribution_scale_E=weights.contribution_scale_E,
        **weights.routing,
        always_on=moe.num_always_on,
        shared=weights.shared,
        shared_gate=weights.shared_gate,
        shared_scale=moe.shared_scale,
        apart=apart,
    )


def _norm(spec: ModelSpec, weights: LayerWeights, name: str) -> StackNorm:
    return StackNorm(
        weight_D=weights.norms[name],
        bias_D=weights.norms.get(f"{name}_bias"),
        centred=NORM_KINDS[spec.norm].centred,
    )
