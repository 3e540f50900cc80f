"""What the C++ stack is made of and called with: impossible parts, rows and pages are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dynamoe.kernels.api.types import KVLayers
from dynamoe.kernels.cpu.vector_inputs import cache
from test_operator_arguments import (
    CHANNELS,
    ERRORS,
    HEADS,
    HIDDEN,
    KV_HEADS,
    NAMED,
    PAGE,
    ROWS,
    Arguments,
    experts,
    isa,
    ops,
    paged,
    with_entry,
    wrong,
)


# A layer of attention and one expert, and an exit behind the first of two.
def block(kind: str, tensors: Arguments, integers: Arguments, floats: Arguments | None = None) -> Any:
    return torch.classes.dynamoe_cpu.Block(kind, tensors, integers, floats or {}, {})


def attention_block(**changed: int) -> Any:
    width = (HEADS + 2 * KV_HEADS) * CHANNELS
    tensors = {"qkv": ops.pack_linear(isa, torch.randn(width, HIDDEN))}
    tensors["o"] = ops.pack_linear(isa, torch.randn(HIDDEN, HEADS * CHANNELS))
    integers = {"heads": HEADS, "kv_heads": KV_HEADS, "channels": CHANNELS, "norm_per_head": 0, "window": 0}
    return block("attention", tensors, integers | changed, {"scale": 0.2})


def experts_block(bias: torch.Tensor | None = None, **changed: int) -> Any:
    whole = experts(True)
    tensors = {
        "gate_up": whole["gate_up"],
        "down": whole["down"],
        "router": ops.pack_linear(isa, torch.randn(3, HIDDEN)),
    }
    integers = {"experts": 3, "hidden": HIDDEN, "width": 24, "dense_down": 0, "activation": 0, "top_k": 2, "score": 0}
    flags = {"softmax_after_topk": 0, "renormalize": 0, "float32_logits": 0, "shared": 0}
    groups = {"groups": 1, "top_groups": 1, "top2_sum": 0}
    tensors |= {} if bias is None else {"down_bias": bias}
    floats = {"routing_scale": 1.0, "norm_floor": 0.0, "norm_epsilon": 0.0}
    return block("experts", tensors, integers | flags | groups | changed, floats)


def norm_block() -> Any:
    return block("norm", {"weight": torch.ones(HIDDEN)}, {})


def stack(attention: Any = None, ffn: Any = None, dtype: torch.dtype = torch.float32, number: int = isa) -> Any:
    made = torch.classes.dynamoe_cpu.Stack(number, dtype, HIDDEN, 1e-5, 1.0)
    attention = attention_block() if attention is None else attention
    ffn = experts_block() if ffn is None else ffn
    for _ in range(2):
        made.add_layer([norm_block(), attention, norm_block(), ffn])
    return made


def add_exit(made: Any, rank: int = 4, out_bias: torch.Tensor | None = None) -> Any:
    down, up = ops.pack_linear(isa, torch.randn(4, HIDDEN)), ops.pack_linear(isa, torch.randn(HIDDEN, 4))
    kv = ops.pack_linear(isa, torch.randn(2 * KV_HEADS * CHANNELS, HIDDEN))
    probe = (torch.randn(3, HIDDEN), torch.zeros(3), torch.ones(3), out_bias)
    made.add_exit(1, down, up, rank, *probe, False, False, [kv], [], [[]])
    return made


@pytest.mark.parametrize("with_exits", [False, True])
def test_a_stack_checks_where_rows_live_once_per_call(with_exits: bool) -> None:
    made = stack()
    if with_exits:
        add_exit(made, out_bias=torch.zeros(()))
    layers = KVLayers(cache((7, 9), PAGE, KV_HEADS, CHANNELS, torch.float32) for _ in range(2))
    kept = [[layer.keys_BGPC for layer in layers], [layer.values_BGPC for layer in layers]]
    held = torch.classes.dynamoe_cpu.Cache(*kept, CHANNELS)
    names = ("cos_sin", "positions", "slots", "query_start", "context_len", "block_table")

    def run(**changed: torch.Tensor) -> torch.Tensor:
        where = [(paged() | changed)[name] for name in names]
        x = torch.randn(ROWS, HIDDEN)
        if with_exits:
            counts = torch.zeros(ROWS + 4, dtype=torch.int64)
            return made.run_with_exits(x, held, *where, torch.zeros(1, ROWS), counts, None, None, None)
        return made.run(x, 0, 2, held, *where, None, None, None, None)

    assert run().isfinite().all()
    for name, argument, change, message in NAMED:
        if name in ("attention", "rope_and_write") and argument in names:
            with pytest.raises((ValueError, IndexError), match=message):
                run(**{argument: change(paged()[argument])})
    for argument in names:
        for other in wrong(paged()[argument]):
            try:
                run(**{argument: other})
            except ERRORS:
                continue


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: stack(number=77), "isa 77"),
        (lambda: stack(dtype=torch.int32), "dtype must be"),
        (lambda: stack(attention_block(heads=0)), "heads must"),
        (lambda: stack(attention_block(kv_heads=-2)), "kv_heads must"),
        (lambda: stack(attention_block(channels=2**40)), "channels must"),
        (lambda: stack(attention_block(window=-1)), "window must"),
        (lambda: stack(ffn=experts_block(activation=77)), "activation must"),
        (lambda: stack(ffn=experts_block(score=4)), "score must"),
        (lambda: stack(ffn=experts_block(top_k=4)), "top_k must"),
        (lambda: stack(ffn=experts_block(experts=2**62)), "experts must"),
        (lambda: stack(ffn=experts_block(torch.zeros(64))), "down_bias must hold"),
        (lambda: add_exit(stack(), rank=0), "rank must"),
        (lambda: add_exit(stack()), "the probe does not fit"),
        (
            lambda: add_exit(stack(), out_bias=torch.zeros(())).add_layer([norm_block(), attention_block()]),
            "before exits",
        ),
        (
            lambda: torch.classes.dynamoe_cpu.Cache([torch.zeros(2, 2, 0, 4)] * 2, [torch.zeros(2, 2, 0, 4)] * 2, 4),
            "page",
        ),
    ],
)
def test_a_stack_of_impossible_parts_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        make()


def test_pages_behind_every_window_may_be_gone() -> None:
    windowed = attention_block(window=3)
    layers = KVLayers(cache((7, 9), PAGE, KV_HEADS, CHANNELS, torch.float32) for _ in range(2))
    held = torch.classes.dynamoe_cpu.Cache([v.keys_BGPC for v in layers], [v.values_BGPC for v in layers], CHANNELS)
    names = ("cos_sin", "positions", "slots", "query_start", "context_len", "block_table")
    where = [paged()[name] for name in names]
    gone = with_entry(where[-1], 10**9, where[-1].shape[1])  # positions 0 to 3 of the second sequence; 4 to 8 are seen
    arguments = (torch.randn(ROWS, HIDDEN), 0, 2, held, *where[:-1], gone, None, None, None, None)
    assert stack(windowed).run(*arguments).isfinite().all()
    with pytest.raises(ValueError, match="block_table holds page 1000000000"):
        stack().run(*arguments)
