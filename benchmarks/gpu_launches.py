"""What one layer launches in a step on a GPU that need not be there: kernels, bytes, registers, shared memory.

    python benchmarks/gpu_launches.py --target sm_90 --shapes qwen3-30b-a3b     # leaves results/gpu_launches-sm_90.csv

Launches are those of the planner's own choices on the listed device, compiled for it. The dense projections of plain
weights are the vendor's and not counted; quantised ones are. Bytes are what must cross the memory once: rows, tables,
the weights of the experts that so many random rows hit, keys and values of the whole context; not what caches miss.
"""

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from benchmark import command_line
from dynamoe.kernels.api.formats import FP8_PER_GROUP, UNQUANTIZED, ActivationScheme
from dynamoe.kernels.triton.aot import LISTED, SHAPES, inspect, meta_weight, quantised_experts
from dynamoe.kernels.triton.experts import ExpertsCall, table_rows
from dynamoe.kernels.triton.index import index_tables
from dynamoe.kernels.triton.launch import Launch
from dynamoe.kernels.triton.norm import NormCall, RopeCall
from dynamoe.kernels.triton.paged_attention import AttentionCall
from dynamoe.kernels.triton.quantized_layers import LinearCall, QuantExpertsCall
from dynamoe.kernels.triton.router import RouteCall
from dynamoe.kernels.triton.shapes import Steps, WarmUpShape, meta
from dynamoe.kernels.triton.stored_weight import WeightKind
from dynamoe.kernels.triton.tuning import TuningCache, experts_hit
from dynamoe.kernels.triton.variants import Planner

FORMATS: dict[str, tuple[WeightKind, ActivationScheme] | None] = {
    "bfloat16": None,
    "int8": (WeightKind("int8", 0), UNQUANTIZED),
    "int4": (WeightKind("int4", 128), UNQUANTIZED),
    "mxfp4": (WeightKind("mxfp4", 32), UNQUANTIZED),
    "fp8-block": (WeightKind("fp8", 128), FP8_PER_GROUP),
    "q4_k": (WeightKind("int4", 32, 256, offsets=True), UNQUANTIZED),
}
CONTEXT = 4096
_CACHED = ("keys_ptr", "values_ptr", "key_scales_ptr", "value_scales_ptr")


@dataclass(frozen=True)
class Step:
    """A layer's launches; ``share`` is that of the experts which some row uses."""

    shape: WarmUpShape
    tokens: int
    share: float

    @property
    def sequences(self) -> int:
        return self.tokens if self.tokens <= self.shape.max_sequences else 1

    def bytes_of(self, launch: Launch) -> int:
        """What a launch reads and writes, once each."""
        total, experts = 0.0, self.shape.router.num_real_experts if self.shape.router else 0
        for name, value in launch.args.items():
            tensor = getattr(value, "base", value)
            if not isinstance(tensor, torch.Tensor):
                continue
            size = tensor.numel() * tensor.itemsize
            if name in _CACHED:
                # Of all pages: those of the contexts in attention, the rows' own slots in the kernel that writes.
                slots = tensor.shape[0] * self.shape.page_size
                kept = self.tokens if launch.name.startswith("rope") else self.sequences * CONTEXT
                size *= kept / slots
            elif name == "cos_sin_ptr":
                size *= self.tokens / len(tensor)
            elif tensor.dim() == 3 and len(tensor) == experts:  # weights; rows have two
                size *= self.share
            total += size
        return round(total)


