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


def attention_block(tensors: Arguments | None = None, floats: Arguments | None = None, **changed: int) -> Any:
    width = (HEADS + 2 * KV_HEADS) * CHANNELS
    whole = {"qkv": ops.pack_linear(isa, torch.randn(width, HIDDEN))}
    whole["o"] = ops.pack_linear(isa, torch.randn(HIDDEN, HEADS * CHANNELS))
    integers = {"heads": HEADS, "kv_heads": KV_HEADS, "channels": CHANNELS, "norm_per_head": 1, "window": 0}
    return block("attention", whole | (tensors or {}), integers | changed, {"scale": 0.2} | (floats or {}))


def latents_block(**changed: int) -> Any:
    sizes = {"heads": HEADS, "latent": 24, "plain": 12, "rotated": 8, "values": 20}
    outputs = {"q": (HEADS * 20, HIDDEN), "kv_a": (32, HIDDEN), "o": (HIDDEN, HEADS * 20)}
    outputs |= {"key_up": (HEADS * 32, 12), "value_up": (HEADS * 32, 24)}  # heads in whole blocks
    tensors = {name: ops.pack_linear(isa, torch.randn(size)) for name, size in outputs.items()}
    tensors["kv_norm"] = torch.ones(24)
    integers = {**sizes, "interleaved": 1, "window": 0}
    return block("latents", tensors, integers | changed, {"scale": 0.2, "eps": 1e-6})


def experts_block(bias: torch.Tensor | None = None, **changed: int) -> Any:
    whole = experts(True)
    tensors = {
        "gate_up": whole["gate_up"],
        "down": whole["down"],
        "router": ops.pack_linear(isa, torch.randn(3, HIDDEN)),
    }
    if changed.pop("norm_of_router", 0):
        tensors["router_norm"] = torch.ones(HIDDEN)
    integers = {"experts": 3, "hidden": HIDDEN, "width": 24, "dense_down": 0, "activation": 0, "top_k": 2, "score": 0}
    flags = {"softmax_after_topk": 0, "renormalize": 0, "float32_logits": 0, "shared": 0}
    groups = {"groups": 1, "top_groups": 1, "top2_sum": 0}
    tensors |= {} if bias is None else {"down_bias": bias}
    floats = {"routing_scale": 1.0, "norm_floor": 0.0, "norm_epsilon": 0.0}
    return block("experts", tensors, integers | flags | groups | changed, floats)


def norm_block(kind: str = "norm", size: int = HIDDEN, biased: bool = False, **integers: int) -> Any:
    tensors = {"weight": torch.ones(size), **({"bias": torch.zeros(size)} if biased else {})}
    return block(kind, tensors, integers)


