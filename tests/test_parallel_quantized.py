"""Quantised checkpoints over several processes: each reads its part of codes, scales and zero points."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.checkpoint.quantized_checkpoint import QuantizedCheckpoint, open_checkpoint, split_config
from dynamoe.dynamic.checkpoint.stored_weight import Part
from dynamoe.dynamic.checkpoint.weights import Checkpoint, CheckpointError, read_json
from dynamoe.dynamic.model.families import family_of, model_spec
from dynamoe.dynamic.model.layout import Layout, plan_layout
from dynamoe.dynamic.parallel.shards import ShardedCheckpoint
from dynamoe.dynamic.parallel.start import Shard
from gguf_files import write_gguf
from parallel_jobs import compare, shard_of
from safetensors.torch import save_file
from stored_layouts import LAYOUTS, SIZES, compressed_settings, store, store_all

INT8_ROWS = {"type": "int", "num_bits": 8, "strategy": "token", "dynamic": True}
ALL_LAYOUTS = {
    **LAYOUTS,
    "ct-w8a8": compressed_settings("int-quantized", {"num_bits": 8, "strategy": "channel"}, INT8_ROWS),
}
# Heads and neurons of two processes are whole groups of 128, whose scales others round by.
WIDE = {"head_dim": 64, "intermediate_size": 256, "hidden_size": 128}


def quantised(
    make_checkpoint: Callable[..., Path], folder: Path, layout: str, family: str = "mixtral", **config: Any
) -> Path:
    wide = layout in ("fp8-block", "ct-w8a8")
    source = make_checkpoint(family, **{**(WIDE if wide else SIZES[family]), **config})
    store_all(source, folder / "quantised", ALL_LAYOUTS[layout])
    return folder / "quantised"


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_a_part_is_that_of_the_whole_weight(tmp_path: Path, layout: str) -> None:
    weight = torch.randn(264, 256, generator=torch.Generator().manual_seed(3))
    stored, plain = store("a", weight, ALL_LAYOUTS[layout])
    save_file(stored, tmp_path / "model.safetensors")
    _, kind = split_config({"quantization_config": ALL_LAYOUTS[layout]})
    whole = open_checkpoint(tmp_path, kind)
    assert isinstance(whole, QuantizedCheckpoint)
    assert torch.equal(whole.view("a.weight"), plain)
    step = whole.input_step("a.weight")
    codes = stored[next(f"a.{name}" for name in ("qweight", "weight_packed", "weight") if f"a.{name}" in stored)]
    middle = (256 // step // 3 or 1) * step  # a multiple of the step that is none of a group where it can be
    for outputs in (slice(0, 264), slice(5, 200), slice(128, 264)):
        for inputs in (slice(0, 256), slice(0, middle), slice(middle, 256)):
            part = ShardedCheckpoint(whole, {"a.weight": Part(outputs=outputs, inputs=inputs)})
            assert torch.equal(part.view("a.weight"), plain[outputs, inputs])
            found = part.quantized("a.weight")
            assert found is not None
            assert torch.equal(found.weight.dequantize(), plain[outputs, inputs])
            rows, columns = outputs.stop - outputs.start, inputs.stop - inputs.start
            words = (rows + 16) * (columns + 16)  # what lies in words of which a part is wanted
            read = part.split_bytes + part.replicated.get("a.qweight", 0) + part.replicated.get("a.weight_packed", 0)
            scales = sum(t.nbytes for name, t in stored.items() if t is not codes)
            assert read - part.replicated.get("a.weight", 0) <= codes.nbytes * words / weight.numel() + scales


def load_all(layout: Layout, checkpoint: ShardedCheckpoint) -> dict[str, torch.Tensor]:
    """Every quantised weight of a rank, in float32, by name."""
    names = [
        name
        for layer in layout.layers
        for name in (*layer.attention.linears["qkv"].weights, *layer.attention.linears["o"].weights)
    ]
    names += [name for layer in layout.layers for name in (*layer.ffn.gate, *layer.ffn.up, *layer.ffn.down)]
    found = {}
    for name in names:
        stored = checkpoint.quantized(name)
        assert stored is not None
        found[name] = stored.weight.dequantize()
    return found


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize(("tensor", "expert"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_together_read_every_code_once(
    make_checkpoint: Callable[..., Path], tmp_path: Path, layout: str, tensor: int, expert: int
) -> None:
    path = quantised(make_checkpoint, tmp_path, layout)
    config, stored = split_config(read_json(path / "config.json"))
    whole, ranks = open_checkpoint(path, stored), tensor * expert
    spec = model_spec(config)
    plan = plan_layout(spec, family_of(config), whole)
    plain = {name: whole.view(name) for name in whole}
    experts: dict[str, list[torch.Tensor]] = {}
    sizes = {name: t.nbytes for name, t in raw_tensors(path).items() if ".experts." in name}
    for rank in range(ranks):
        shard: Shard = shard_of(spec, tensor, expert, rank)
        held = shard.layout(plan)
        checkpoint = shard.checkpoint(open_checkpoint(path, stored))
        for name, weight in load_all(held, checkpoint).items():
            assert torch.equal(weight, shard.cuts[name](plain[name])), name
            if ".experts." in name:
                experts.setdefault(name, []).append(weight)
        if tensor == 1:  # experts are kept whole
            continue
        assert not [name for name in checkpoint.replicated if name.endswith(("qweight", "weight_packed", ".weight"))]
        others = sum(t.nbytes for name, t in raw_tensors(path).items() if ".self_attn." in name)
        assert checkpoint.split_bytes <= 1.1 * sum(sizes.values()) / ranks + others
    for name, parts in experts.items():
        assert sum(part.numel() for part in parts) == plain[name].numel()


def raw_tensors(path: Path) -> dict[str, torch.Tensor]:
    """What the file holds, by name."""
    checkpoint = Checkpoint(path)
    return {name: checkpoint.raw(name) for name in checkpoint}


@pytest.mark.parametrize(
    ("layout", "config", "fault"),
    [
        ("gptq", {"intermediate_size": 96}, r"experts\.0\.w2\.weight'.* at input 48, which is no multiple of 32"),
        ("gptq-v2", {"intermediate_size": 64, "head_dim": 24}, r"self_attn\.o_proj\.weight'.* at input 48, .* of 32"),
        ("ct-w8a8", {"head_dim": 32}, r"self_attn\.o_proj\.weight'.* at input 64, which is no multiple of 128"),
        ("fp8-block", {"intermediate_size": 192}, r"experts\.0\.w2\.weight'.* at input 96, .* no multiple of 128"),
        ("gptq-all", {"intermediate_size": 72}, None),
        ("ct-int8", {"intermediate_size": 70}, None),
    ],
)
def test_a_group_that_would_belong_to_two_ranks_is_refused(
    make_checkpoint: Callable[..., Path], tmp_path: Path, layout: str, config: dict[str, int], fault: str | None
) -> None:
    path = quantised(make_checkpoint, tmp_path, layout, **config)
    settings, stored = split_config(read_json(path / "config.json"))
    spec = model_spec(settings)
    for rank in range(2):  # all ranks see it, and end
        shard = shard_of(spec, 2, 1, rank)
        whole = open_checkpoint(path, stored)
        plan = shard.layout(plan_layout(spec, family_of(settings), whole))
        if fault is None:
            load_all(plan, shard.checkpoint(whole))
        else:
            with pytest.raises(CheckpointError, match=fault):
                shard.checkpoint(whole)


AXES = ("tensor", "expert", "pipeline", "data")
FAST = [("gptq-asym", "tensor"), ("ct-int4-asym", "expert")]
SLOW = [(layout, axis) for layout in ALL_LAYOUTS for axis in AXES if (layout, axis) not in FAST]


@pytest.mark.parametrize(("layout", "axis"), [*FAST, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in SLOW)])
def test_tokens_are_those_of_one_process(
    make_checkpoint: Callable[..., Path], tmp_path: Path, layout: str, axis: str
) -> None:
    path = quantised(make_checkpoint, tmp_path, layout)
    found = compare(tmp_path, str(path), {axis: 2})
    assert found["deployment"]["quantisation"] == "as the checkpoint stores it"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "axes"),
    [
        ("awq", {"tensor": 2, "expert": 2}),
        ("gptq", {"tensor": 2, "pipeline": 2}),
        ("ct-int8-groups", {"expert": 2, "pipeline": 2}),
        ("ct-int4", {"expert": 2}),
    ],
)
def test_tokens_with_shared_experts_and_products_of_axes(
    make_checkpoint: Callable[..., Path], tmp_path: Path, layout: str, axes: dict[str, int]
) -> None:
    compare(tmp_path, str(quantised(make_checkpoint, tmp_path, layout, "qwen2_moe")), axes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "axis"), [("Q8_0", "tensor"), ("Q4_0", "expert"), ("Q4_1", "tensor"), ("Q4_1", "pipeline")]
)
def test_tokens_of_a_gguf_file(
    make_checkpoint: Callable[..., Path], tmp_path: Path, kind: str, axis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNAMOE_HOME", str(tmp_path / "home"))
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    ends = dict.fromkeys(("token_embd", "output"), "Q8_0")
    file = tmp_path / "tiny.gguf"
    write_gguf(make_checkpoint("mixtral", **SIZES["mixtral"]), file, {**dict.fromkeys(parts, kind), **ends})
    found = compare(tmp_path, str(file), {axis: 2})
    assert found["deployment"]["quantisation"] == "as the checkpoint stores it"
