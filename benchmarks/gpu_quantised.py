"""Products with quantised weights in ``gpu_check.py``: every format against the oracle, for few rows and for many."""

import time
from collections.abc import Callable
from functools import partial

import torch
from dynamoe.kernels.api import rounding
from dynamoe.kernels.api.formats import FP8_PER_GROUP, INT8_PER_GROUP, MXFP4, Q4_K, UNQUANTIZED, ActivationScheme
from dynamoe.kernels.api.quantized_weight import QuantizedWeight
from dynamoe.kernels.api.router_spec import RouterSpec
from dynamoe.kernels.reference import quantized as quant_reference
from dynamoe.kernels.torch.backend import TorchBackend
from gpu_attention import expect

Quantize = Callable[[torch.Tensor], QuantizedWeight]


def random_mxfp4(weight: torch.Tensor) -> QuantizedWeight:
    """Random codes and powers of two of the shape of a weight."""
    *lead, inputs = weight.shape
    codes = MXFP4.codes.pack(torch.randint(16, weight.shape, dtype=torch.uint8))
    scale = torch.randint(118, 122, (*lead, inputs // 32), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    return QuantizedWeight(format=MXFP4, data=codes, scale=scale, inputs=inputs, group=32)


def random_q4_k(weight: torch.Tensor) -> QuantizedWeight:
    """Random codes under random scales and offsets in two levels, of the shape of a weight."""
    *lead, inputs = weight.shape
    scale, offset = (torch.randint(64, (*lead, inputs // 32), dtype=torch.uint8) for _ in range(2))
    outer, above = (torch.rand(*lead, inputs // 256).half() * factor for factor in (1e-4, -1e-3))
    return QuantizedWeight(
        format=Q4_K,
        data=Q4_K.codes.pack(torch.randint(16, weight.shape, dtype=torch.uint8)),
        scale=scale,
        inputs=inputs,
        group=32,
        offset=offset,
        outer_scale=outer,
        outer_offset=above,
    )


FORMATS: dict[str, tuple[Quantize, ActivationScheme]] = {
    "int4": (partial(rounding.quantize_int4, group=64), UNQUANTIZED),
    "int8": (rounding.quantize_int8, UNQUANTIZED),
    "mxfp4": (random_mxfp4, UNQUANTIZED),
    "q4_k": (random_q4_k, UNQUANTIZED),
    "w8a8": (rounding.quantize_int8, INT8_PER_GROUP),
    "w4a8": (partial(rounding.quantize_int4, group=64, symmetric=False), ActivationScheme("int8", 64)),
    "fp8-block": (partial(rounding.quantize_fp8, block=True), FP8_PER_GROUP),
}


def check_quantised(backend: TorchBackend, small: bool, until: float) -> str | None:
    """Dense products (of few rows in parts of the depth, of many through descriptors) and mixtures; twice, bit by bit.

    Returns: where it stopped, when ``until`` (of the monotonic clock) came first.
    """
    hidden, width, experts, top_k = (256, 256, 3, 2) if small else (2048, 1024, 16, 4)
    device, spec = backend.device, RouterSpec(num_experts=experts, top_k=top_k)
    for name, (quantize, scheme) in FORMATS.items():
        if time.monotonic() > until:
            return f"{name} weights on"
        parts = [torch.randn(experts, *sizes) * sizes[-1] ** -0.5 for sizes in ((width, hidden),) * 2]
        parts.append(torch.randn(experts, hidden, width) * width**-0.5)
        gate, up, down = (quantize(part) for part in parts)
        mixture = backend.pack_quantized_experts(gate, up, down, "silu", scheme=scheme)
        linear = backend.pack_quantized_linear(gate.expert(0), None, scheme)
        oracle = [weight.to(device) for weight in (gate, up, down)]
        for rows in (1, 20) if small else (1, 17, 600):
            if time.monotonic() > until:
                return f"{name} weights, {rows} rows on"
            x_TD = torch.randn(rows, hidden, device=device).to(backend.dtype)
            what = f"{name} weights, {rows} rows"
            out_TO = backend.linear(x_TD, linear)
            expect(out_TO, quant_reference.linear(x_TD, oracle[0].expert(0), None, scheme), backend.dtype, what)
            assert torch.equal(out_TO, backend.linear(x_TD, linear)), f"{what}: two runs differ"
            routing = backend.route(torch.randn(rows, experts, device=device), spec)
            out_TD = backend.experts(x_TD, mixture, routing)
            expected_TD = quant_reference.experts(x_TD, *oracle, routing, "silu", scheme=scheme)
            expect(out_TD, expected_TD, backend.dtype, f"experts of {what}")
            assert torch.equal(out_TD, backend.experts(x_TD, mixture, routing)), f"experts of {what}: two runs differ"
    return None
