"""How long a mixture of experts takes, and what share of the machine's own limit that is.

    python benchmarks/moe_layer.py --shapes qwen3-30b-a3b olmoe --tokens 1 8 64 4096

One layer from router logits to output, random weights and rows. Limits (memory bandwidth, matrix product) are
measured in the same run. Bytes count the experts that the rows really hit, once each. On a GPU, launches are replayed
from a graph where the implementation can be captured. Caches are flushed before each repetition.
"""

import contextlib
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from benchmark import command_line, write
from dynamoe.kernels.api.router_spec import RouterSpec
from dynamoe.kernels.cpu.build import BuildError
from dynamoe.kernels.select import select_backend
from dynamoe.kernels.torch.backend import TorchBackend
from limits import Limits as MachineLimits

Layer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# These wait for the device, which a graph cannot record.
_WAITING = ("transformers eager", "megablocks")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a mixture: experts, choices, hidden size, width of an expert."""

    num_experts: int
    top_k: int
    hidden_size: int
    expert_size: int

    @property
    def expert_numbers(self) -> int:
        return 3 * self.hidden_size * self.expert_size


SHAPES = {
    "olmoe": Shape(num_experts=64, top_k=8, hidden_size=2048, expert_size=1024),
    "qwen3-30b-a3b": Shape(num_experts=128, top_k=8, hidden_size=2048, expert_size=768),
    "mixtral": Shape(num_experts=8, top_k=2, hidden_size=4096, expert_size=14336),
    "granite-1b-a400m": Shape(num_experts=32, top_k=8, hidden_size=1024, expert_size=512),
    "tiny": Shape(num_experts=8, top_k=2, hidden_size=64, expert_size=48),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 8192, 16384)


@dataclass(frozen=True)
class Weights:
    gate_EFD: torch.Tensor
    up_EFD: torch.Tensor
    down_EDF: torch.Tensor

    @classmethod
    def random(cls, shape: Shape, device: torch.device, dtype: torch.dtype) -> Self:
        e, f, d = shape.num_experts, shape.expert_size, shape.hidden_size

        def normal(*sizes: int) -> torch.Tensor:
            # Drawn one expert at a time: a float32 copy of the whole layer need not fit.
            parts = [torch.randn(sizes[1:], device=device) * sizes[-1] ** -0.5 for _ in range(sizes[0])]
            return torch.stack([p.to(dtype) for p in parts])

        return cls(normal(e, f, d), normal(e, f, d), normal(e, d, f))


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One cell: seconds (median, fastest, slowest), bytes and operations per second, share of the limit."""

    shape: str
    tokens: int
    name: str
    seconds: float
    fastest: float
    slowest: float
    bytes_per_second: float
    flops_per_second: float
    fraction: float
    captured: bool


@dataclass(frozen=True, kw_only=True)
class Limits:
    bandwidth: float
    flops: float


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Bytes per second of memory and operations per second of a large matrix product.

    On a GPU memory is copied (read plus written). On a CPU it is read, if our kernels can be built, and the product is
    the faster one of bf16 and fp32.
    """
    if device.type == "cpu":
        with contextlib.suppress(BuildError):
            machine = MachineLimits()
            bandwidth = statistics.median(machine.read_bandwidth() for _ in range(15))
            return Limits(bandwidth=bandwidth, flops=statistics.median(machine.gemm_rate() for _ in range(15)))
    size = 8192 if device.type == "cuda" else 1024
    source = torch.empty((1 << 30) if device.type == "cuda" else (1 << 27), dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    copying = time_calls(lambda: target.copy_(source), device, 15)[0]
    multiplying = time_calls(lambda: a @ b, device, 15)[0]
    return Limits(bandwidth=2 * source.numel() / copying, flops=2 * size**3 / multiplying)


def time_calls(call: Callable[[], Any], device: torch.device, repetitions: int) -> tuple[float, float, float]:
    """Median, fastest and slowest seconds; on a GPU by events. Caches are flushed before each repetition."""
    call()
    times = []
    if device.type == "cuda":
        flush = torch.empty(256 << 20, dtype=torch.int8, device=device)
        for _ in range(repetitions):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e-3)
    else:
        other = torch.ones(64 << 20, dtype=torch.int64)  # 512 MiB, more than last-level caches hold
        for _ in range(repetitions):
            other.sum()
            begin_s = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin_s)
    return statistics.median(times), min(times), max(times)


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], Any] | None:
    """The call as a replay of its graph, or None where it cannot be captured."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                call()
    except RuntimeError as error:
        torch.cuda.synchronize(device)
        print(f"  not captured: {error}", flush=True)
        return None
    return graph.replay


