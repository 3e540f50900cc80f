"""Distillation of an upcycled mixture from its dense parent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dynamoe.dynamic.convert.upcycle_checkpoint import upcycle_checkpoint
from dynamoe.moe.distill import DistillConfig, ExpertLayer, distill_checkpoint, distill_layer, relative_error
from dynamoe.moe.upcycle import UpcycleConfig
from safetensors.torch import load_file

QUICK = DistillConfig(steps=80, batch_rows=256, kept=(0.5,))


def make_layer() -> tuple[ExpertLayer, torch.Tensor]:
    """Experts that listen to directions of their own, and a router that knows nothing."""
    generator = torch.Generator().manual_seed(0)
    hidden, experts, size = 24, 6, 4
    directions = torch.linalg.qr(torch.randn(hidden, experts, generator=generator)).Q.T
    gate = directions.repeat_interleave(size, 0) * 3
    x = torch.randn(2000, hidden, generator=generator)
    layer = ExpertLayer(
        gate_ND=gate,
        up_ND=torch.randn(experts * size, hidden, generator=generator) * 0.3,
        down_DN=torch.randn(hidden, experts * size, generator=generator),
        router_ED=torch.randn(experts - 1, hidden, generator=generator),
        always_on=1,
    )
    return layer, x


def test_all_experts_on_are_the_parent_and_a_narrow_soft_gate_is_the_hard_choice() -> None:
    layer, x = make_layer()
    dense = torch.nn.functional.silu(x @ layer.gate_ND.T) * (x @ layer.up_ND.T) @ layer.down_DN.T
    torch.testing.assert_close(layer.hard(x, 5), dense, rtol=1e-4, atol=1e-4)
    assert relative_error(layer.soft(x, 2, 1e-5), layer.hard(x, 2)) < 1e-3  # near-ties differ


@pytest.mark.parametrize("train_experts", [False, True])
def test_distillation_teaches_a_blind_router(train_experts: bool) -> None:
    layer, x = make_layer()
    parent, fresh = layer.gate_ND.clone(), x[1500:]
    teacher = layer.hard(fresh, 5)
    blind = relative_error(layer.hard(fresh, 2), teacher)
    distill_layer(
        layer, x[:1500], DistillConfig(steps=200, kept=(0.4,), learning_rate=0.02, train_experts=train_experts)
    )
    trained = relative_error(layer.hard(fresh, 2), teacher)
    assert trained < 0.75 * blind
    assert torch.equal(layer.gate_ND, parent) != train_experts
    assert not layer.router_ED.requires_grad


def test_a_distilled_checkpoint_is_better_with_half_its_experts_and_the_parent_with_all(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from dynamoe.dynamic.model.loader import load_decoder

    source, target = tmp_path / "upcycled", tmp_path / "distilled"
    source.mkdir()
    dense = make_checkpoint("llama")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(320, (12, 64), generator=generator)
    upcycle_checkpoint(dense, source, tokens[:4], UpcycleConfig(num_experts=8, num_always_on=1), progress=False)
    errors = distill_checkpoint(source, target, tokens, QUICK)
    assert sum(e["after"] for e in errors) < sum(e["before"] for e in errors)
    assert json.loads((target / "distill.json").read_text()) == errors
    before, after = (load_file(folder / "model.safetensors") for folder in (source, target))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {f"model.layers.{layer}.mlp.router.weight" for layer in range(3)}
    assert load_decoder(target, dtype="float32", device="cpu").spec.family == "dynamoe"
    with pytest.raises(ValueError, match="'llama'; only upcycled"):
        distill_checkpoint(dense, tmp_path / "x", tokens, QUICK)


def test_shares_are_checked() -> None:
    with pytest.raises(ValueError, match=r"kept must be between 0 and 1, not \(1\.0,\)"):
        DistillConfig(kept=(1.0,))
