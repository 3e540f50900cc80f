"""The CPU kernels against the machine's limits: ``python benchmarks/cpu_kernels.py --shapes granite --tokens 1 512``.

Per operation, shape and number of rows: time, GB/s of weights and cache really touched, GFLOP/s, and the fraction of
the limit that binds (the larger of the time to read those bytes and the time of those operations at the rate of torch's
matrix product).
The limits are probed between the repetitions; medians are compared with medians and the best with the best. Weights
rotate over several copies, so that no cache holds them.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from benchmark import command_line
from dynamoe.kernels.api.router_spec import RouterSpec
from dynamoe.kernels.api.types import AttentionBatch, KVLayer, Routing
from dynamoe.kernels.cpu.backend import CpuBackend
from dynamoe.kernels.cpu.build import isas
from limits import Limits


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One layer: sizes as in ``kernels/api/types.py``; ``experts=1`` is a dense FFN."""

    hidden: int
    width: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    channels: int
    vocabulary: int


SHAPES = {
    "granite": Shape(hidden=1024, width=512, experts=32, top_k=8, heads=16, kv_heads=8, channels=64, vocabulary=49152),
    "default": Shape(hidden=576, width=1536, experts=1, top_k=1, heads=9, kv_heads=3, channels=64, vocabulary=49152),
    "olmoe": Shape(hidden=2048, width=1024, experts=64, top_k=8, heads=16, kv_heads=16, channels=128, vocabulary=50304),
}
ROTATED_BYTES = 300e6  # copies of a weight together are at least this large
PAGE = 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """One timed operation: ``run(i)`` uses copy ``i`` of the weights."""

    name: str
    run: Callable[[int], object]
    touched_bytes: float
    flops: float


def copies_of(nbytes: float) -> int:
    return max(1, min(64, round(ROTATED_BYTES / nbytes)))


def linear_case(
    backend: CpuBackend, name: str, tokens: int, inputs: int, outputs: int, *, logits: bool = False
) -> Case:
    weight = torch.randn(outputs, inputs).to(backend.dtype)
    packed = [backend.pack_linear(weight) for _ in range(copies_of(weight.nbytes))]
    x = torch.randn(tokens, inputs).to(backend.dtype)
    product = backend.logits_linear if logits else backend.linear
    return Case(
        name=name,
        run=lambda i: product(x, packed[i % len(packed)]),
        touched_bytes=weight.nbytes,
        flops=2.0 * tokens * inputs * outputs,
    )


def experts_case(backend: CpuBackend, shape: Shape, tokens: int) -> Case:
    e, f, d = shape.experts, shape.width, shape.hidden
    gate, up = (torch.randn(e, f, d).to(backend.dtype) for _ in range(2))
    down = torch.randn(e, d, f).to(backend.dtype)
    x = torch.randn(tokens, d).to(backend.dtype)
    per_expert = 3 * f * d * gate.element_size()
    if e == 1:
        dense = [backend.pack_experts(gate, up, down, "silu") for _ in range(copies_of(per_expert))]
        return Case(
            name="dense FFN",
            run=lambda i: backend.all_experts(x, dense[i % len(dense)]),
            touched_bytes=per_expert,
            flops=6.0 * tokens * d * f,
        )
    packed = [backend.pack_experts(gate, up, down, "silu") for _ in range(3)]
    spec = RouterSpec(num_experts=e, top_k=shape.top_k, softmax_after_topk=True)
    routings: list[Routing] = [backend.route(torch.randn(tokens, e), spec) for _ in range(16)]
    hit = statistics.mean(len(r.expert_ids_TK.unique()) for r in routings)
    return Case(
        name="experts",
        run=lambda i: backend.experts(x, packed[i % 3], routings[i % 16]),
        touched_bytes=hit * per_expert,
        flops=6.0 * tokens * shape.top_k * d * f,
    )


