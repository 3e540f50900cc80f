"""Tilings of products with quantised weights: one by rule, and others that tuning measures beside it.

The rule is made so that tilings compile without spills, which ``aot.py`` reports on (docs/kernels.md says for what it
was run); a cost model cannot promise that, as formats differ in the registers that their codes are cut out in. Of the
others it says which are worth measuring.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..api.formats import ActivationScheme
from .device import DeviceProperties
from .launch import cdiv, next_power_of_2
from .quantized import QuantConfig
from .stored_weight import WeightKind
from .tuning import GemmProblem, gemm_time, shared_bytes

FEW_ROWS = 32  # of a tile: from more on, tiles have 64 rows
_MOST_SPLITS = 8
_LEAST_STEPS = 4  # along the depth, of a part
_LAUNCH = 2.0e-6  # seconds that one more launch costs inside a graph


@dataclass(frozen=True, kw_only=True)
class QuantGemm(GemmProblem):
    """A product with quantised weights; ``scheme`` says how rows were rounded."""

    kind: WeightKind
    scheme: ActivationScheme

    @property
    def deepest(self) -> int:
        """Inputs that share their scales, both of weights and of rows; 0: all."""
        return min((group for group in (self.kind.group, self.scheme.group) if group), default=0)


def row_tile(rows: int) -> int:
    """Rows of a tile, where one holds about so many."""
    return 64 if rows > FEW_ROWS else 16


def quant_config(problem: QuantGemm, device: DeviceProperties) -> QuantConfig:
    """The tiling by rule; a tile is never deeper than a group, which then has one scale for it."""
    kind, scheme, gated = problem.kind, problem.scheme, problem.matrices > 1
    many = problem.block_m > FEW_ROWS
    # Sums of integers come to float32 with every step, so that long steps pay; but two more factors need registers.
    block_k = scheme.group if scheme.kind == "int8" and not kind.group else min(64, kind.group or 64)
    assert block_k is not None
    # A step along K that is scaled before it is added needs a second set of accumulators.
    block_n = 32 if (kind.group or scheme.group) and gated else 64
    # Cutting codes of 5 bits out of their bytes takes registers as well.
    num_warps = 8 if many and ((gated and scheme.kind != "int8") or kind.format == "int5") else 4
    if not many and gated and kind.group and kind.bits == 4 and scheme.kind == "none":
        block_k = min(32, block_k)  # longer ones put 8 bytes on the stack on sm_90
    if many and gated and kind.outer_group and device.backend == "hip":
        # Two levels of scales of two matrices: AMD's compiler takes all registers for a tile of 32 outputs.
        block_n, num_warps = 16, 4
    config = QuantConfig(
        block_m=problem.block_m,
        block_n=block_n,
        block_k=block_k,
        num_warps=num_warps,
        num_stages=4 if scheme.kind == "fp8" and not many else 3,
        tma=many and device.has_tma and kind.tma(problem.k),
    )
    return replace(config, splits=most_splits(problem, config, device))


def most_splits(problem: QuantGemm, config: QuantConfig, device: DeviceProperties) -> int:
    """Parts of the depth that few tiles fill the device with; a power of two."""
    if problem.block_m > FEW_ROWS:
        return 1
    row_tiles = max(problem.hit, problem.slots / problem.block_m)
    tiles, steps = row_tiles * cdiv(problem.n, config.block_n), cdiv(problem.k, config.block_k)
    splits = int(min(device.num_sms / tiles, steps / _LEAST_STEPS, _MOST_SPLITS))
    return next_power_of_2(splits + 1) // 2 if splits > 1 else 1


def quant_tilings(problem: QuantGemm, device: DeviceProperties, count: int) -> list[QuantConfig]:
    """The rule's tiling, then the best others by estimated time: ``count`` in all."""
    first = quant_config(problem, device)
    if count == 1:
        return [first]
    others = [config for config in _candidates(problem, device) if config != first]
    others.sort(key=lambda config: _seconds(problem, config, device))
    return [first, *others[: count - 1]]


def _candidates(problem: QuantGemm, device: DeviceProperties) -> Iterator[QuantConfig]:
    many, deepest = problem.block_m > FEW_ROWS, problem.deepest or 128
    tma = device.has_tma and problem.kind.tma(problem.k)
    for block_n in (32, 64, 128):
        for block_k in (16, 32, 64, 128):
            if block_n > max(32, next_power_of_2(problem.n)) or block_k > deepest or deepest % block_k:
                continue
            if block_k < min(32, deepest) or block_k > max(32, next_power_of_2(problem.k)):
                continue
            for num_warps in (4, 8):
                for num_stages in (3, 4) if device.backend == "cuda" else (2, 3):
                    plain = QuantConfig(
                        block_m=problem.block_m,
                        block_n=block_n,
                        block_k=block_k,
                        num_warps=num_warps,
                        num_stages=num_stages,
                    )
                    if not _fits(problem, plain, device):
                        continue
                    yield plain
                    if tma:
                        yield replace(plain, tma=True)
                    # Weights on the left go from registers into products, but those want 64 of them.
                    if device.has_tma and not many and block_n >= 64:
                        yield replace(plain, swap=True)
                    for splits in (2, 4, 8):
                        if splits <= most_splits(problem, plain, device):
                            yield replace(plain, splits=splits)


def _fits(problem: QuantGemm, config: QuantConfig, device: DeviceProperties) -> bool:
    """Whether sums and widened weights fit into registers, and all tiles into shared memory."""
    threads = config.num_warps * device.warp_size
    sums = problem.matrices * problem.block_m * config.block_n * (2 if problem.deepest else 1) / threads
    widened = config.block_n * config.block_k / threads
    if sums > (128 if device.has_tma else 64) or widened > 64:
        return False
    return shared_bytes(problem, config, device) <= device.shared_bytes


def _seconds(problem: QuantGemm, config: QuantConfig, device: DeviceProperties) -> float:
    """Parts of the depth are further columns, as far as programs see."""
    splits = config.splits
    part = replace(problem, n=problem.n * splits, k=cdiv(problem.k, splits))
    seconds = gemm_time(part, config, device)
    if splits == 1:
        return seconds
    moved = 2 * splits * problem.matrices * problem.slots * problem.n * 4
    return seconds + moved / device.bandwidth + _LAUNCH
