"""Configurations by a cost model, refined by measurements that are kept on disk.

The model ranks every candidate from the shape and the device's limits, so there is always a considered choice, also on
a device and a shape that nobody has tuned. ``refine`` measures the best of its list; the winner is kept per device and
kernel version, in a file that can be shipped in ``kernels/tuned``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import TypeVar

import triton

from .attention import AttentionConfig
from .device import DeviceProperties
from .gemv import GemvConfig
from .grouped_gemm import GemmConfig
from .launch import cdiv, next_power_of_2

Config = TypeVar("Config")

_LATENCY = 1.0e-6  # seconds from a load to its data under load
_STEP = 6.0e-8  # seconds of barriers per step along the depth
_L2_FACTOR = 2.3  # bandwidth of the L2 cache over that of the memory
_LAUNCH = 2.0e-6  # seconds that one more launch costs inside a graph


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """Sizes of a mixture: experts E, choices K, hidden size D, width of an expert F, bytes per weight."""

    num_experts: int
    top_k: int
    hidden_size: int
    expert_size: int
    weight_bytes: float = 2.0

    @property
    def bytes_per_expert(self) -> float:
        return 3 * self.hidden_size * self.expert_size * self.weight_bytes


@dataclass(frozen=True, kw_only=True)
class PathChoice:
    """How a mixture runs: over (token, expert) pairs, or over tiles of ``block_m`` rows."""

    pairs: bool
    block_m: int


def experts_hit(num_tokens: int, num_experts: int, top_k: int) -> float:
    """Expected number of distinct experts that so many tokens choose, each K at random."""
    return num_experts * (1.0 - (1.0 - top_k / num_experts) ** num_tokens)


def prefers_pairs(num_tokens: int, shape: ExpertShape, device: DeviceProperties) -> bool:
    """Whether reading weights once per (token, expert) pair beats sorting and reading each expert once."""
    pairs = num_tokens * shape.top_k
    if num_tokens > 16 or pairs > 256:
        return False
    hit = experts_hit(num_tokens, shape.num_experts, shape.top_k)
    pair_time = pairs * shape.bytes_per_expert / (0.90 * device.bandwidth)
    tile_time = hit * shape.bytes_per_expert / (0.80 * device.bandwidth) + 2 * _LAUNCH
    return pair_time <= tile_time


def row_tile(num_tokens: int, num_experts: int, top_k: int) -> int:
    """Rows per tile: one tile should hold an expert's rows with some slack for imbalance, up to 128."""
    rows = num_tokens * top_k / max(experts_hit(num_tokens, num_experts, top_k), 1.0)
    likely_most = rows + 2.0 * math.sqrt(rows)
    if rows >= 64:
        return 128
    return min(64, max(16, next_power_of_2(math.ceil(likely_most))))


@dataclass(frozen=True, kw_only=True)
class GemmProblem:
    """One grouped GEMM: slots, experts that have rows, outputs n, depth k, matrices read together (gate and up: 2)."""

    slots: int
    hit: float
    n: int
    k: int
    matrices: int
    block_m: int
    element_bytes: int = 2


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


def shared_bytes(problem: GemmProblem, config: GemmConfig, device: DeviceProperties) -> int:
    """Shared memory of the pipelined operand tiles, and of the epilogue that reuses it."""
    stage = (config.block_m + problem.matrices * config.block_n) * config.block_k * problem.element_bytes
    buffers = config.num_stages if device.has_tma else max(1, config.num_stages - 1)
    epilogue = config.block_m * config.block_n * 4
    return max(stage * buffers + 1024, epilogue)


