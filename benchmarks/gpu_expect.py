"""How near to the oracle a result on a GPU must be: for large shapes and a GPU's own order of sums, unlike
``kernels/api/tolerance.py``."""

from __future__ import annotations

import torch

# Norm of the error over the result's.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the whole tensor; NaN if there is one in it."""
    return ((ours.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def expect(ours: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    """Raise AssertionError when a result is off (NaN is)."""
    error = relative_error(ours, expected)
    assert error < TOLERANCE[dtype], f"{what}: relative error {error:.1e}"
