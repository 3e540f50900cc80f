"""What the C++ stack knows: layers that it cannot run are refused with the reason, others named by what they need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from ..api.router_spec import RouterSpec
from ..api.stack import (
    NotStacked,
    StackAdd,
    StackAttention,
    StackBlock,
    StackExit,
    StackExperts,
    StackLatentAttention,
    StackMixer,
    StackNorm,
    StackOutNorm,
    StackRead,
    StackScale,
)
from ..api.stack_states import StackState
from ..api.uncommon import STACK_ATTENTION, STACK_MIXTURES, STACK_NORMS, STACK_STATES
from ..torch.split import SplitExperts, SplitLinear
from .placed import CpuPlacedExperts
from .vectors import SINKS

Kind = TypeVar("Kind")


def check_stack(layers: Sequence[Sequence[StackBlock]], exits: Sequence[StackExit], dtype: torch.dtype) -> None:
    """Raise NotStacked where something in the layers and exits runs operation by operation only.

    Arguments:
        dtype: of the model.
    """
    if any(sum(isinstance(block, StackMixer) for block in layer) != 1 for layer in layers):
        raise NotStacked("layers without attention")
    with_states = list(_of_kind(layers, StackState))
    if with_states and exits:
        raise NotStacked("exits in a model with recurrent states")
    mixtures = list(_of_kind(layers, StackExperts))
    for rule in (block.rule for block in mixtures if block.rule is not None):
        if not (rule.is_regular or _is_sparsemixer(rule)):
            raise NotStacked(f"the routing rule {rule.score}")
        if rule.weight_on_input and rule.top_k > 1:
            raise NotStacked("weights on the input of several experts")
    packed = [linear for b in _of_kind(layers, StackAttention) for linear in (b.qkv, b.o, b.gate)]
    packed += [linear for block in _of_kind(layers, StackLatentAttention) for linear in block.linears]
    packed += [linear for block in with_states for linear in block.linears]
    packed += [part for block in mixtures for part in (block.ffn, block.shared)]
    if any(isinstance(block.ffn.data, CpuPlacedExperts) for block in mixtures):
        raise NotStacked("experts that are read from the disk")
    split = [part.data for part in packed if part is not None and isinstance(part.data, SplitLinear | SplitExperts)]
    if any(isinstance(data, SplitExperts) and not data.gate for data in split):
        raise NotStacked("experts without gates")
    if split:
        raise NotStacked("layers whose parts are in different formats")
    for exit in exits:
        # Keys and values that begin inside a block of quantised weights come with outputs that are not theirs.
        if any(projection.kv.data.skip for projection in exit.projections):
            raise NotStacked("exits whose keys and values begin inside a block of quantised weights")
        if not all(_has_plain_keys(layer, dtype) for layer in layers[exit.after_layers :]):
            raise NotStacked("exits in front of layers with other parts than a norm and plain attention")


def _of_kind(layers: Iterable[Sequence[StackBlock]], kind: type[Kind]) -> Iterator[Kind]:
    return (block for layer in layers for block in layer if isinstance(block, kind))


def _is_sparsemixer(rule: RouterSpec) -> bool:
    """That rule, which torch computes, with nothing beside it."""
    parts = {"num_experts": rule.num_experts, "top_k": rule.top_k, "float32_logits": rule.float32_logits}
    return rule == RouterSpec(score="sparsemixer", jitter=rule.jitter, **parts)


def _has_plain_keys(layer: Sequence[StackBlock], dtype: torch.dtype) -> bool:
    """Whether keys and values are made of the residual stream as KV propagation makes them."""
    norm, attention, *_ = layer
    plain_norm = isinstance(norm, StackNorm) and norm.is_plain(dtype)
    return plain_norm and isinstance(attention, StackAttention) and attention.has_plain_keys(dtype)


def stack_parts(layers: Sequence[Sequence[StackBlock]], dtype: torch.dtype) -> set[str]:
    """What layers compute that others do not, by the names of test vectors (:mod:`.vectors`)."""
    parts: set[str] = set()
    for block in _of_kind(layers, object):
        if isinstance(block, StackRead | StackAdd | StackScale | StackOutNorm):
            parts.add(STACK_NORMS)
        elif isinstance(block, StackNorm):
            parts |= set() if block.is_plain(dtype) else {STACK_NORMS}
        elif isinstance(block, StackAttention):
            others = block.softcap is not None or block.gate is not None or block.growth is not None
            parts |= {STACK_ATTENTION} if others or block.chunk or not block.has_plain_keys(dtype) else set()
            parts |= {SINKS} if block.sinks_H is not None else set()
            parts |= {STACK_STATES} if block.gated_queries else set()
        elif isinstance(block, StackState):
            parts.add(STACK_STATES)
        elif isinstance(block, StackExperts):
            rule = block.rule
            uncommon_rule = rule is not None and (rule.weight_on_input or _is_sparsemixer(rule))
            others = block.always_on or uncommon_rule or block.shared_scale != 1.0 or block.apart is not None
            parts |= {STACK_MIXTURES} if others else set()
            parts |= {SINKS} if block.router is not None and block.router.data.bias is not None else set()
    return parts
