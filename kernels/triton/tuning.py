"""Configurations by a cost model, refined by measurements that are kept on disk.

The model ranks every candidate from the shape and the device's limits, so there is always a considered choice, also on
a device and a shape that nobody has tuned. ``refine`` measures the best of its list; the winner is kept per device and
kernel version, in a file that can be shipped in ``kernels/tuned``.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import triton

from .device import DeviceProperties
from .gemv import GemvConfig
from .grouped_gemm import GemmConfig, TileConfig
from .launch import cdiv, next_power_of_2

Config = TypeVar("Config")

_LATENCY = 1.0e-6  # seconds from a load to its data under load
_STEP = 6.0e-8  # seconds of barriers per step along the depth
_L2_FACTOR = 2.3  # bandwidth of the L2 cache over that of the memory


def experts_hit(num_tokens: int, num_experts: int, top_k: int) -> float:
    """Expected number of distinct experts that so many tokens choose, each K at random."""
    return num_experts * (1.0 - (1.0 - top_k / num_experts) ** num_tokens)


def row_tile(num_tokens: int, num_experts: int, top_k: int) -> int:
    """Rows per tile: one tile should hold an expert's rows with some slack for imbalance, up to 128."""
    rows = num_tokens * top_k / max(experts_hit(num_tokens, num_experts, top_k), 1.0)
    likely_most = rows + 2.0 * math.sqrt(rows)
    if rows >= 64:
        return 128
    return min(64, max(16, next_power_of_2(math.ceil(likely_most))))


@dataclass(frozen=True, kw_only=True)
class GemmProblem:
    """One grouped GEMM: slots, experts that have rows, outputs n, depth k, matrices read together (gate and up: 2), and
    the bytes of a row's element and of a weight."""

    slots: int
    hit: float
    n: int
    k: int
    matrices: int
    block_m: int
    element_bytes: int = 2
    weight_bytes: float = 2


def gemm_candidates(problem: GemmProblem, device: DeviceProperties, tma_possible: bool) -> list[GemmConfig]:
    """Every tiling that fits the device."""
    found = []
    wide = problem.block_m >= 64
    swap = device.has_tma and not wide
    narrowest = 64 if swap else 32
    for block_n in (32, 64, 128, 256):
        if block_n > max(narrowest, next_power_of_2(problem.n)) or block_n < narrowest:
            continue
        if block_n > 128 and device.backend == "cuda" and not device.has_tma:
            continue  # Ampere's products hold both operands in registers
        for block_k in (32, 64, 128):
            if block_k > max(32, next_power_of_2(problem.k)):
                continue
            for num_warps in (4, 8):
                if not _fits_registers(problem, block_n, num_warps, device):
                    continue
                for num_stages in (3, 4, 5) if device.backend == "cuda" else (2, 3):
                    config = GemmConfig(
                        block_m=problem.block_m,
                        block_n=block_n,
                        block_k=block_k,
                        num_warps=num_warps,
                        num_stages=num_stages,
                        swap=swap,
                        tma=tma_possible and device.has_tma and wide,
                    )
                    if shared_bytes(problem, config, device) <= device.shared_bytes:
                        found.append(config)
    return found


def _fits_registers(problem: GemmProblem, block_n: int, num_warps: int, device: DeviceProperties) -> bool:
    accumulators = problem.block_m * block_n * problem.matrices / (num_warps * device.warp_size)
    # Ampere multiplies out of registers, so its operands need room beside the sums.
    most = 128 if device.has_tma else 64
    return accumulators <= most and (num_warps == 4 or problem.block_m * block_n >= 4096)


def shared_bytes(problem: GemmProblem, config: TileConfig, device: DeviceProperties) -> int:
    """Shared memory of the pipelined operand tiles, and of the epilogue that reuses it."""
    weights = problem.matrices * config.block_n * problem.weight_bytes
    stage = math.ceil((config.block_m * problem.element_bytes + weights) * config.block_k)
    buffers = config.num_stages if device.has_tma else max(1, config.num_stages - 1)
    epilogue = config.block_m * config.block_n * 4
    return max(stage * buffers + 1024, epilogue)