def layer(*blocks: Any) -> Any:
    """A stack of one layer."""
    made = torch.classes.dynamoe_cpu.Stack(isa, torch.float32, HIDDEN, 1e-5, 1.0)
    made.add_layer(list(blocks))
    return made


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
    held = torch.classes.dynamoe_cpu.Cache(*kept, [CHANNELS] * 2, [[]] * 2)
    names = ("cos_sin", "positions", "slots", "query_start", "context_len", "block_table")

    def run(**changed: torch.Tensor) -> torch.Tensor:
        table, *where = ((paged() | changed)[name] for name in names)
        x = torch.randn(ROWS, HIDDEN)
        if with_exits:
            counts = torch.zeros(ROWS + 4, dtype=torch.int64)
            return made.run_with_exits(x, held, [table], *where, torch.zeros(1, ROWS), counts, None, None, None)
        return made.run(x, 0, 2, held, [table], *where, *[None] * 6)

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
        (lambda: stack(latents_block(heads=0)), "heads must"),
        (lambda: stack(latents_block(rotated=7)), "rotated must be even"),
        (lambda: stack(latents_block(values=40)), "o must be"),
        (lambda: stack(latents_block(latent=2**27)), "heads times channels must"),
        (
            lambda: add_exit(stack(latents_block()), out_bias=torch.zeros(())),
            "begin with a plain norm and plain attention",
        ),
        (lambda: stack(ffn=experts_block(activation=77)), "activation must"),
        (lambda: stack(ffn=experts_block(score=4)), "score must"),
        (lambda: stack(ffn=experts_block(top_k=4)), "top_k must"),
        (lambda: stack(ffn=experts_block(experts=2**62)), "experts must"),
        (lambda: stack(ffn=experts_block(torch.zeros(64))), "down_bias must hold"),
        (lambda: stack(attention_block(table=-1)), "table must"),
        (lambda: stack(attention_block(chunk=-1)), "chunk must"),
        (lambda: stack(attention_block(values=0)), "values must"),
        (lambda: stack(attention_block(values=CHANNELS + 2)), "values must"),
        (lambda: stack(attention_block(values=CHANNELS - 2, values_are_keys=1)), "values must"),
        (lambda: stack(attention_block(values=CHANNELS - 2)), "o must be"),
        (lambda: stack(attention_block(growth_period=-1)), "growth_period must"),
        (lambda: stack(attention_block(growth_period=4, growth_offset=-1)), "growth_offset must"),
        (lambda: stack(attention_block(floats={"softcap": -1.0})), "softcap and clip must"),
        (lambda: stack(attention_block(floats={"clip": float("nan")})), "softcap and clip must"),
        (lambda: stack(attention_block({"value_norm": torch.ones(CHANNELS + 1)})), "value_norm must hold"),
        (lambda: stack(attention_block({"value_norm": torch.ones(CHANNELS).half()})), "value_norm must be"),
        (lambda: stack(attention_block({"value_norm": torch.ones(CHANNELS)}, values=CHANNELS - 2)), "values as wide"),
        (lambda: stack(attention_block({"gate": ops.pack_linear(isa, torch.randn(8, HIDDEN))})), "gate must be"),
        (lambda: stack(attention_block({"q_norm": torch.ones(CHANNELS + 1)})), "q_norm must hold"),
        (lambda: stack(attention_block({"k_norm": torch.ones(CHANNELS).bfloat16()})), "k_norm must be"),
        (lambda: stack(attention_block({"sinks": torch.ones(HEADS + 1)})), "sinks must have"),
        (lambda: stack(attention_block({"other": torch.ones(1)})), "knows no 'other'"),
        (lambda: stack(ffn=experts_block(always_on=3)), "always_on must"),
        (lambda: stack(ffn=experts_block(always_on=-1)), "always_on must"),
        (lambda: stack(ffn=experts_block(weight_on_input=1)), "weight_on_input needs"),
        (lambda: stack(ffn=experts_block(norm_of_router=1)), "router_norm needs"),
        (lambda: layer(norm_block(size=HIDDEN + 1), attention_block()), "a norm must hold"),
        (lambda: layer(norm_block(biased=True), attention_block()), "only a layer norm has a bias"),
        (
            lambda: layer(norm_block(), attention_block(), norm_block("out_norm", centred=1)),
            "norms the residual stream",
        ),
        (lambda: layer(norm_block(), norm_block("out_norm")), "stands behind"),
        (lambda: layer(norm_block(), attention_block(), experts_block()), "must be added"),
        (lambda: layer(norm_block(), latents_block(), experts_block()), "must be added"),
        (lambda: layer(norm_block(), attention_block(), norm_block(), attention_block()), "one attention"),
        (lambda: layer(norm_block(), latents_block(), norm_block(), latents_block()), "one attention"),
        (lambda: layer(norm_block(), attention_block(), norm_block(), latents_block()), "one attention"),
        (lambda: layer(block("add", {}, {}), attention_block()), "begin with a norm or a read"),
        (lambda: layer(block("read", {}, {})), "another block behind"),
        (lambda: layer(norm_block(), block("scale", {"factor": torch.ones(2)}, {})), "factor must hold"),
        (lambda: layer(norm_block(), block("odd", {}, {})), "no block of kind 'odd'"),
        (lambda: add_exit(stack(attention_block(norm_after_rotation=1)), out_bias=torch.zeros(())), "plain attention"),
        (lambda: add_exit(stack(), rank=0), "rank must"),
        (lambda: add_exit(stack()), "the probe does not fit"),
        (
            lambda: add_exit(stack(), out_bias=torch.zeros(())).add_layer([norm_block(), attention_block()]),
            "before exits",
        ),
        (
            lambda: torch.classes.dynamoe_cpu.Cache(
                [torch.zeros(2, 2, 0, 4)] * 2, [torch.zeros(2, 2, 0, 4)] * 2, [4] * 2, [[]] * 2
            ),
            "page",
        ),
    ],
)
def test_a_stack_of_impossible_parts_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        make()


def test_what_latents_leave_may_be_normed() -> None:
    layer(norm_block(), latents_block(), norm_block("out_norm"), norm_block(), experts_block())


def test_pages_behind_every_window_may_be_gone() -> None:
    windowed = attention_block(window=3)
    layers = KVLayers(cache((7, 9), PAGE, KV_HEADS, CHANNELS, torch.float32) for _ in range(2))
    held = torch.classes.dynamoe_cpu.Cache(
        [v.keys_BGPC for v in layers], [v.values_BGPC for v in layers], [CHANNELS] * 2, [[]] * 2
    )
    names = ("cos_sin", "positions", "slots", "query_start", "context_len", "block_table")
    table, *where = (paged()[name] for name in names)
    gone = with_entry(where[-1], 10**9, where[-1].shape[1])  # positions 0 to 3 of the second sequence; 4 to 8 are seen
    arguments = (torch.randn(ROWS, HIDDEN), 0, 2, held, [table], *where[:-1], gone, *[None] * 6)
    assert stack(windowed).run(*arguments).isfinite().all()
    with pytest.raises(ValueError, match="block_table holds page 1000000000"):
        stack().run(*arguments)


