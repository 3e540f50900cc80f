"""Plain-torch oracles of products with quantised weights: dequantise, then multiply in float32.

Shape suffixes are explained in ``types.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..api.formats import FP8_MAX, UNQUANTIZED, ActivationScheme
from ..api.quantized_weight import QuantizedWeight
from ..api.types import Routing
from . import operations as reference


def round_rows(x: torch.Tensor, scheme: ActivationScheme) -> torch.Tensor:
    """Activations as a product with this scheme sees them: rounded and scaled back, float32.

    Arguments:
        x: (…, I); every row is rounded by itself.
    """
    x32 = x.float()
    if scheme.kind == "none":
        return x32
    assert scheme.group is not None
    grouped = F.pad(x32, (0, -x32.shape[-1] % scheme.group)).unflatten(-1, (-1, scheme.group))
    largest = grouped.abs().amax(-1, keepdim=True)
    if scheme.kind == "int8":
        scale = largest / 127
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        rounded = (grouped * inverse).round().clamp(-127, 127) * scale
    else:
        scale = torch.where(largest > 0, largest / FP8_MAX, 1.0)
        rounded = (grouped / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale
    return rounded.flatten(-2)[..., : x.shape[-1]]


def linear(
    x_TI: torch.Tensor,
    weight: QuantizedWeight,
    bias_O: torch.Tensor | None = None,
    activation: ActivationScheme = UNQUANTIZED,
) -> torch.Tensor:
    """``round(x) @ dequantised weight.T + bias``, (T, O), float32."""
    return F.linear(round_rows(x_TI, activation), weight.dequantize(), None if bias_O is None else bias_O.float())


def experts(
    x_TD: torch.Tensor,
    gate_EFD: QuantizedWeight,
    up_EFD: QuantizedWeight,
    down_EDF: QuantizedWeight,
    routing: Routing,
    activation: str,
    gate_bias_EF: torch.Tensor | None = None,
    up_bias_EF: torch.Tensor | None = None,
    down_bias_ED: torch.Tensor | None = None,
    scheme: ActivationScheme = UNQUANTIZED,
) -> torch.Tensor:
    """The mixture of :func:`reference.experts` with quantised weights, (T, D), float32.

    What enters the down projection is rounded as well, for each row and expert by itself. Only experts that are used
    are dequantised.
    """

    def run_expert(expert: int, x: torch.Tensor) -> torch.Tensor:
        bias = [None if b is None else b[expert] for b in (gate_bias_EF, up_bias_EF, down_bias_ED)]
        gate = linear(x, gate_EFD.expert(expert), bias[0], scheme)
        up = linear(x, up_EFD.expert(expert), bias[1], scheme)
        return linear(reference.activate(gate, up, activation), down_EDF.expert(expert), bias[2], scheme)

    return reference.mix_experts(x_TD, routing, run_expert)


def all_on(x_TD: torch.Tensor, num_experts: int) -> Routing:
    """Every row through every expert with weight 1."""
    ids_TK = torch.arange(num_experts, dtype=torch.int32, device=x_TD.device).expand(len(x_TD), -1).contiguous()
    return Routing(expert_ids_TK=ids_TK, weights_TK=torch.ones_like(ids_TK, dtype=torch.float32))