def gemm_time(problem: GemmProblem, config: TileConfig, device: DeviceProperties) -> float:
    """Estimated seconds: waves of tiles, each bound by arithmetic or by its share of the bandwidth."""
    rows = problem.slots / max(problem.hit, 1.0)
    row_tiles = problem.hit * math.ceil(rows / config.block_m)
    tiles = row_tiles * cdiv(problem.n, config.block_n)
    resident = min(_resident(problem, config, device), 8)
    depth = cdiv(problem.k, config.block_k) * config.block_k
    width = config.block_n * problem.matrices
    reuse = config.block_m * width / (config.block_m + width)
    element, size = problem.element_bytes, problem.weight_bytes
    stage_bytes = (config.block_m * element + width * size) * config.block_k
    # Hopper's products read the tile before the last while they run, so one more buffer is not free for a load.
    ahead = max(0.5, config.num_stages - (2 if device.has_tma else 1))
    in_flight = resident * stage_bytes * ahead
    arithmetic_rate = device.flops / device.num_sms * 0.75 * min(1.0, reuse / 80.0) * min(1.0, 0.6 + 0.2 * ahead)
    arithmetic = 2.0 * config.block_m * width * depth / arithmetic_rate
    bandwidth = device.bandwidth / device.num_sms
    fed = min(1.0, in_flight / (bandwidth * 2 * _LATENCY))
    # Row tiles of one expert share its weights through L2; only the first pays for device memory.
    fresh = width * depth * size / max(1.0, math.ceil(rows / config.block_m))
    # Rows of a tile shorter than a 128-byte line waste part of every transfer.
    line = 0.92 if config.block_k * size >= 128 else 0.75
    memory = (fresh + 0.3 * config.block_m * depth * element) / (bandwidth * fed * line)
    through_l2 = (config.block_m * element + width * size) * depth / (_L2_FACTOR * bandwidth * fed)
    steps = depth / config.block_k * _STEP / math.sqrt(resident)
    waves = tiles / (device.num_sms * resident)
    # A long queue of tiles hides the ragged end; a short one pays for whole waves.
    waves = math.ceil(waves) if waves < 4 else waves + 0.5
    startup = (2.0 if resident == 1 else 1.0) * _LATENCY
    return waves * (resident * max(arithmetic, memory, through_l2) + steps + startup)