def attention_case(backend: CpuBackend, shape: Shape, tokens: int, context: int, *, prefill: bool) -> Case:
    """Decode: ``tokens`` sequences of ``context`` tokens, one row each. Prefill: one sequence of ``tokens`` rows."""
    sequences, length = (1, tokens) if prefill else (tokens, context)
    pages = -(-length // PAGE)
    cache_shape = (sequences * pages, shape.kv_heads, PAGE, shape.channels)
    copies = copies_of(2 * sequences * length * shape.kv_heads * shape.channels * 2)
    layers = [
        KVLayer(
            keys_BGPC=torch.randn(cache_shape).to(backend.dtype), values_BGPC=torch.randn(cache_shape).to(backend.dtype)
        )
        for _ in range(copies)
    ]
    rows = tokens if prefill else 1
    positions = torch.arange(length - rows, length).repeat(sequences)
    table = torch.arange(sequences * pages, dtype=torch.int32).view(sequences, pages)
    batch = AttentionBatch(
        positions_T=positions,
        slots_T=torch.zeros_like(positions),
        query_start_S1=torch.arange(0, (sequences + 1) * rows, rows, dtype=torch.int32),
        context_len_S=torch.full((sequences,), length, dtype=torch.int32),
        block_table_SM=table,
        max_query_len=rows,
        max_context_len=length,
    )
    q = torch.randn(tokens, shape.heads, shape.channels).to(backend.dtype)
    seen = tokens * (tokens + 1) / 2 if prefill else sequences * length
    element = layers[0].keys_BGPC.element_size()
    return Case(
        name="attention prefill" if prefill else f"attention @{context}",
        run=lambda i: backend.attention(q, layers[i % copies], batch, scale=0.125),
        touched_bytes=2.0 * sequences * length * shape.kv_heads * shape.channels * element,
        flops=4.0 * seen * shape.heads * shape.channels,
    )


def row_cases(backend: CpuBackend, shape: Shape, tokens: int) -> list[Case]:
    x, residual = (torch.randn(tokens, shape.hidden).to(backend.dtype) for _ in range(2))
    weight = torch.ones(shape.hidden).to(backend.dtype)
    logits = torch.randn(tokens, max(shape.experts, 2)).to(backend.dtype)
    spec = RouterSpec(num_experts=max(shape.experts, 2), top_k=shape.top_k, softmax_after_topk=True)
    size = x.nbytes
    cases = [
        Case(
            name="add + norm",
            run=lambda _: backend.add_rms_norm(x, residual, weight, 1e-6),
            touched_bytes=4.0 * size,
            flops=0,
        )
    ]
    if shape.experts > 1:
        cases.append(
            Case(name="route", run=lambda _: backend.route(logits, spec), touched_bytes=logits.nbytes, flops=0)
        )
    return cases


def cases_of(backend: CpuBackend, shape: Shape, tokens: int, wanted: list[str]) -> list[Case]:
    heads = (shape.heads + 2 * shape.kv_heads) * shape.channels
    makers: dict[str, Callable[[], list[Case]]] = {
        "qkv": lambda: [linear_case(backend, "qkv", tokens, shape.hidden, heads)],
        "o": lambda: [linear_case(backend, "o", tokens, shape.heads * shape.channels, shape.hidden)],
        "ffn": lambda: [experts_case(backend, shape, tokens)],
        "head": lambda: (
            [linear_case(backend, "LM head", tokens, shape.hidden, shape.vocabulary, logits=True)]
            if tokens <= 64
            else []
        ),
        "attention": lambda: [
            attention_case(backend, shape, tokens, 512, prefill=False)
            if tokens <= 64
            else attention_case(backend, shape, tokens, 0, prefill=True)
        ],
        "rows": lambda: row_cases(backend, shape, tokens),
    }
    return [case for name in wanted for case in makers[name]()]


def measure(case: Case, limits: Limits, rounds: int, seconds: float) -> str:
    """Time a case in rounds with the limits probed in between; medians and the best of both."""
    case.run(0)
    times: list[float] = []
    bandwidths: list[float] = []
    rates: list[float] = []
    for _ in range(rounds):
        bandwidths.append(limits.read_bandwidth() / 1e9)
        rates.append(limits.gemm_rate() / 1e9)
        until = time.perf_counter() + seconds / rounds
        while (start := time.perf_counter()) < until:
            case.run(len(times))
            times.append(time.perf_counter() - start)
    quick, middle = min(times), statistics.median(times)
    gigabytes, gigaflops = case.touched_bytes / 1e9, case.flops / 1e9

    def fraction(elapsed: float, bandwidth: float, rate: float) -> float:
        return max(gigabytes / bandwidth, gigaflops / rate) / elapsed

    typical = fraction(middle, statistics.median(bandwidths), statistics.median(rates))
    best = fraction(quick, max(bandwidths), max(rates))
    return (
        f"{middle * 1e3:9.3f} {quick * 1e3:9.3f} {gigabytes / quick:8.1f} {gigaflops / quick:9.1f} {typical:8.0%}"
        f" {best:8.0%}  {statistics.median(bandwidths):5.1f}/{max(bandwidths):5.1f}"
        f" {statistics.median(rates):6.0f}/{max(rates):4.0f}"
    )


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["granite", "default"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 256, 512, 2048])
    parser.add_argument("--ops", nargs="+", default=["qkv", "o", "ffn", "head", "attention", "rows"])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--isa", choices=("auto", *isas()), default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each operation")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    backend = CpuBackend("cpu", getattr(torch, arguments.dtype), isa=arguments.isa)
    limits = Limits()
    print(f"{backend.isa}, {arguments.dtype}, {arguments.threads} threads")
    print(
        f"{'shape':8} {'operation':18} {'rows':>5} {'ms':>9} {'best ms':>9} {'GB/s':>8} {'GFLOP/s':>9}"
        f" {'of limit':>8} {'at best':>8}  read median/best  gemm median/best"
    )
    with torch.inference_mode():
        for name in arguments.shapes:
            for tokens in arguments.tokens:
                for case in cases_of(backend, SHAPES[name], tokens, arguments.ops):
                    line = measure(case, limits, arguments.rounds, arguments.seconds)
                    print(f"{name:8} {case.name:18} {tokens:5} {line}", flush=True)


if __name__ == "__main__":
    main()