def backend_layer(backend: TorchBackend, weights: Weights, shape: Shape) -> Layer:
    """Routing and experts of one of our backends."""
    packed = backend.pack_experts(weights.gate_EFD, weights.up_EFD, weights.down_EDF, "silu")
    spec = RouterSpec(num_experts=shape.num_experts, top_k=shape.top_k, renormalize=True)
    return lambda x_TD, logits_TE: backend.experts(x_TD, packed, backend.route(logits_TE, spec))


def torch_routing(logits_TE: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax, top-k and renormalisation in torch, for implementations that bring no router."""
    weights_TK, ids_TK = logits_TE.float().softmax(-1).topk(top_k, -1)
    return weights_TK / weights_TK.sum(-1, keepdim=True), ids_TK


def transformers_layer(weights: Weights, shape: Shape, implementation: str) -> Layer:
    """transformers' own experts module (that of Qwen3-MoE) over our weights."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=shape.hidden_size,
        moe_intermediate_size=shape.expert_size,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        num_hidden_layers=1,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    gate_up = torch.cat((weights.gate_EFD, weights.up_EFD), 1)
    module.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
    module.down_proj = torch.nn.Parameter(weights.down_EDF, requires_grad=False)

    def layer(x_TD: torch.Tensor, logits_TE: torch.Tensor) -> torch.Tensor:
        weights_TK, ids_TK = torch_routing(logits_TE, shape.top_k)
        return module(x_TD, ids_TK, weights_TK.to(x_TD.dtype))

    return layer


def vllm_layer(weights: Weights, shape: Shape) -> Layer:
    """vLLM's fused experts (Triton) over our weights."""
    from vllm.model_executor.layers.fused_moe import fused_experts

    gate_up = torch.cat((weights.gate_EFD, weights.up_EFD), 1)

    def layer(x_TD: torch.Tensor, logits_TE: torch.Tensor) -> torch.Tensor:
        weights_TK, ids_TK = torch_routing(logits_TE, shape.top_k)
        return fused_experts(x_TD, gate_up, weights.down_EDF, weights_TK, ids_TK.int())

    return layer


def contenders(weights: Weights, shape: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Layer]]:
    """Every implementation that runs here, ours first."""
    for name in ("triton", "cpu", "grouped_mm", "torch", "megablocks"):
        if (name == "triton") != (device.type == "cuda") and name in ("triton", "cpu"):
            continue
        try:
            backend = select_backend(device, dtype, name)
        except ValueError as error:
            print(f"  {name}: {error}")
            continue
        yield name, backend_layer(backend, weights, shape)
    if importlib.util.find_spec("transformers"):
        for implementation in ("grouped_mm", "eager"):
            yield f"transformers {implementation}", transformers_layer(weights, shape, implementation)
    if device.type == "cuda" and importlib.util.find_spec("vllm"):
        yield "vllm", vllm_layer(weights, shape)


def reference_layer(weights: Weights, shape: Shape, x_TD: torch.Tensor, logits_TE: torch.Tensor) -> torch.Tensor:
    """The layer in float32, expert by expert."""
    weights_TK, ids_TK = torch_routing(logits_TE, shape.top_k)
    out_TD = torch.zeros(x_TD.shape, device=x_TD.device)
    for e in ids_TK.unique().tolist():
        rows, slots = (ids_TK == e).nonzero(as_tuple=True)
        x = x_TD[rows].float()
        h = F.silu(x @ weights.gate_EFD[e].float().T) * (x @ weights.up_EFD[e].float().T)
        out_TD.index_add_(0, rows, weights_TK[rows, slots, None] * (h @ weights.down_EDF[e].float().T))
    return out_TD


