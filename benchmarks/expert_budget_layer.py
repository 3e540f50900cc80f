"""What a cap on the experts saves in one layer on a CPU: ``python benchmarks/expert_budget_layer.py``.

Times the experts of a layer with random weights and random routing, all rows capped alike; best of several rounds,
rounds of all caps taking turns. Written to ``results/expert_budget_layer.json``.
"""

import time

import torch
from benchmark import command_line, surroundings, write
from dynamoe.kernels.api.router_spec import RouterSpec
from dynamoe.kernels.cpu.backend import CpuBackend

ROUTINGS = 24  # different ones, so that no cache holds the experts of the next


def measure(dtype: torch.dtype, rows: int, caps: list[int], shape: tuple[int, int, int, int]) -> dict[str, float]:
    """Seconds per call by cap.

    Arguments:
        shape: experts, experts per token, hidden size, width of an expert.
    """
    num_experts, top_k, hidden, width = shape
    backend, generator = CpuBackend("cpu", dtype), torch.Generator().manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator) * 0.02

    gate, up, down = (random(num_experts, *sizes) for sizes in ((width, hidden), (width, hidden), (hidden, width)))
    weights, x_TD = backend.pack_experts(gate, up, down, "silu"), random(rows, hidden).to(dtype)
    rule = RouterSpec(num_experts=num_experts, top_k=top_k)
    routings = [backend.route(random(rows, num_experts), rule) for _ in range(ROUTINGS)]
    limited = {
        cap: [
            backend.limit_experts(r, None, torch.ones(rows), torch.full((rows,), cap, dtype=torch.int32))
            for r in routings
        ]
        for cap in caps
    }
    best = dict.fromkeys(caps, float("inf"))
    for _ in range(7):
        for cap, every in limited.items():
            started = time.perf_counter()
            for routing in every:
                backend.experts(x_TD, weights, routing)
            best[cap] = min(best[cap], (time.perf_counter() - started) / len(every))
    return {str(cap): seconds for cap, seconds in best.items()}


def main() -> None:
    parser = command_line(__doc__, output=True)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8])
    options = parser.parse_args()
    shape = (options.experts, options.top_k, options.hidden, options.width)
    caps = sorted({options.top_k, *(max(1, options.top_k // part) for part in (2, 4, 8))}, reverse=True)
    points = []
    for name in ("float32", "bfloat16"):
        for rows in options.rows:
            seconds = measure(getattr(torch, name), rows, caps, shape)
            points.append({"dtype": name, "rows": rows, "seconds_by_cap": seconds})
            shares = {cap: f"{value / seconds[str(options.top_k)]:.2f}" for cap, value in seconds.items()}
            print(f"{name:9} {rows:3} rows: {1e6 * seconds[str(options.top_k)]:.0f} µs, in relation to it {shares}")
    result = {
        **dict(zip(("experts", "top_k", "hidden", "width"), shape, strict=True)),
        **surroundings(),
        "points": points,
    }
    write(options.output / "expert_budget_layer.json", result)


if __name__ == "__main__":
    main()
