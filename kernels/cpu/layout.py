"""What the C++ kernels' layouts of plain and of quantised weights have in common."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..reference.operations import CLAMPED_SWIGLU

PLAIN_ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
ACTIVATIONS = (*PLAIN_ACTIVATIONS, CLAMPED_SWIGLU)
BLOCK = 32  # outputs of a block
GATED = 16  # gate outputs of a gated block; the up outputs that belong to them follow


def activation_number(activation: str) -> int:
    """What the kernels call an activation.

    Raises:
        ValueError: for one that they do not know.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS.index(activation)


def padded(bias: torch.Tensor, multiple: int) -> torch.Tensor:
    """float32, the last dimension filled up with zeros to a multiple."""
    return F.pad(bias.float(), (0, -bias.shape[-1] % multiple)).contiguous()


def join_gate_up_bias(gate_EF: torch.Tensor | None, up_EF: torch.Tensor | None) -> torch.Tensor | None:
    """Biases of gate and up in gated blocks; either may be missing."""
    present = gate_EF if gate_EF is not None else up_EF
    if present is None:
        return None
    halves = [torch.zeros_like(present) if b is None else b for b in (gate_EF, up_EF)]
    return torch.cat([padded(b, GATED).view(present.shape[0], -1, GATED) for b in halves], -1)
