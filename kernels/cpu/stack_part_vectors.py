"""What the test vectors' small model (:mod:`.stack_vectors`) becomes with parts that only some models have.

Shape suffixes as in ``kernels/api/types.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..api.router_spec import RouterSpec
from ..api.stack import (
    StackAdd,
    StackApart,
    StackAttention,
    StackBlock,
    StackExperts,
    StackGrowth,
    StackNorm,
    StackOutNorm,
    StackRead,
    StackScale,
)
from ..torch.backend import TorchBackend
from .vector_inputs import Numbers

Change = Callable[[TorchBackend, Numbers, Sequence[StackBlock], int], list[StackBlock]]  # a layer and its number


def _weight(numbers: Numbers, size: int) -> torch.Tensor:
    return 1 + numbers.floats(size, scale=0.5)


def _parts(layer: Sequence[StackBlock]) -> tuple[StackAttention, StackExperts]:
    _, attention, _, mixture = layer
    assert isinstance(attention, StackAttention)
    assert isinstance(mixture, StackExperts)
    return attention, mixture


def other_norms(backend: TorchBackend, numbers: Numbers, layer: Sequence[StackBlock], number: int) -> list[StackBlock]:
    """Layer 0: norms around each block in float32, and a scale; 1: norms behind each block, and over all heads; 2: a
    layer norm in front of both blocks, which run side by side, and a norm in the model's dtype behind one."""
    attention, mixture = _parts(layer)
    hidden = mixture.ffn.hidden_size

    def norm(kind: type[StackNorm] = StackNorm, **more: Any) -> StackNorm:
        return kind(weight_D=_weight(numbers, hidden), **more)

    if number == 0:
        wide = [_weight(numbers, attention.head_dim) for _ in range(2)]
        attention = replace(attention, q_norm=wide[0], k_norm=wide[1])
        around = [norm(), attention, norm(StackOutNorm), norm(), mixture, norm(StackOutNorm)]
        return [*around, StackScale(factor=numbers.floats(1))]
    if number == 1:
        sizes = [heads * attention.head_dim for heads in (attention.num_heads, attention.num_kv_heads)]
        q_norm, k_norm = (_weight(numbers, size) for size in sizes)
        attention = replace(attention, q_norm=q_norm, k_norm=k_norm, norm_per_head=False)
        return [StackRead(), attention, norm(StackOutNorm), StackRead(), mixture, norm(StackOutNorm)]
    behind = StackOutNorm(weight_D=_weight(numbers, hidden).to(backend.dtype))
    return [norm(bias_D=numbers.floats(hidden), centred=True), attention, StackAdd(), mixture, behind]


def other_attention(
    backend: TorchBackend, numbers: Numbers, layer: Sequence[StackBlock], number: int
) -> list[StackBlock]:
    """Layer 0: caps, a gate, growing queries, chunks; 1: narrow, scaled values, clipping, norms behind the rotation; 2:
    values that are keys, normed, another rotation."""
    attention, _ = _parts(layer)
    hidden, channels = attention.qkv.in_features, attention.head_dim
    heads, kv_heads = attention.num_heads, attention.num_kv_heads
    if number == 0:
        gate = backend.pack_linear(numbers.floats(heads * channels, hidden, scale=0.3))
        growth = StackGrowth(rate=0.3, period=4, offset=1)
        attention = replace(attention, softcap=2.5, gate=gate, growth=growth, chunk=16)
    elif number == 1:
        values = channels - 12
        width = (heads + kv_heads) * channels + kv_heads * values
        norms = [_weight(numbers, channels).to(backend.dtype) for _ in range(2)]
        attention = replace(
            attention,
            qkv=backend.pack_linear(numbers.floats(width, hidden, scale=0.3)),
            o=backend.pack_linear(numbers.floats(hidden, heads * values, scale=0.2)),
            **{"values": values, "value_scale": 0.7, "clip": 0.9, "norm_after_rotation": True},
            **{"q_norm": norms[0], "k_norm": norms[1], "norm_per_head": True},
        )
    else:
        qkv = backend.pack_linear(numbers.floats((heads + kv_heads) * channels, hidden, scale=0.3))
        value_norm = _weight(numbers, channels)
        attention = replace(attention, qkv=qkv, values_are_keys=True, value_norm=value_norm, table=1)
    return [layer[0], attention, *layer[2:]]


def other_mixtures(
    backend: TorchBackend, numbers: Numbers, layer: Sequence[StackBlock], number: int
) -> list[StackBlock]:
    """Layer 0: experts that are always on, sparsemixer, a scaled shared one; 1: a weight on the input; 2: a router and
    a mixture that read the residual stream."""
    _, mixture = _parts(layer)
    hidden, neurons = mixture.ffn.hidden_size, 48

    def experts(count: int) -> Any:
        gate, up = (numbers.floats(count, neurons, hidden, scale=0.4) for _ in range(2))
        return backend.pack_experts(gate, up, numbers.floats(count, hidden, neurons, scale=0.4), "silu")

    def routed(rule: RouterSpec, always_on: int = 0, **more: Any) -> StackExperts:
        router = backend.pack_linear(numbers.floats(rule.num_experts, hidden, scale=0.5))
        ffn, shared = experts(rule.num_experts + always_on), experts(1)
        return StackExperts(ffn=ffn, router=router, rule=rule, always_on=always_on, shared=shared, **more)

    def norm() -> StackNorm:
        return StackNorm(weight_D=_weight(numbers, hidden))

    if number == 0:
        rule = RouterSpec(num_experts=6, top_k=2, score="sparsemixer", jitter=0.3)
        mixture = routed(rule, always_on=2, shared_scale=0.7)
    elif number == 1:
        mixture = routed(RouterSpec(num_experts=8, top_k=1, score="sigmoid", weight_on_input=True))
    else:
        apart = StackApart(
            router=_weight(numbers, hidden).to(backend.dtype),
            router_eps=1e-3,
            mixture=norm(),
            mixture_out=norm(),
            shared_out=norm(),
        )
        mixture = routed(RouterSpec(num_experts=8, top_k=3, renormalize=True), apart=apart)
    return [*layer[:3], mixture]
