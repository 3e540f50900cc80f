"""GPTQ, AWQ and SmoothQuant: less error than rounding to nearest, and nothing changed before anything is rounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dynamoe.dynamic.checkpoint.weights import Checkpoint, read_json
from dynamoe.dynamic.model.families import family_of, model_spec
from dynamoe.dynamic.model.layout import plan_layout
from dynamoe.dynamic.model.spec import ModelSpec
from dynamoe.dynamic.quantize.gptq import gptq_int4
from dynamoe.dynamic.quantize.grid import full_grid, searched_grid
from dynamoe.dynamic.quantize.inputs import LayerInputs, OneLayer
from dynamoe.dynamic.quantize.layer import LayerTensors, pack_layer, plain, read_layer
from dynamoe.dynamic.quantize.methods import NEAREST, POOLED, ROUTED, CalibratedMethod, LayerMethod
from dynamoe.dynamic.quantize.scaling import InputStatistics, ScaledLayers, awq_scale, output_error, smooth_scale
from dynamoe.kernels.api.rounding import quantize_int4
from dynamoe.kernels.api.types import Routing
from dynamoe.kernels.torch.backend import TorchBackend


def correlated(layers: int, inputs: int, *, seed: int = 0) -> tuple[torch.Tensor, InputStatistics]:
    """Inputs that say much about each other, some far larger than others; and a weight of 24 outputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    sizes = 4 * torch.rand(inputs, generator=generator) ** 3
    rows = torch.randn(layers, 600, inputs, generator=generator) @ mix * sizes
    return torch.randn(layers, 24, inputs, generator=generator), InputStatistics.of(list(rows))


@pytest.mark.parametrize("inputs", [64, 100, 200])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_beats_rounding_to_nearest(inputs: int, symmetric: bool) -> None:
    weight, seen = correlated(3, inputs)
    nearest = output_error(quantize_int4(weight, symmetric=symmetric).dequantize() - weight, seen.hessian_BII)
    grid = full_grid(weight, 64, symmetric)
    assert torch.equal(grid.weight(grid.nearest(weight)).data, quantize_int4(weight, symmetric=symmetric).data)
    for search in (False, True):
        found = gptq_int4(weight, seen.hessian_BII, symmetric=symmetric, search=search)
        assert found.symmetric == symmetric
        assert found.group == 64
        error = output_error(found.dequantize() - weight, seen.hessian_BII)
        assert bool((error < 0.75 * nearest).all()), search


def test_gptq_treats_every_expert_as_if_it_were_alone() -> None:
    weight, seen = correlated(3, 96)
    together = gptq_int4(weight, seen.hessian_BII, group=32)
    for expert in range(3):
        alone = gptq_int4(weight[expert, None], seen.hessian_BII[expert, None], group=32)
        assert (together.expert(expert).codes() == alone.expert(0).codes()).float().mean() > 0.99
    shared = gptq_int4(weight, seen.hessian_BII[:1], group=32)
    assert torch.equal(shared.expert(0).data, together.expert(0).data)


def test_gptq_without_correlation_is_rounding_to_nearest() -> None:
    weight, _ = correlated(2, 70)
    rounded = gptq_int4(weight, torch.eye(70)[None], search=False)
    assert torch.equal(rounded.data, quantize_int4(weight).data)


def test_gptq_copes_with_inputs_that_are_always_zero_or_the_same() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 96, generator=generator)
    x[:, 10:20] = 0
    x[:, 30] = x[:, 31]
    weight = torch.randn(1, 8, 96, generator=generator)
    found = gptq_int4(weight, InputStatistics.of([x]).hessian_BII, search=False).dequantize()
    assert bool(found.isfinite().all())
    assert torch.equal(found[..., 10:20], quantize_int4(weight).dequantize()[..., 10:20])
    with pytest.raises(ValueError, match="all zero"):
        gptq_int4(weight, torch.zeros(1, 96, 96))
    with pytest.raises(ValueError, match="finite"):
        gptq_int4(weight, torch.full((1, 96, 96), torch.nan))
    with pytest.raises(ValueError, match="cannot be"):
        gptq_int4(weight, torch.eye(95)[None])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_awq_scales_and_clipping_lower_the_error(seed: int) -> None:
    weight, seen = correlated(1, 100, seed=seed)

    def rounded(w: torch.Tensor) -> torch.Tensor:
        return quantize_int4(w).dequantize()

    nearest = output_error(rounded(weight) - weight, seen.hessian_BII)
    scale_I = awq_scale([ScaledLayers(weight_BOI=weight, statistics=seen)], seen.mean_abs_BI[0], rounded)
    scaled = rounded(weight * scale_I) / scale_I
    assert bool((output_error(scaled - weight, seen.hessian_BII) < 0.9 * nearest).all())
    grid = searched_grid(weight, seen.hessian_BII, 64, True)
    clipped = grid.values(grid.nearest(weight))
    assert bool((output_error(clipped - weight, seen.hessian_BII) < nearest).all())


