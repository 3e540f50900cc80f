"""How far a kernel's result may lie from the oracle's: the one table, for tests and benchmarks alike."""

from __future__ import annotations

import torch

# Share of the largest value. A result carries one rounding of its own and those of what lies between two products; in
# float32 the order of the sums. The oracle runs on the same (rounded) inputs in float32 or float64.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def error(ours: torch.Tensor, oracle: torch.Tensor) -> float:
    """Largest difference as a share of the oracle's largest value; NaN if there is one in either."""
    difference = (ours.double() - oracle.double()).abs().max()
    return (difference / oracle.double().abs().max().clamp(min=1e-6)).item()