def gemm_time(problem: GemmProblem, config: GemmConfig, device: DeviceProperties) -> float:
    """Estimated seconds: waves of tiles, each bound by arithmetic or by its share of the bandwidth."""
    rows = problem.slots / max(problem.hit, 1.0)
    row_tiles = problem.hit * math.ceil(rows / config.block_m)
    tiles = row_tiles * cdiv(problem.n, config.block_n)
    shared = shared_bytes(problem, config, device)
    by_registers = 65536 // (_registers(problem, config, device) * config.num_warps * 32)
    resident = max(1, min(device.shared_bytes // shared, by_registers, 8))
    depth = cdiv(problem.k, config.block_k) * config.block_k
    width = config.block_n * problem.matrices
    reuse = config.block_m * width / (config.block_m + width)
    stage_bytes = (config.block_m + width) * config.block_k * 2
    # Hopper's products read the tile before the last while they run, so one more buffer is not free for a load.
    ahead = max(0.5, config.num_stages - (2 if device.has_tma else 1))
    in_flight = resident * stage_bytes * ahead
    arithmetic_rate = device.flops / device.num_sms * 0.75 * min(1.0, reuse / 80.0) * min(1.0, 0.6 + 0.2 * ahead)
    arithmetic = 2.0 * config.block_m * width * depth / arithmetic_rate
    bandwidth = device.bandwidth / device.num_sms
    fed = min(1.0, in_flight / (bandwidth * 2 * _LATENCY))
    # Row tiles of one expert share its weights through L2; only the first pays for device memory.
    fresh = width * depth * 2 / max(1.0, math.ceil(rows / config.block_m))
    # Rows of a tile shorter than a 128-byte line waste part of every transfer.
    line = 0.92 if config.block_k * 2 >= 128 else 0.75
    memory = (fresh + 0.3 * config.block_m * depth * 2) / (bandwidth * fed * line)
    through_l2 = (config.block_m + width) * depth * 2 / (_L2_FACTOR * bandwidth * fed)
    steps = depth / config.block_k * _STEP / math.sqrt(resident)
    waves = tiles / (device.num_sms * resident)
    # A long queue of tiles hides the ragged end; a short one pays for whole waves.
    waves = math.ceil(waves) if waves < 4 else waves + 0.5
    startup = (2.0 if resident == 1 else 1.0) * _LATENCY
    return waves * (resident * max(arithmetic, memory, through_l2) + steps + startup)


def _registers(problem: GemmProblem, config: GemmConfig, device: DeviceProperties) -> int:
    sums = problem.block_m * config.block_n * problem.matrices // (config.num_warps * device.warp_size)
    return min(255, sums + (64 if device.has_tma else 96))


def best_gemms(problem: GemmProblem, device: DeviceProperties, tma_possible: bool, count: int = 1) -> list[GemmConfig]:
    """The best ``count`` tilings by estimated time, persistent where tiles outnumber what the device holds."""
    candidates = gemm_candidates(problem, device, tma_possible)
    candidates.sort(key=lambda config: gemm_time(problem, config, device))
    if problem.block_m < 64:
        return candidates[:count]
    persistent = []
    for config in candidates[:count]:
        shared = shared_bytes(problem, config, device)
        by_registers = 65536 // (_registers(problem, config, device) * config.num_warps * 32)
        resident = max(1, min(device.shared_bytes // shared, by_registers))
        persistent.append(replace(config, programs=device.num_sms * resident))
    return persistent


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


def best_attention(
    max_query_len: int,
    max_context_len: int,
    programs_per_tile: int,
    heads: int,
    head_dim: int,
    device: DeviceProperties,
    narrow: bool = False,
) -> AttentionConfig:
    """Tiling of attention.

    Arguments:
        programs_per_tile: sequences times key/value heads. heads: query heads per key/value head.
        narrow: keys and values are kept in 8 bits: half the bytes per stage, and registers to widen them in.
    """
    wide_head = head_dim > 128
    if max_query_len * heads <= 64:
        block_q = max(1, next_power_of_2(max_query_len))
        programs = programs_per_tile * cdiv(max_query_len, block_q)
        block_l = 32 if wide_head or device.backend == "hip" else 64
        splits = min(cdiv(max_context_len, 4 * block_l), cdiv(2 * device.num_sms, programs), 64)
        # Powers of two keep the number of compiled variants small.
        splits = next_power_of_2(splits + 1) // 2 if splits > 1 else 1
        stages = 3 if narrow and device.has_tma else 2
        return AttentionConfig(block_q=block_q, block_l=block_l, splits=splits, num_warps=4, num_stages=stages)
    # Ampere multiplies out of registers.
    crowded = wide_head or (narrow and not device.has_tma and device.backend == "cuda")
    rows = 64 if crowded else 128
    return AttentionConfig(
        block_q=max(1, rows // next_power_of_2(heads)),
        block_l=32 if crowded or device.backend == "hip" else 64,
        splits=1,
        num_warps=8 if rows == 128 else 4,
        num_stages=2,
    )


@cache
def kernel_version() -> str:
    """Names the kernels and the compiler: measurements of other kernels are not used."""
    digest = hashlib.sha256(triton.__version__.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class TuningCache:
    """Measured configurations of one device, read from files and written to one.

    Arguments:
        device_name: as the driver reports it.
        directory: where measurements are kept; ``DYNAMOE_CACHE`` or ``~/.cache/dynamoe`` if not given.
        shipped: directory of files that came with the package, read first and never written.
        version: of the kernels; files of another version are ignored.
    """

    def __init__(
        self,
        device_name: str,
        directory: Path | None = None,
        shipped: Path | None = None,
        version: str | None = None,
    ) -> None:
        root = Path(os.environ.get("DYNAMOE_CACHE") or Path.home() / ".cache" / "dynamoe")
        slug = "".join(c if c.isalnum() else "-" for c in device_name).strip("-").lower()
        self.version = version or kernel_version()
        self.path = (directory or root / "tuning") / f"{slug}.json"
        self._entries: dict[str, dict] = {}
        for path in ((shipped or Path(__file__).parent / "tuned") / f"{slug}.json", self.path):
            self._entries.update(self._read(path))

    def _read(self, path: Path) -> dict[str, dict]:
        if not path.is_file():
            return {}
        try:
            stored = json.loads(path.read_text())
        except ValueError:
            return {}  # a file cut short by a crash only means that tuning starts over
        return stored["entries"] if stored.get("version") == self.version else {}

    def get(self, key: str, kind: type) -> object | None:
        """The configuration measured for ``key``, as a ``kind``, or None."""
        entry = self._entries.get(key)
        if entry is None or set(entry) != {f.name for f in fields(kind)}:
            return None
        return kind(**entry)

    def put(self, key: str, config: object) -> None:
        """Remember a configuration and write the file; other processes' entries in it survive."""
        self._entries[key] = asdict(config)  # type: ignore[call-overload]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entries = {**self._read(self.path), **self._entries}
        self._entries = entries
        scratch = self.path.with_suffix(f".{os.getpid()}.tmp")
        scratch.write_text(json.dumps({"version": self.version, "entries": entries}, indent=1, sort_keys=True))
        scratch.replace(self.path)


def token_bucket(num_tokens: int) -> int:
    """Token counts that share a configuration: the next power of two."""
    return next_power_of_2(num_tokens)


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