def test_smoothquant_balances_inputs_and_weights() -> None:
    scale = smooth_scale(torch.tensor([8.0, 0.0, 2.0]), torch.tensor([0.5, 1.0, 0.0]))
    assert scale.tolist() == [4.0, 1.0, 1.0]


def layer_of(path: Path, number: int = 1) -> tuple[ModelSpec, LayerTensors]:
    config, checkpoint = read_json(path / "config.json"), Checkpoint(path)
    spec = model_spec(config)
    layout = plan_layout(spec, family_of(config), checkpoint)
    return spec, read_layer(checkpoint, layout.layers[number], spec)


def stream(spec: ModelSpec) -> torch.Tensor:
    x = torch.randn(6, 40, spec.hidden_size, generator=torch.Generator().manual_seed(3))
    return x * torch.linspace(0.2, 3, spec.hidden_size)


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "granitemoe"])
def test_folded_scales_change_nothing(make_checkpoint: Callable[..., Path], family: str, method: str) -> None:
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    spec, layer = layer_of(make_checkpoint(family, **biases))
    backend, x = TorchBackend("cpu", torch.float32), stream(spec)
    with torch.inference_mode():
        expected, inputs = OneLayer(spec, 1, pack_layer(backend, layer, spec.activation), backend).watch(x)
        worker = LayerMethod(CalibratedMethod(name=method, group=32), spec, torch.bfloat16)
        scaled, theirs = worker.scaled(layer, inputs)
        packed = pack_layer(backend, scaled, spec.activation)
        found, seen = OneLayer(spec, 1, packed, backend).watch(x)
    # AWQ may find that some part is best left alone.
    parts = ((*scaled.qkv, *layer.qkv), (scaled.o, layer.o), (scaled.ffn.up_EFD, layer.ffn.up_EFD))
    changed = sum(not torch.equal(plain(pair[0]), plain(pair[-1 if len(pair) == 2 else 3])) for pair in parts)
    assert changed >= (3 if method == "smoothquant" else 1)
    assert (found - expected).abs().max() <= 1e-4 * (expected - x).abs().max()
    # What the parts are said to read is what they read; the norm is stored without being rounded.
    for ours, real in zip(vars(theirs).values(), vars(seen).values(), strict=True):
        if isinstance(ours, torch.Tensor):
            assert (ours - real).abs().max() <= 1e-4 * real.abs().max()
    for norm in scaled.norms.values():
        assert torch.allclose(norm.bfloat16().float(), norm, rtol=1e-6)


def test_experts_that_saw_little_go_by_their_layers_tokens(make_checkpoint: Callable[..., Path]) -> None:
    spec, layer = layer_of(make_checkpoint("mixtral"))
    x_TD = stream(spec).flatten(0, 1)
    ids_TK = torch.zeros(len(x_TD), 2, dtype=torch.int32)
    ids_TK[:, 1] = 1
    ids_TK[:3, 1] = 2  # experts 3, 4, 5 see nothing, 2 sees three tokens
    routing = Routing(expert_ids_TK=ids_TK, weights_TK=torch.ones(ids_TK.shape))
    inputs = LayerInputs(attention_TD=x_TD, o_TX=x_TD, ffn_TD=x_TD, routing=routing)
    worker = LayerMethod(CalibratedMethod(name="gptq", group=32, fewest_tokens=4), spec, torch.float32)
    found = worker.quantized(layer, inputs)
    assert worker.sources == {ROUTED: 2, POOLED: 4}
    seen, gate = InputStatistics.of([x_TD]), plain(layer.ffn.gate_EFD)
    gate_Q = found.ffn.gate_EFD
    assert not isinstance(gate_Q, torch.Tensor)
    nearest = output_error(quantize_int4(gate, group=32).dequantize() - gate, seen.hessian_BII)
    assert bool((output_error(gate_Q.dequantize() - gate, seen.hessian_BII) < nearest)[2:].all())

    nothing = LayerInputs(attention_TD=x_TD, o_TX=x_TD, ffn_TD=torch.zeros_like(x_TD), routing=routing)
    worker = LayerMethod(CalibratedMethod(name="gptq", group=32, fewest_tokens=4), spec, torch.float32)
    blind = worker.quantized(layer, nothing).ffn.gate_EFD
    assert worker.sources == {NEAREST: 6}
    assert not isinstance(blind, torch.Tensor)
    distance = blind.dequantize() - gate
    assert distance.norm() <= (quantize_int4(gate, group=32).dequantize() - gate).norm()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "gtpq"}, "gptq, awq, smoothquant, not 'gtpq'"),
        ({"name": "awq", "group": 48}, "group must be one of 32, 64, 128, not 48"),
        ({"name": "gptq", "damping": 0.0}, "damping"),
        ({"name": "smoothquant", "strength": 2.0}, "strength"),
        ({"name": "gptq", "fewest_tokens": 0}, "fewest_tokens"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CalibratedMethod(**settings)
