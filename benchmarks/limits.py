"""What this machine can do: reading memory, and torch's matrix product. Limits for the CPU benchmarks.

Machines of this kind drift by a factor of two within hours, so a benchmark probes the limits between its measurements
and reports ratios. A probe takes a few milliseconds, so that on a busy machine some of them run undisturbed.
Run it alone to see the figures: ``python benchmarks/limits.py [--threads N] [--rounds N]``.
"""

import statistics
import time

import torch
from benchmark import command_line
from dynamoe.kernels.cpu import build as cpu_build


class Limits:
    """Probes that share their buffers.

    Arguments:
        megabytes: size of the memory that is read in turns; several times the last-level cache.
        probe_megabytes: how much of it one probe reads.
        gemm_size: rows, columns and depth of the matrix product.
    """

    def __init__(self, megabytes: int = 512, probe_megabytes: int = 64, gemm_size: int = 1024) -> None:
        cpu_build.load()
        words = torch.ops.dynamoe_cpu.allocate(megabytes * 2**18)
        words.fill_(1)
        self._parts = words.split(probe_megabytes * 2**18)
        self._next = 0
        self._factors = [torch.randn(2, gemm_size, gemm_size).to(dtype) for dtype in (torch.bfloat16, torch.float32)]

    def read_bandwidth(self) -> float:
        """Bytes per second of reading memory that no cache holds, with all threads."""
        part = self._parts[self._next]
        self._next = (self._next + 1) % len(self._parts)
        start = time.perf_counter()
        torch.ops.dynamoe_cpu.read_words(part)
        return part.nbytes / (time.perf_counter() - start)

    def gemm_rate(self) -> float:
        """Floating-point operations per second of torch's matrix product, in bf16 or fp32, whichever is faster here:
        not every processor with a bf16 dot product has a fast one, and bf16 can be widened."""
        best = float("inf")
        for a, b in self._factors:
            start = time.perf_counter()
            torch.mm(a, b)
            best = min(best, time.perf_counter() - start)
        return 2 * self._factors[0].shape[-1] ** 3 / best


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    limits = Limits()
    for name, probe, unit in (
        ("reading memory", limits.read_bandwidth, "GB/s"),
        ("matrix product", limits.gemm_rate, "GFLOP/s"),
    ):
        values = [probe() / 1e9 for _ in range(arguments.rounds + 1)][1:]
        print(f"{name}: median {statistics.median(values):.1f} [{min(values):.1f}-{max(values):.1f}] {unit}")


if __name__ == "__main__":
    main()