def layer_launches(step: Step, kind: tuple[WeightKind, ActivationScheme] | None, planner: Planner) -> Iterator[Launch]:
    """Of one layer: norms, projections that are quantised, rotation, attention, routing, experts."""
    shape, tokens, dtype = step.shape, step.tokens, torch.bfloat16
    steps, spec = Steps.of(tokens, shape), shape.router
    assert spec is not None
    x_TD = meta(tokens, shape.hidden_size, dtype=dtype)
    norm = planner.plan(NormCall(x_TD, x_TD[0], 1e-6, x_TD.float()))[1]
    heads = shape.num_heads * shape.head_dim
    projections = ((shape.hidden_size, heads + 2 * shape.num_kv_heads * shape.head_dim), (heads, shape.hidden_size))

    def linear(inputs: int, outputs: int) -> list[Launch]:
        if kind is None:
            return []
        call = LinearCall(
            meta(tokens, inputs, dtype=dtype), meta_weight(kind[0], outputs, inputs), None, kind[1], dtype
        )
        return planner.plan(call)[1]

    yield from norm
    yield from linear(*projections[0])
    for operation in (RopeCall, AttentionCall):
        yield from planner.plan(next(operation.of_layer(shape, steps, dtype, planner)))[1]
    yield from linear(*projections[1])
    yield from norm
    route = next(RouteCall.of_layer(shape, steps, dtype, planner))
    if kind is None:
        yield from planner.plan(route)[1]
        yield from planner.plan(next(ExpertsCall.of_layer(shape, steps, dtype, planner)))[1]
        return
    call = quantised_experts(*kind, x_TD, (spec.num_real_experts, spec.top_k, shape.expert_size))
    rows = table_rows(planner, call.problem(), QuantExpertsCall)
    assert rows is not None
    yield from planner.plan(replace(route, block_m=rows))[1]
    tables = index_tables(call.routing.expert_ids_TK, None, spec.num_real_experts, rows, call.ticket)
    yield from planner.plan(replace(call, routing=replace(call.routing, index=tables.index)))[1]


def rows_of(target: str, name: str, tokens: int, form: str, seen: dict[tuple, dict]) -> Iterator[dict]:
    """One row per launch, the layer's sum behind them. ``seen`` has what was compiled, by the launch's variant."""
    shape, planner = replace(SHAPES[name], max_context=CONTEXT), Planner(LISTED[target], TuningCache("nobody's"))
    assert shape.router is not None
    experts = shape.router.num_experts
    step = Step(shape, tokens, experts_hit(tokens, experts, shape.router.top_k) / experts)
    every = list(layer_launches(step, FORMATS[form], planner))
    common = {"target": target, "shape": name, "tokens": tokens, "weights": form}
    total = 0
    for launch in every:
        key = (target, *launch.variant())
        if key not in seen:
            report = inspect(launch, target, tokens)
            seen[key] = {
                "tiling": report.blocks,
                "registers": report.registers,
                "shared": report.shared,
                "spills": report.spills,
            }
        total += (moved := step.bytes_of(launch))
        programs = 1
        for size in launch.grid:
            programs *= size
        yield {**common, "kernel": launch.name, "role": launch.part, "programs": programs, "bytes": moved, **seen[key]}
    most = {
        name: max(seen[(target, *launch.variant())][name] for launch in every)
        for name in ("registers", "shared", "spills")
    }
    yield {**common, "kernel": f"{len(every)} launches", "bytes": total, **most}


COLUMNS = (
    *("target", "shape", "tokens", "weights", "kernel", "role", "tiling", "programs", "bytes"),
    *("registers", "shared", "spills"),
)


def main() -> int:
    parser = command_line(__doc__, output=True)
    parser.add_argument("--target", choices=list(LISTED), default="sm_90")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qwen3-30b-a3b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 64, 8192])
    parser.add_argument("--weights", nargs="+", choices=FORMATS, default=list(FORMATS))
    options = parser.parse_args()
    seen: dict[tuple, dict] = {}
    spilled = 0
    path: Path = options.output / f"gpu_launches-{options.target}.csv"
    print(f"Triton {triton.__version__}")
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        for name in options.shapes:
            for tokens in options.tokens:
                for form in options.weights:
                    for row in rows_of(options.target, name, tokens, form, seen):
                        table.writerow(row)
                        spilled += row["spills"] > 0
                    file.flush()
                    print(*(row.get(column, "") for column in COLUMNS), flush=True)
    print(f"results: {path}")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
