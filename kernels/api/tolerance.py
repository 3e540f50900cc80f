"""How far a kernel's result may lie from the oracle's: the one table, for tests and benchmarks alike."""

from __future__ import annotations

import torch

# Share of the largest value. A result carries one rounding of its own and those of what lies between two products; in
# float32 the order of the sums. The oracle runs on the same (rounded) inputs in float32 or float64.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}

# Products with quantised weights, by how rows are rounded and by the model's dtype; the oracle is the format's own, in
# float32. Where rows are rounded, ties may go the other way, and hidden rows that are one rounding apart differ by a
# step here and there: 1/127 of the largest value (int8), 1/16 of the value itself (fp8).
QUANTIZED_TOLERANCE = {
    ("none", torch.float32): 8e-6,
    ("none", torch.float16): 2e-3,
    ("none", torch.bfloat16): 1.6e-2,
    ("int8", torch.float32): 1e-2,
    ("int8", torch.float16): 1e-2,
    ("int8", torch.bfloat16): 1.6e-2,
    ("fp8", torch.float32): 2e-2,
    ("fp8", torch.float16): 2e-2,
    ("fp8", torch.bfloat16): 3e-2,
}


def error(ours: torch.Tensor, oracle: torch.Tensor) -> float:
    """Largest difference as a share of the oracle's largest value; NaN if there is one in either."""
    difference = (ours.double() - oracle.double()).abs().max()
    return (difference / oracle.double().abs().max().clamp(min=1e-6)).item()