def _resident(problem: GemmProblem, config: TileConfig, device: DeviceProperties) -> int:
    """Programs that a multiprocessor holds at once."""
    sums = problem.block_m * config.block_n * problem.matrices // (config.num_warps * device.warp_size)
    registers = min(255, sums + (64 if device.has_tma else 96))
    by_registers = 65536 // (registers * config.num_warps * 32)
    return max(1, min(device.shared_bytes // shared_bytes(problem, config, device), by_registers))


def best_gemms(problem: GemmProblem, device: DeviceProperties, tma_possible: bool, count: int = 1) -> list[GemmConfig]:
    """The best ``count`` tilings by estimated time, persistent where tiles outnumber what the device holds."""
    candidates = gemm_candidates(problem, device, tma_possible)
    candidates.sort(key=lambda config: gemm_time(problem, config, device))
    if problem.block_m < 64:
        return candidates[:count]
    return [replace(c, programs=device.num_sms * _resident(problem, c, device)) for c in candidates[:count]]


def best_gemv(n: int, k: int, groups: int, matrices: int, device: DeviceProperties, together: int = 1) -> GemvConfig:
    """Tiling of a matrix-vector kernel: 16 bytes per thread and load, many loads in flight, several programs per SM.

    Arguments:
        groups: matrix-vector products side by side (pairs for gate and up, rows for down).
        together: products that one program fetches for at once (the experts of a row for down).
    """
    best, best_cost = None, math.inf
    for block_k in (64, 128, 256, 512, 1024, 2048):
        if block_k > next_power_of_2(k):
            continue
        for block_n in (1, 2, 4, 8, 16):
            for num_warps in (2, 4, 8):
                per_thread = block_n * block_k / (num_warps * device.warp_size)
                # What is fetched at once must also find room in the registers; AMD's compiler starts every load of an
                # unrolled loop before the first product.
                unrolled = 32 if device.warp_size == 32 else 16
                if not 8 <= per_thread <= (unrolled if together > 1 else 64 / matrices):
                    continue
                programs = groups * cdiv(n, block_n)
                waste = cdiv(k, block_k) * block_k / k * cdiv(n, block_n) * block_n / n
                resident = min(2048 // (num_warps * 32), cdiv(programs, device.num_sms), 16)
                steps = min(together * cdiv(k, block_k), 8) if together > 1 else 1
                in_flight = resident * block_n * min(block_k, k) * 2 * matrices * steps
                fed = min(1.0, in_flight / (device.bandwidth / device.num_sms * 2 * _LATENCY))
                waves = max(1.0, programs / (device.num_sms * resident))
                tail = math.ceil(waves) / waves if waves < 4 else 1.05
                # Small loops pay the latency per step; a whole row at once pays it once.
                cost = waste / fed * tail * (1.0 + 0.02 * cdiv(k, block_k))
                if cost < best_cost:
                    best = GemvConfig(block_n=block_n, block_k=block_k, num_warps=num_warps)
                    best_cost = cost
    return best or GemvConfig(block_n=4, block_k=min(256, max(16, next_power_of_2(k))), num_warps=2)


def kernel_version(kernels: Sequence[Any]) -> str:
    """A hash of the source of kernels, of all that they call or read, and of the compiler."""
    digest = hashlib.sha256(triton.__version__.encode())
    for source in _sources(kernels, set()):
        digest.update(source.encode())
    return digest.hexdigest()[:12]


def _sources(kernels: Sequence[Any], seen: set[Any]) -> Iterator[str]:
    for function in (kernel.fn for kernel in kernels):
        if function in seen:
            continue
        seen.add(function)
        yield inspect.getsource(function)
        names = inspect.getclosurevars(function)
        for name, value in sorted({**names.nonlocals, **names.globals}.items()):
            if hasattr(value, "fn"):
                yield from _sources([value], seen)
            elif not inspect.ismodule(value):
                yield f"{name} = {value!r}"


class TuningCache:
    """Measured configurations of one device, read from files and written to one.

    Arguments:
        device_name: as the driver reports it.
        directory: where measurements are kept; ``DYNAMOE_CACHE`` or ``~/.cache/dynamoe`` if not given.
        shipped: directory of files that came with the package, read first and never written.
    """

    def __init__(self, device_name: str, directory: Path | None = None, shipped: Path | None = None) -> None:
        root = Path(os.environ.get("DYNAMOE_CACHE") or Path.home() / ".cache" / "dynamoe")
        slug = "".join(c if c.isalnum() else "-" for c in device_name).strip("-").lower()
        self.path = (directory or root / "tuning") / f"{slug}.json"
        self._entries: dict[str, dict] = {}
        for path in ((shipped or Path(__file__).parent / "tuned") / f"{slug}.json", self.path):
            self._entries.update(self._read(path))

    def _read(self, path: Path) -> dict[str, dict]:
        try:
            entries = dict(json.loads(path.read_text())["entries"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # a file cut short by a crash only means that tuning starts over
        return {key: entry for key, entry in entries.items() if isinstance(entry, dict)}

    def digest(self) -> str:
        """A hash of all measurements."""
        return hashlib.sha256(json.dumps(self._entries, sort_keys=True).encode()).hexdigest()[:16]

    def get(self, key: str) -> dict:
        """What was measured for ``key``; empty if nothing was."""
        return self._entries.get(key, {})

    def put(self, key: str, entry: dict) -> None:
        """Remember a measurement and write the file; other processes' entries in it survive."""
        self._entries = {**self._read(self.path), **self._entries, key: entry}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(f".{os.getpid()}.tmp")
        scratch.write_text(json.dumps({"entries": self._entries}, indent=1, sort_keys=True))
        scratch.replace(self.path)


def refine(candidates: Iterable[Config], measure: Callable[[Config], float]) -> tuple[Config, float]:
    """The candidate with the smallest measured time. One that the compiler or the device refuses is passed over.

    Raises:
        RuntimeError: when every candidate failed; the last failure is its cause.
    """
    best: tuple[Config, float] | None = None
    failure: Exception | None = None
    for config in candidates:
        try:
            seconds = measure(config)
        except (RuntimeError, triton.TritonError) as error:
            failure = error
            continue
        if best is None or seconds < best[1]:
            best = (config, seconds)
    if best is None:
        raise RuntimeError("no configuration could be measured") from failure
    return best
