"""Numbers from Python become addresses in the C++ operators only after they were checked: wrong ones raise, by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.kernels.cpu.backend import CpuBackend
from dynamoe.kernels.cpu.shared_memory import make_shared_file
from dynamoe.kernels.cpu.vector_inputs import cache, places, rotations

ERRORS = (ValueError, IndexError, RuntimeError, TypeError, NotImplementedError)
ROWS, HIDDEN, HEADS, KV_HEADS, CHANNELS, PAGE = 5, 48, 4, 2, 32, 4
INT8_LAYOUT = [0, HIDDEN, HIDDEN, HIDDEN, 0, 0, 0]
backend = CpuBackend("cpu", torch.float32)
ops, isa = torch.ops.dynamoe_cpu, backend.isa_number
Arguments = dict[str, Any]


def paged() -> Arguments:
    """Two sequences of 7 and 9 tokens, of which the last 2 and 3 are rows."""
    batch, layer = places((7, 9), (2, 3), PAGE), cache((7, 9), PAGE, KV_HEADS, CHANNELS, torch.float32)
    return {
        "keys": layer.keys_BGPC,
        "values": layer.values_BGPC,
        "cos_sin": rotations(CHANNELS, 16),
        "positions": batch.positions_T,
        "slots": batch.slots_T,
        "query_start": batch.query_start_S1,
        "context_len": batch.context_len_S,
        "block_table": batch.block_table_SM,
    }


def taken(*names: str) -> Arguments:
    whole = paged()
    return {name: whole[name] for name in names}


def experts(routed: bool) -> Arguments:
    parts = torch.randn(3, 24, HIDDEN), torch.randn(3, 24, HIDDEN), torch.randn(3, HIDDEN, 24)
    data = backend.pack_experts(*parts, "silu", *(torch.randn(3, n) for n in (24, 24, HIDDEN))).data
    down_bias = data.down_bias if routed else data.down_bias_sum
    found = {"isa": isa, "x": torch.randn(ROWS, HIDDEN), "gate_up": data.gate_up, "down": data.down}
    found |= {"gate_up_bias": data.gate_up_bias, "down_bias": down_bias, "shape": list(data.shape)}
    return found | (routing() if routed else {})


def routing() -> Arguments:
    return {
        "ids": torch.arange(2 * ROWS).view(ROWS, 2).remainder(3).int(),
        "weights": torch.rand(ROWS, 2),
        "counts": torch.full((ROWS,), 2, dtype=torch.int32),
    }


def packed_codes(outputs: int, inputs: int) -> torch.Tensor:
    codes = torch.zeros(outputs, inputs, dtype=torch.uint8)
    extra = [None] * (len(ops.pack_quant.default._schema.arguments) - 5)  # of formats with scales on two levels
    return ops.pack_quant(isa, [codes], torch.ones(outputs, 1), None, *extra, [0, outputs, inputs, inputs, 0, 0, 0])


def quant_experts() -> Arguments:
    gate_up, down = packed_codes(3 * 64, HIDDEN), packed_codes(3 * 64, 24)
    places = torch.stack([torch.arange(3) * (packed.nbytes // 3) for packed in (gate_up, down)])
    shape = {"shape": [3, HIDDEN, 24, 0]}
    return {
        "isa": isa,
        "x": torch.randn(ROWS, HIDDEN),
        "gate_up": gate_up,
        "gate_up_layout": [0, 3 * 64, HIDDEN, HIDDEN, 0, 0, 0],
        "down": down,
        "down_layout": [0, 3 * 64, 24, 24, 0, 0, 0],
        "gate_up_bias": torch.zeros(3 * 64),
        "down_bias": torch.zeros(3 * 64),
        **shape,
        **routing(),
        "places": places,
    }


def project_kv() -> Arguments:
    weights = ops.pack_linear(isa, torch.randn(2 * KV_HEADS * CHANNELS, HIDDEN))
    return {
        "isa": isa,
        "x": torch.randn(ROWS, HIDDEN),
        "norms": [torch.ones(HIDDEN)],
        "weights": [weights],
        "biases": [torch.zeros(2 * KV_HEADS * CHANNELS)],
        "k_norms": [torch.ones(CHANNELS)],
        "keys": [paged()["keys"]],
        "values": [paged()["values"]],
        **taken("cos_sin", "positions", "slots"),
        "eps": 1e-5,
        "clip": 0.0,
    }


def states() -> Arguments:
    """Two sequences in slots 3 and 0, of which the first begins and the second is kept in slot 1."""
    return {
        "slots": torch.tensor([3, 0]),
        "kept": torch.tensor([-1, 1]),
        "query_start": torch.tensor([0, 2, ROWS], dtype=torch.int32),
        "context_len": torch.tensor([2, 9], dtype=torch.int32),
    }


WEIGHT = torch.randn(HIDDEN, HIDDEN)
VALID: dict[str, Callable[[], Arguments]] = {
    "pack_linear": lambda: {"isa": isa, "weight": WEIGHT},
    "linear": lambda: {
        "isa": isa,
        "x": torch.randn(ROWS, HIDDEN),
        "weights": ops.pack_linear(isa, WEIGHT),
        "bias": torch.zeros(64),
        "outputs": HIDDEN,
        "float_out": False,
    },
    "rms_norm": lambda: {"isa": isa, "x": torch.randn(ROWS, HIDDEN), "weight": torch.ones(HIDDEN), "eps": 1e-5},
    "add_rms_norm": lambda: {
        "isa": isa,
        "x": torch.randn(ROWS, HIDDEN),
        "residual": torch.randn(ROWS, HIDDEN),
        "weight": torch.ones(HIDDEN),
        "eps": 1e-5,
        "scale": 1.0,
    },
    "rope_and_write": lambda: {
        "isa": isa,
        "q": torch.randn(ROWS, HEADS, CHANNELS),
        "k": torch.randn(ROWS, KV_HEADS, CHANNELS),
        "v": torch.randn(ROWS, KV_HEADS, CHANNELS),
        **taken("cos_sin", "positions", "slots", "keys", "values"),
    },
    "attention": lambda: {
        "isa": isa,
        "q": torch.randn(ROWS, HEADS, CHANNELS),
        **taken("keys", "values", "query_start", "context_len", "block_table"),
        "scale": 0.2,
        "window": 0,
        "sinks": torch.zeros(HEADS),
        "lse": torch.zeros(ROWS, HEADS),
        "softcap": 0.0,
    },
    "head_linear": lambda: {
        "isa": isa,
        "x": torch.randn(ROWS, HEADS, HIDDEN),
        "weights": ops.pack_linear(isa, torch.randn(HEADS * 32, HIDDEN)),
        "outputs": 20,
    },
    "latent_attention": lambda: {
        "isa": isa,
        "q": torch.randn(ROWS, HEADS, CHANNELS),
        "entries": paged()["keys"][:, :1].contiguous(),
        **taken("query_start", "context_len", "block_table"),
        "scale": 0.2,
        "window": 0,
        "latent": 24,
    },
    "route": lambda: {
        "isa": isa,
        "logits": torch.randn(ROWS, 8),
        "top_k": 3,
        "score": 1,
        "softmax_after_topk": False,
        "renormalize": True,
        "scale": 1.0,
        "selection_bias": torch.zeros(8),
        "expert_scale": torch.ones(8),
        "groups": 4,
        "top_groups": 2,
        "top2_sum": True,
        "norm_floor": 0.0,
        "norm_epsilon": 0.0,
    },
    "embed": lambda: {
        "isa": isa,
        "packed": ops.pack_linear(isa, WEIGHT),
        "layout": [],
        "ids": torch.tensor([0, 47]),
        "outputs": HIDDEN,
        "inputs": HIDDEN,
        "dtype": torch.float32,
        "scale": 1.0,
    },
    "logits": lambda: {
        "isa": isa,
        "x": torch.randn(ROWS, HIDDEN),
        "norm": torch.ones(HIDDEN),
        "eps": 1e-5,
        "packed": ops.pack_linear(isa, WEIGHT),
        "bias": torch.zeros(64),
        "layout": [],
        "outputs": HIDDEN,
        "divisor": 1.0,
    },
    "pack_experts": lambda: {
        "isa": isa,
        "gate": torch.randn(3, 24, HIDDEN),
        "up": torch.randn(3, 24, HIDDEN),
        "down": torch.randn(3, HIDDEN, 24),
        "dense_down": False,
    },
    "experts": lambda: experts(True),
    "all_experts": lambda: experts(False),
    "limit_experts": lambda: {
        "isa": isa,
        **routing(),
        "scale": torch.rand(3),
        "keep": torch.rand(ROWS),
        "cap": torch.ones(ROWS, dtype=torch.int32),
    },
    "pack_quant": lambda: {
        "isa": isa,
        "codes": [torch.zeros(HIDDEN, HIDDEN, dtype=torch.int8)],
        "scales": torch.ones(HIDDEN, 1),
        "offsets": None,
        "outer_scales": None,
        "outer_offsets": None,
        "layout": INT8_LAYOUT,
    },
    "round_weight": lambda: {
        "weight": torch.randn(2, ROWS, HIDDEN),
        "format": 1,
        "group": 32,
        "block_outputs": 1,
        "symmetric": False,
    },
    "pack_halves": lambda: {"bytes": torch.zeros(ROWS, 3, 8, dtype=torch.uint8), "run": 4},
    "quant_linear": lambda: {
        "isa": isa,
        "x": torch.randn(ROWS, HIDDEN),
        "packed": packed_codes(HIDDEN, HIDDEN),
        "bias": torch.zeros(64),
        "layout": INT8_LAYOUT,
        "float_out": False,
    },
    "quant_experts": quant_experts,
    "exit_decide": lambda: {
        "isa": isa,
        "x": torch.randn(ROWS, HIDDEN),
        "previous": torch.randn(ROWS, HIDDEN),
        "entropy": torch.rand(ROWS),
        "weight": torch.randn(4, 2 * HIDDEN + 1),
        "bias": torch.zeros(4),
        "out": torch.ones(4),
        "out_bias": torch.zeros(()),
        "thresholds": torch.zeros(ROWS),
    },
    "router_entropy": lambda: {"isa": isa, "logits": [torch.randn(ROWS, 8), torch.randn(ROWS, 8)]},
    "project_kv": project_kv,
    "short_convolution": lambda: {
        "isa": isa,
        "x": torch.randn(ROWS, HIDDEN),
        "weight": torch.randn(4, HIDDEN),
        "bias": torch.zeros(HIDDEN),
        "tails": torch.zeros(4, 3, HIDDEN),
        **states(),
        "silu": True,
    },
    "time_steps": lambda: {"x": torch.randn(ROWS, HEADS), "bias": torch.randn(HEADS), "rate": torch.randn(HEADS)},
    "silu_gated": lambda: {"isa": isa, "x": torch.randn(ROWS, HIDDEN), "gate": torch.randn(ROWS, HIDDEN)},
    "recurrence": lambda: {
        "isa": isa,
        "q": torch.randn(ROWS, KV_HEADS, CHANNELS),
        "k": torch.randn(ROWS, KV_HEADS, CHANNELS),
        "v": torch.randn(ROWS, HEADS, 24),
        "decay": torch.rand(ROWS, HEADS),
        "step": torch.rand(ROWS, HEADS),
        "states": torch.zeros(4, HEADS, CHANNELS, 24),
        **states(),
        "delta_rule": True,
        "eps": 1e-6,
    },
    "selective_scan": lambda: {
        "isa": isa,
        "q": torch.randn(ROWS, 4),
        "k": torch.randn(ROWS, 4),
        "v": torch.randn(ROWS, CHANNELS),
        "step": torch.rand(ROWS, CHANNELS),
        "rate": -torch.rand(4, CHANNELS),
        "states": torch.zeros(4, 4, CHANNELS),
        **states(),
    },
    "allocate": lambda: {"words": 64},
    "read_words": lambda: {"source": torch.zeros(70_000, dtype=torch.int32)},
    "shared_bytes": lambda: {"size": 2},
}


def call(name: str, arguments: Arguments) -> Any:
    return getattr(ops, name)(**arguments)


def with_entry(tensor: torch.Tensor, value: int, place: int = 0) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[place] = value
    return changed


def test_every_operator_is_tested() -> None:
    registered = {n.removeprefix("dynamoe_cpu::") for n in torch._C._dispatch_get_all_op_names() if "dynamoe_cpu" in n}
    assert registered == {*VALID, "isas", "find_isa", "team_counters"}


NAMED: list[tuple[str, str, Callable[[Any], Any], str]] = [
    ("attention", "block_table", lambda t: t[:, :1].clone(), "context_len 7 of sequence 0 .* block_table"),
    ("attention", "block_table", lambda t: with_entry(t, 5), "block_table holds page 5"),
    ("attention", "block_table", lambda t: with_entry(t, -1), "block_table holds page -1"),
    ("attention", "block_table", lambda t: t[:1].clone(), "block_table must"),
    ("attention", "context_len", lambda t: with_entry(t, 2**31 - 1), "context_len 2147483647"),
    ("attention", "context_len", lambda t: with_entry(t, 1), "context_len 1 of sequence 0"),
    ("attention", "context_len", lambda t: with_entry(t, -3), "context_len -3"),
    ("attention", "query_start", lambda t: with_entry(t, -5), "query_start"),
    ("attention", "query_start", lambda t: with_entry(t, -1, 1), "query_start falls"),
    ("attention", "query_start", lambda t: with_entry(t, 1000, 2), "query_start must go from 0 to the 5 rows"),
    ("attention", "window", lambda _: -1, "window must"),
    ("attention", "values", lambda t: t[:, :1].clone(), "keys and values"),
    ("attention", "values", lambda t: t.to(torch.bfloat16), "keys and values"),
    ("attention", "keys", lambda t: t.to("meta"), "keys"),
    ("latent_attention", "block_table", lambda t: with_entry(t, 5), "block_table holds page 5"),
    ("latent_attention", "entries", lambda t: t.expand(-1, 2, -1, -1), "entries must be of one head"),
    ("latent_attention", "latent", lambda _: 33, "a latent of 33 does not fit"),
    ("head_linear", "outputs", lambda _: 33, "weights must be"),
    ("head_linear", "x", lambda t: t[..., ::2], "x must have rows, heads and contiguous channels"),
    ("rope_and_write", "k", lambda t: t[:, :1].clone(), "k of shape"),
    ("rope_and_write", "v", lambda t: t[:2].clone(), "v of shape"),
    ("rope_and_write", "slots", lambda t: with_entry(t, 20), "slot 20 is not in the cache"),
    ("rope_and_write", "positions", lambda t: with_entry(t, -1), "position -1"),
    ("rope_and_write", "values", lambda t: t[:1].clone(), "keys and values"),
    ("project_kv", "slots", lambda t: with_entry(t, -1), "slot -1"),
    ("project_kv", "values", lambda v: [v[0][:1].clone()], "keys and values"),
    ("project_kv", "k_norms", lambda v: [v[0].repeat(2)[::2]], "a key norm must be contiguous"),
    ("route", "score", lambda _: 4, "score must be in 0 … 3, not 4"),
    ("route", "top_k", lambda _: 9, "top_k"),
    ("route", "selection_bias", lambda t: t[:7].clone(), "selection_bias"),
    ("route", "expert_scale", lambda t: t[:7].clone(), "expert_scale"),
    ("route", "groups", lambda _: 3, "groups"),
    ("route", "groups", lambda _: 0, "groups"),
    ("route", "groups", lambda _: -4, "groups"),
    ("route", "top_groups", lambda _: 5, "groups"),
    ("route", "top_groups", lambda _: 0, "groups"),
    ("experts", "shape", lambda s: [*s[:4], 77], "activation must be in 0 … 3, not 77"),
    ("experts", "shape", lambda s: s[:2], "shape must be"),
    ("experts", "shape", lambda s: [-3, *s[1:]], "experts must be"),
    ("experts", "ids", lambda t: with_entry(t, 3), "expert number is out of range"),
    ("experts", "ids", lambda t: with_entry(t, -1), "expert number is out of range"),
    ("experts", "gate_up_bias", lambda t: t.reshape(-1)[:32].clone(), "gate_up_bias must hold"),
    ("experts", "down_bias", lambda t: t[:1].clone(), "down_bias must hold"),
    ("all_experts", "shape", lambda s: [*s[:4], -1], "activation must"),
    ("all_experts", "down_bias", lambda t: t[:32].clone(), "down_bias must hold"),
    ("quant_experts", "shape", lambda s: [*s[:3], 4], "activation must"),
    ("quant_experts", "ids", lambda t: with_entry(t, 3), "expert number is out of range"),
    ("quant_experts", "down_bias", lambda t: t[:32].clone(), "down_bias must hold"),
    ("quant_experts", "gate_up_layout", lambda s: [77, *s[1:]], "impossible quantised layout"),
    ("quant_experts", "places", lambda t: with_entry(t, -1), "expert 0 cannot be at -1"),
    ("quant_experts", "places", lambda t: with_entry(t, int(t[1, 2]) + 64, 5), "expert 2 cannot be at"),
    ("quant_experts", "places", lambda t: with_entry(t, 4), "expert 0 cannot be at 4"),
    ("quant_experts", "places", lambda t: t[:1].clone(), "places must hold 6 elements"),
    ("quant_experts", "counts", lambda t: t[:2].clone(), "does not fit 5 rows"),
    ("limit_experts", "ids", lambda t: with_entry(t, 3), "expert number is out of range"),
    ("limit_experts", "counts", lambda t: with_entry(t, 3), "count 3"),
    ("quant_linear", "layout", lambda s: [-1, *s[1:]], "impossible quantised layout"),
    ("quant_linear", "layout", lambda s: [s[0], 2**61, *s[2:]], "outputs of a layout"),
    ("pack_quant", "codes", lambda t: t * 2, "do not fit 48 outputs and 48 inputs"),
    ("pack_quant", "codes", lambda t: t * 3, "codes must be one or two tensors"),
    ("pack_quant", "codes", lambda t: [t[0][:, :47].clone()], "do not fit 48 outputs and 48 inputs"),
    ("pack_quant", "scales", lambda t: t[:47].clone(), "do not fit 48 outputs and 48 inputs"),
    ("round_weight", "weight", lambda t: t.mT, "weight must be .* with contiguous inputs"),
    ("round_weight", "weight", lambda t: t.double(), "weight must be float32, bfloat16 or float16"),
    ("round_weight", "format", lambda _: 3, "format must be in 0 … 2"),
    ("round_weight", "group", lambda _: 0, "no weight of format 1 has scales of 1 outputs and 0 inputs"),
    ("round_weight", "block_outputs", lambda _: 32, "no weight of format 1 has scales of 32 outputs"),
    ("pack_halves", "run", lambda _: 3, "bytes must be uint8 of whole runs of 3"),
    ("pack_halves", "bytes", lambda t: t[..., :6].clone(), "bytes must be uint8 of whole runs of 4"),
    ("linear", "bias", lambda t: t[:1].clone(), "bias must hold"),
    ("linear", "x", lambda t: t[:, :0], "columns of x"),
    ("linear", "outputs", lambda _: -1, "outputs must"),
    ("logits", "bias", lambda t: t[:1].clone(), "bias must hold"),
    ("embed", "ids", lambda t: with_entry(t, HIDDEN), "row 48"),
    ("embed", "dtype", lambda _: torch.int64, "dtype must be"),
    ("embed", "inputs", lambda _: 0, "inputs must"),
    ("exit_decide", "out_bias", lambda _: None, "out needs an out_bias"),
    ("router_entropy", "logits", lambda _: [torch.randn(ROWS, 0)], "columns of logits"),
    ("short_convolution", "slots", lambda t: with_entry(t, 4), r"slot 4 is not in 0 … 3"),
    ("short_convolution", "kept", lambda t: with_entry(t, -2), r"slot -2 is not in 0 … 3"),
    ("short_convolution", "kept", lambda t: with_entry(t, 3), "slot 3 is written for two sequences"),
    ("short_convolution", "weight", lambda t: t[:1].clone(), "weight must have 2 … 64 taps of 48 channels"),
    ("short_convolution", "tails", lambda t: t[:, :2].clone(), "tails of shape"),
    ("short_convolution", "context_len", lambda t: with_entry(t, 1), "sequence 0 has rows 0 … 2 and 1 tokens"),
    ("time_steps", "rate", lambda t: t[1:].clone(), "rate must hold 4 elements"),
    ("silu_gated", "gate", lambda t: t[:, 1:], "does not fit x of shape"),
    ("recurrence", "slots", lambda t: with_entry(t, -1), r"slot -1 is not in 0 … 3"),
    ("recurrence", "slots", lambda t: with_entry(t, 1), "slot 1 is written for two sequences"),
    ("recurrence", "query_start", lambda t: with_entry(t, 1000, 2), "query_start must go from 0 to 5, not 0 to 1000"),
    ("recurrence", "query_start", lambda t: with_entry(t, 7, 1), "sequence 0 has rows 0 … 7 and 2 tokens"),
    ("recurrence", "k", lambda t: t[:, :1].clone(), "k of shape"),
    ("recurrence", "v", lambda t: t[:, :3].clone(), "do not fit q of shape"),
    ("recurrence", "decay", lambda t: t[:4].clone(), "decay must hold 20 elements"),
    ("recurrence", "decay", lambda t: t[..., None].clone(), f"decay must hold {20 * CHANNELS} elements"),
    ("recurrence", "states", lambda t: t[:, :2].clone(), "states of shape"),
    ("selective_scan", "slots", lambda t: with_entry(t, 1), "slot 1 is written for two sequences"),
    ("selective_scan", "step", lambda t: t[:, :2].clone(), "step of shape"),
    ("selective_scan", "k", lambda t: t[:, :2].clone(), "do not fit q of shape"),
    ("selective_scan", "rate", lambda t: t[:2].clone(), "rate of shape"),
    ("selective_scan", "states", lambda t: t[:, :2].clone(), "and states of shape"),
    ("allocate", "words", lambda _: -1, "words must not be -1"),
    ("shared_bytes", "size", lambda _: 0, "size must be in 1 … 1024, not 0"),
]


@pytest.mark.parametrize(("name", "argument", "change", "message"), NAMED)
def test_a_wrong_argument_is_refused_by_name(
    name: str, argument: str, change: Callable[[Any], Any], message: str
) -> None:
    arguments = VALID[name]()
    call(name, arguments)
    with pytest.raises((ValueError, IndexError), match=message):
        call(name, {**arguments, argument: change(arguments[argument])})


@pytest.mark.parametrize("name", [name for name, make in VALID.items() if "isa" in make()])
def test_an_instruction_set_is_one_of_this_processor(name: str) -> None:
    missing = [number for number, known in enumerate(ops.isas()) if ops.find_isa(known) < 0]
    for number in (-1, 77, 2**40, *missing):
        with pytest.raises(ValueError, match=f"isa {number} is no instruction set of this processor"):
            call(name, VALID[name]() | {"isa": number})


NUMBERS = (-(2**63), -(2**31), -1, 0, 3, 77, 2**31, 2**32, 2**61, 2**62)


def wrong(value: Any) -> Iterator[Any]:
    """What else somebody might give in place of an argument."""
    match value:
        case bool() | float() | torch.dtype():
            yield from ()
        case int():
            yield from NUMBERS
        case list() if not value or isinstance(value[0], int):
            yield from ([], [0], value[:-1], [*value, 1])
            for place, number in itertools.product(range(len(value)), NUMBERS):
                yield [*value[:place], number, *value[place + 1 :]]
        case list():
            yield from ([], value * 2, *([other, *value[1:]] for other in wrong(value[0])))
        case torch.Tensor():
            yield from (value.to("meta"), value.double(), value.bool(), value[:0] if value.dim() else value[None][:0])
            yield from (
                value.flatten(),
                value[None],
                value.new_zeros(()),
                value.repeat(2, *[1] * max(0, value.dim() - 1)),
            )
            if value.dim() > 1:
                yield from (value.mT, value[..., :0], value[..., :1], value[:, :1].clone(), value.to_sparse())
            if not value.is_floating_point():
                ends = torch.iinfo(value.dtype)
                yield from (torch.full_like(value, n) for n in (ends.min, -1, 3, 77, ends.max) if n >= ends.min)


@pytest.mark.parametrize("name", VALID)
def test_whatever_is_given_raises_or_returns(name: str) -> None:
    raised = 0
    for argument in VALID[name]():
        for other in wrong(VALID[name]()[argument]):
            try:
                call(name, VALID[name]() | {argument: other})
            except ERRORS:
                raised += 1
    assert raised > 0


def test_a_group_checks_ranks_sizes_and_its_file(tmp_path: Path) -> None:
    path = make_shared_file(2)
    try:
        make = torch.classes.dynamoe_cpu.SharedGroup
        for arguments, message in (
            ((-1, 2), "rank -1"),
            ((2, 2), "rank 2"),
            ((0, 2000), "size must"),
            ((0, 0), "size must"),
        ):
            with pytest.raises((ValueError, RuntimeError), match=message):
                make(isa, str(path), *arguments, 1.0)
        with pytest.raises((ValueError, RuntimeError), match="isa 77"):
            make(77, str(path), 0, 2, 1.0)
        short = tmp_path / "short"
        short.write_bytes(path.read_bytes()[:4096])
        with pytest.raises(RuntimeError, match=r"shared memory .*short cannot be used"):
            make(isa, str(short), 0, 2, 1.0)
        group = make(isa, str(path), 0, 2, 1.0)
        for do, message in (
            (lambda: group.broadcast(torch.zeros(4), 2, 1.0), "rank 2"),
            (lambda: group.gather(torch.zeros(4), torch.zeros(4), -1), "rank -1"),
            (lambda: group.begin_swap(torch.zeros(2, 4), [3, -1]), "must have rows"),
            (lambda: group.finish_swap(torch.zeros(2, 4), [1, 1]), "no swap has begun"),
        ):
            with pytest.raises((ValueError, RuntimeError), match=message):
                do()
    finally:
        path.unlink()