def run_shape(
    name: str,
    token_counts: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    limits: Limits,
    *,
    only: Sequence[str] = (),
    repetitions: int = 20,
    deadline: float = float("inf"),
    prepare: Callable[[Weights], None] | None = None,
) -> list[Measurement]:
    """Measure every contender on one shape. A wrong result is reported and not timed.

    Arguments:
        deadline: ``time.monotonic()`` after which nothing new is started.
        prepare: called with the weights before anything is timed (tuning).
    """
    shape = SHAPES[name]
    weights = Weights.random(shape, device, dtype)
    if prepare is not None:
        prepare(weights)
    results = []
    for contender, layer in contenders(weights, shape, device, dtype):
        if only and contender not in only:
            continue
        for tokens in token_counts:
            if time.monotonic() > deadline:
                return results
            torch.manual_seed(tokens)
            x_TD = torch.randn(tokens, shape.hidden_size, device=device).to(dtype)
            logits_TE = torch.randn(tokens, shape.num_experts, device=device)
            with torch.inference_mode():
                out_TD = layer(x_TD, logits_TE)
                sample = slice(None, None, max(1, tokens // 64))
                expected_TD = reference_layer(weights, shape, x_TD[sample], logits_TE[sample])
                error = ((out_TD[sample].float() - expected_TD).norm() / expected_TD.norm()).item()
                if not error < (2e-2 if dtype != torch.float32 else 1e-4):
                    print(f"  {contender} at {tokens} tokens is wrong: relative error {error:.1e}")
                    continue
                plain = functools.partial(layer, x_TD, logits_TE)
                replay = None if contender in _WAITING else captured(plain, device)
                times = time_calls(replay or plain, device, repetitions)
            hit = torch_routing(logits_TE, shape.top_k)[1].unique().numel()
            size = dtype.itemsize
            moved = hit * shape.expert_numbers * size + 2 * tokens * shape.hidden_size * size
            operations = 2 * tokens * shape.top_k * shape.expert_numbers
            floor = max(moved / limits.bandwidth, operations / limits.flops)
            results.append(
                Measurement(
                    shape=name,
                    tokens=tokens,
                    name=contender,
                    seconds=times[0],
                    fastest=times[1],
                    slowest=times[2],
                    bytes_per_second=moved / times[0],
                    flops_per_second=operations / times[0],
                    fraction=floor / times[0],
                    captured=replay is not None,
                )
            )
            print_measurement(results[-1])
    return results


def print_header() -> None:
    columns = f"{'shape':17} {'implementation':24} {'tokens':>6} {'µs':>10} {'min to max':>21}"
    print(f"{columns} {'GB/s':>8} {'TFLOP/s':>8} limit graph")


def print_measurement(m: Measurement) -> None:
    spread = f"{m.fastest * 1e6:.1f} to {m.slowest * 1e6:.1f}"
    rates = f"{m.bytes_per_second / 1e9:8.1f} {m.flops_per_second / 1e12:8.2f}"
    line = f"{m.shape:17} {m.name:24} {m.tokens:6} {m.seconds * 1e6:10.1f} {spread:>21} {rates}"
    print(f"{line} {m.fraction:5.0%} {'yes' if m.captured else 'no'}", flush=True)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[s for s in SHAPES if s != "tiny"])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", default=(), help="names of implementations")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the measurements here")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    results: list[Measurement] = []
    for name in options.shapes:
        limits = measure_limits(device, dtype)
        print(f"limits: {limits.bandwidth / 1e9:.0f} GB/s, {limits.flops / 1e12:.2f} TFLOP/s in {options.dtype}")
        print_header()
        results += run_shape(
            name, options.tokens, device, dtype, limits, only=options.only, repetitions=options.repetitions
        )
    if options.json:
        write(options.json, [asdict(m) for m in results])


if __name__ == "__main__":
    main()
