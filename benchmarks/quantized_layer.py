"""How much faster a mixture of experts runs on a CPU with quantised weights than in bfloat16.

    python benchmarks/quantized_layer.py --tokens 1 4 16 --threads 1

Granite-1B-A400M's layer, random weights, uniform routing, weights of several layers in turn so that they do not stay in
a cache. With one thread, time is the processor's time of this process, so that other work on the machine counts only
as far as it takes memory bandwidth and caches. The methods take turns within each repetition and medians are compared,
because machines drift. Bytes count the experts that the rows really hit, once each, with their scales. Beside them the
rate at which one pass over plain words reads memory, measured between the repetitions.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark import command_line, surroundings, write
from dynamoe.dynamic.model.quantization import methods
from dynamoe.kernels.api.types import ExpertWeights, Routing
from dynamoe.kernels.cpu.backend import CpuBackend
from tqdm import tqdm

EXPERTS, TOP_K, HIDDEN, WIDTH, LAYERS = 32, 8, 1024, 512, 4
PLAIN = "bfloat16"


def make_layers(backend: CpuBackend, names: list[str]) -> dict[str, list[ExpertWeights]]:
    """The same random weights for every method."""
    packed: dict[str, list[ExpertWeights]] = {name: [] for name in (PLAIN, *names)}
    for _ in range(LAYERS):
        shapes = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
        parts = [(torch.randn(EXPERTS, o, i) / i**0.5).bfloat16() for o, i in shapes]
        packed[PLAIN].append(backend.pack_experts(parts[0], parts[1], parts[2], "silu"))
        for name in names:
            method = methods()[name]
            gate, up, down = (method.quantize(part) for part in parts)
            packed[name].append(backend.pack_quantized_experts(gate, up, down, "silu", scheme=method.scheme))
    return packed


def seconds(run: Callable[[], Any]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    run()
    return clock() - begin


def measure(backend: CpuBackend, packed: dict[str, list[ExpertWeights]], tokens: int, repetitions: int) -> dict:
    """Medians of one layer."""
    x_TD = torch.randn(tokens, HIDDEN).bfloat16()
    ids_TK = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)]).int()
    routing = Routing(expert_ids_TK=ids_TK, weights_TK=torch.rand(tokens, TOP_K))
    active = len(ids_TK.unique())
    source = torch.ones(1 << 26, dtype=torch.int32)
    times: dict[str, list[float]] = {name: [] for name in packed}
    reads = []

    def run(layers: list[ExpertWeights]) -> None:
        for layer in layers:
            backend.experts(x_TD, layer, routing)

    for _ in tqdm(range(repetitions), desc=f"{tokens} tokens", unit="repetition"):
        reads.append(seconds(lambda: torch.ops.dynamoe_cpu.read_words(source)))
        for name, layers in packed.items():
            times[name].append(seconds(lambda layers=layers: run(layers)) / LAYERS)
    limit = source.nbytes / statistics.median(reads)
    plain = statistics.median(times[PLAIN])
    rows = {}
    for name, taken in times.items():
        median = statistics.median(taken)
        read = packed[name][0].nbytes * active / EXPERTS
        rows[name] = {
            "microseconds": round(median * 1e6, 1),
            "times_bfloat16": round(plain / median, 2),
            "bytes": int(read),
            "share_of_read_limit": round(read / median / limit, 3),
        }
    return {"tokens": tokens, "experts_hit": active, "read_limit_GB_per_s": round(limit / 1e9, 1), "methods": rows}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--methods", nargs="+", choices=list(methods()), default=["int8", "w8a8", "int4", "fp8"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=21)
    parser.add_argument("--note", default="", help="what else is to be known about this run")
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    backend = CpuBackend("cpu", torch.bfloat16)
    packed = make_layers(backend, options.methods)
    results = [measure(backend, packed, tokens, options.repetitions) for tokens in options.tokens]
    report = {
        "what": "one layer of Granite-1B-A400M's experts, random weights",
        **surroundings(),
        "instruction_set": backend.isa,
        "time": "processor time of the process" if options.threads == 1 else "wall time",
        "repetitions": options.repetitions,
        "note": options.note,
        "results": results,
    }
    for result in results:
        print(f"{result['tokens']} tokens, {result['experts_hit']} experts, limit {result['read_limit_GB_per_s']} GB/s")
        for name, row in result["methods"].items():
            share, factor = row["share_of_read_limit"], row["times_bfloat16"]
            print(f"  {name:10} {row['microseconds']:9} µs  {factor:5}x  {share:.0%} of the limit")
    if options.output:
        write(options.output, report)


if __name__ == "__main__":
    main()