def test_groups_of_layers_have_pages_of_their_own_which_are_checked() -> None:
    """The second layer has fewer pages than the first."""
    sizes = ((7, 9), (2, 9))
    kept = [cache(size, PAGE, KV_HEADS, CHANNELS, torch.float32) for size in sizes]
    pairs = [layer.keys_BGPC for layer in kept], [layer.values_BGPC for layer in kept]
    for groups, message in (
        ([], "other pages"),
        ([0, 0], "other pages"),
        ([0], "a group for each"),
        ([0, 5000], "group 5000"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            torch.classes.dynamoe_cpu.Cache(*pairs, [CHANNELS] * 2, [[]] * 2, groups)
    held = torch.classes.dynamoe_cpu.Cache(*pairs, [CHANNELS] * 2, [[]] * 2, [0, 1])
    names = ("cos_sin", "positions", "slots", "query_start", "context_len", "block_table")
    table, *where = (paged()[name] for name in names)
    positions, slots, query_start, context_len, block_table = where
    own_slots, own_table = slots % (len(pairs[0][1]) * PAGE), block_table % len(pairs[0][1])

    def run(slots: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
        rows = positions, slots, query_start, context_len, block_table
        return stack().run(torch.randn(ROWS, HIDDEN), 0, 2, held, [table], *rows, None, None, None, None, None, None)

    both = torch.stack((slots, own_slots)), torch.stack((block_table, own_table))
    assert run(*both).isfinite().all()
    for changed, message in (
        ((slots, block_table), "not in the cache|holds page"),  # all groups would have the first one's
        ((both[0], both[1][:1].contiguous()), "those of 2 groups"),
        ((both[0][:1], both[1]), "those of 2 groups"),
        ((torch.stack((slots, slots + 10**6)), both[1]), "slot 1000"),
        ((both[0], torch.stack((block_table, own_table + 10**6))), "block_table holds page 1000"),
    ):
        with pytest.raises((ValueError, IndexError), match=message):
            run(*changed)


def run_made(made: Any, channels: int, tables: Callable[[torch.Tensor], list[torch.Tensor]]) -> torch.Tensor:
    layers = KVLayers(cache((7, 9), PAGE, KV_HEADS, CHANNELS, torch.float32) for _ in range(2))
    kept = [[layer.keys_BGPC for layer in layers], [layer.values_BGPC for layer in layers]]
    names = ("cos_sin", "positions", "slots", "query_start", "context_len", "block_table")
    table, *where = (paged()[name] for name in names)
    held = torch.classes.dynamoe_cpu.Cache(*kept, [channels] * 2, [[]] * 2)
    return made.run(torch.randn(ROWS, HIDDEN), 0, 2, held, tables(table), *where, *[None] * 6)


@pytest.mark.parametrize(
    ("changed", "channels", "tables", "message"),
    [
        ({"table": 1}, CHANNELS, lambda table: [table], "table 1 is not among 1"),
        ({"chunk": PAGE + 1}, CHANNELS, lambda table: [table], f"pages of {PAGE} tokens do not divide chunks"),
        ({}, CHANNELS - 2, lambda table: [table], "do not hold heads of"),
        ({}, CHANNELS, lambda table: [], "a rotary table"),
        ({}, CHANNELS, lambda table: [table, table[:3]], "rotary tables must be of one length"),
        ({"table": 1}, CHANNELS, lambda table: [table, table[:, 2:]], "does not fit heads of"),
    ],
)
def test_tables_and_caches_that_layers_cannot_use_are_refused(
    changed: Arguments, channels: int, tables: Callable[[torch.Tensor], list[torch.Tensor]], message: str
) -> None:
    made = stack(attention_block(**changed))
    with pytest.raises(ValueError, match=message):
        run_made(made, channels, tables)
    assert run_made(stack(), CHANNELS, lambda table: [table, table[:, 2:].contiguous()]).isfinite().all()


def test_latents_need_a_cache_and_a_table_of_their_sizes() -> None:
    made = stack(latents_block())
    names = ("positions", "slots", "query_start", "context_len", "block_table")
    where, x = [paged()[name] for name in names], torch.randn(ROWS, HIDDEN)

    def run(channels: int, rotated: int) -> torch.Tensor:
        entries = [layer.keys_BGPC for layer in (cache((7, 9), PAGE, 1, channels, torch.float32) for _ in range(2))]
        held = torch.classes.dynamoe_cpu.Cache(entries, entries, [channels] * 2, [[]] * 2)
        return made.run(x, 0, 2, held, [torch.ones(16, rotated)], *where, *[None] * 6)

    assert run(32, 8).isfinite().all()
    with pytest.raises(ValueError, match=r"entries of shape .* do not hold heads of 32 channels"):
        run(40, 8)
    with pytest.raises(ValueError, match="does not fit heads of 8"):
        run(32, 16)
