"""The test vectors of the stack: a small model that has every kind of block and two exits (:mod:`.vectors`).

Shape suffixes as in ``kernels/api/types.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from ..api.router_spec import RouterSpec
from ..api.stack import StackAttention, StackBlock, StackExit, StackExperts, StackNorm, StackShape
from ..api.types import AttentionBatch, ExpertBudget, KVLayers, KVProjection
from ..torch.backend import TorchBackend
from .stack_part_vectors import Change
from .vector_inputs import EPS, Numbers, cache, places, probe, rotations, thresholds

Outputs = Iterator[torch.Tensor]


def stack_vectors(
    backend: TorchBackend,
    numbers: Numbers,
    kept: torch.dtype,
    *,
    sinks: bool = False,
    shared: bool = False,
    rule: RouterSpec | None = None,
    change: Change | None = None,
) -> Outputs:
    """A small model in one call: a prompt in two chunks, decodes; with exits; with budgets.

    Arguments:
        sinks: whether attention has sinks, and routers have biases.
        shared: whether there are shared experts.
        rule: the routing rule of 8 experts; None: plain ones.
        change: what becomes of each layer; there are no exits then.
    """
    hidden, heads, kv_heads, channels, page = 64, 4, 2, 32, 16
    shape = StackShape(hidden_size=hidden, norm_eps=EPS, residual_scale=0.7)
    tables = [rotations(channels, 64)]
    tables += [] if change is None else [numbers.floats(64, channels)]
    passes = ((False, False), (True, False), (True, True)) if change is None else ((False, False), (False, True))
    for with_exits, biased in passes:
        sizes = hidden, heads, kv_heads, channels
        blocks = [_layer(backend, numbers, sizes, number, biased, sinks) for number in range(3)]
        if shared:
            blocks = [_with_shared(backend, numbers, layer, number) for number, layer in enumerate(blocks)]
        if rule is not None:
            blocks = [_with_rule(backend, numbers, layer, rule) for layer in blocks]
        if change is not None:
            blocks = [change(backend, numbers, layer, number) for number, layer in enumerate(blocks)]
        exits = [_exit(backend, numbers, hidden, blocks, after) for after in (1, 2) if change is None]
        stack = backend.make_stack(shape, blocks, exits)
        ends = [(17, 1, 16), (18, 2, 33), (19, 3, 34)]
        kv = KVLayers(cache((64,) * 3, page, kv_heads, channels, kept) for _ in range(3))
        for before, lengths in zip([(0, 0, 0), *ends], ends, strict=False):
            rows = [length - start for start, length in zip(before, lengths, strict=True)]
            batch = _held_pages(lengths, rows, page)
            count, limited = sum(rows), before != (0, 0, 0)
            budget = ExpertBudget(
                keep_TL=numbers.floats(count, 3).abs(),
                cap_TL=(1 + numbers.whole(3, count, 3)).int(),
                skipped_T=torch.zeros(count, dtype=torch.int64),
            )
            x_TD, entropy_T = numbers.floats(count, hidden, scale=2), torch.zeros(count)
            if with_exits:
                # A sequence of several rows continues or exits as a whole.
                owners = torch.repeat_interleave(torch.arange(3), torch.tensor(rows))
                result = stack.run_with_exits(
                    x_TD, kv, tables, batch, thresholds(numbers, 2, 3)[:, owners].contiguous(), budget
                )
                yield from (result.out_TD, result.counts)
            else:
                out = stack.run(range(3), x_TD, kv, tables, batch, entropy_T, budget if limited else None)
                yield from (out, entropy_T)
            yield budget.skipped_T
        for layer in kv:
            yield from (layer.keys_BGPC, layer.values_BGPC)


def _held_pages(lengths: Sequence[int], rows: Sequence[int], page: int) -> AttentionBatch:
    """As :func:`.places`, where every sequence has the pages of 64 tokens from the beginning."""
    whole = places((64,) * len(lengths), (64,) * len(lengths), page)
    taken = torch.cat(
        [
            torch.arange(64 * s + length - n, 64 * s + length)
            for s, (length, n) in enumerate(zip(lengths, rows, strict=True))
        ]
    )
    return replace(
        whole,
        positions_T=whole.positions_T[taken],
        slots_T=whole.slots_T[taken],
        query_start_S1=torch.tensor([0, *np.cumsum(rows)], dtype=torch.int32),
        context_len_S=torch.tensor(list(lengths), dtype=torch.int32),
        max_query_len=max(rows),
        max_context_len=max(lengths),
    )


def _layer(
    backend: TorchBackend, numbers: Numbers, sizes: tuple[int, int, int, int], number: int, biased: bool, sinks: bool
) -> list[StackBlock]:
    """Layer 0: a mixture, norms of each head; 1: a window, the other routing rule; 2: a dense FFN."""
    hidden, heads, kv_heads, channels = sizes
    norms = [(1 + numbers.floats(n, scale=0.5)).to(backend.dtype) for n in (hidden, hidden, channels, channels)]
    width = (heads + 2 * kv_heads) * channels
    qkv = backend.pack_linear(numbers.floats(width, hidden, scale=0.3), numbers.floats(width) if biased else None)
    attention = StackAttention(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=channels,
        qkv=qkv,
        q_norm=norms[2] if number == 0 else None,
        k_norm=norms[3] if number == 0 else None,
        norm_per_head=True,
        o=backend.pack_linear(numbers.floats(hidden, heads * channels, scale=0.2)),
        scale=channels**-0.5,
        window=5 if number == 1 else None,
        sinks_H=numbers.floats(heads, scale=4) if sinks else None,
    )
    count, neurons = (1, 96) if number == 2 else (8, 48)
    gate, up = (numbers.floats(count, neurons, hidden, scale=0.4) for _ in range(2))
    ffn = backend.pack_experts(gate, up, numbers.floats(count, hidden, neurons, scale=0.4), "silu")
    router = backend.pack_linear(numbers.floats(count, hidden, scale=0.5), numbers.floats(count) if sinks else None)
    rule = RouterSpec(num_experts=8, top_k=3, renormalize=number == 0, softmax_after_topk=number == 1)
    return [
        StackNorm(weight_D=norms[0]),
        attention,
        StackNorm(weight_D=norms[1]),
        StackExperts(
            ffn=ffn,
            router=None if number == 2 else router,
            rule=None if number == 2 else rule,
            contribution_scale_E=numbers.floats(count).abs() if number == 0 else None,
        ),
    ]


def _with_shared(backend: TorchBackend, numbers: Numbers, layer: Sequence[StackBlock], number: int) -> list[StackBlock]:
    """The layer with a shared expert; in layer 1 it has a gate."""
    *others, mixture = layer
    assert isinstance(mixture, StackExperts)
    hidden, neurons = mixture.ffn.hidden_size, 70
    gate, up = (numbers.floats(1, neurons, hidden, scale=0.4) for _ in range(2))
    shared = backend.pack_experts(gate, up, numbers.floats(1, hidden, neurons, scale=0.4), "silu")
    logit = backend.pack_linear(numbers.floats(1, hidden, scale=0.5)) if number == 1 else None
    return [*others, replace(mixture, shared=shared, shared_gate=logit)]


def _with_rule(
    backend: TorchBackend, numbers: Numbers, layer: Sequence[StackBlock], rule: RouterSpec
) -> list[StackBlock]:
    *others, mixture = layer
    assert isinstance(mixture, StackExperts)
    if mixture.rule is None:
        return list(layer)
    dtype = torch.float32 if rule.float32_logits else None
    router = backend.pack_linear(numbers.floats(rule.num_experts, mixture.ffn.hidden_size, scale=0.5), dtype=dtype)
    given = {
        "selection_bias_E": numbers.floats(rule.num_experts, scale=0.3) if rule.selection_bias else None,
        "expert_scale_E": numbers.floats(rule.num_experts) if rule.expert_scale else None,
    }
    return [*others, replace(mixture, router=router, rule=rule, **given)]


def _exit(
    backend: TorchBackend, numbers: Numbers, hidden: int, blocks: Sequence[Sequence[StackBlock]], after: int
) -> StackExit:
    projections = []
    for norm, attention, *_ in blocks[after:]:
        assert isinstance(norm, StackNorm)
        assert isinstance(attention, StackAttention)
        kv = backend.linear_tail(attention.qkv, attention.num_heads * attention.head_dim)
        projections.append(KVProjection(norm_D=norm.weight_D, kv=kv, k_norm=attention.k_norm))
    return StackExit(
        after_layers=after,
        down=backend.pack_linear(numbers.floats(4, hidden, scale=0.3)),
        up=backend.pack_linear(numbers.floats(hidden, 4, scale=0.3)),
        probe=probe(numbers, hidden, 4, previous=after == 2, entropy=after == 1),
        projections=projections,
    )
