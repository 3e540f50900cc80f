"""Everything that can be wrong with a checkpoint ends in one clear error that names it, before a weight is read."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.checkpoint.weights import Checkpoint, CheckpointError
from dynamoe.dynamic.model.decoder import Decoder
from dynamoe.dynamic.model.families import family_of, model_spec
from dynamoe.dynamic.model.layout import plan_layout
from dynamoe.dynamic.model.loader import load_decoder
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def load(path: Path) -> Decoder:
    return load_decoder(path, dtype="float32", device="cpu")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(path / WEIGHTS)
    change(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path / WEIGHTS)


def drop_tensor(path: Path) -> None:
    edit_weights(path, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))


def wrong_shape(path: Path) -> None:
    edit_weights(path, lambda weights: weights.update({"model.norm.weight": torch.ones(65)}))


def wrong_dtype(path: Path) -> None:
    edit_weights(path, lambda w: w.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}))


def truncate(path: Path) -> None:
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[: len(data) // 2])


def truncate_in_header(path: Path) -> None:
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:100])


def empty_file(path: Path) -> None:
    (path / WEIGHTS).write_bytes(b"")


def huge_header(path: Path) -> None:
    (path / WEIGHTS).write_bytes(struct.pack("<Q", 2**60) + b"{}")


def corrupt_header(path: Path) -> None:
    (path / WEIGHTS).write_bytes(struct.pack("<Q", 10) + b'{"a": {"dt')


def header_with(entry: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        header = json.dumps({"x": entry}).encode()
        (path / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)

    return write


def edit_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        data = (path / WEIGHTS).read_bytes()
        end = 8 + struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:end])
        change(header)
        text = json.dumps(header).encode()
        (path / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[end:])

    return write


def overlap(header: dict[str, Any]) -> None:
    """Two tensors over the same bytes: memory that a small file could ask for many times."""
    header["model.embed_tokens.weight"]["data_offsets"] = header["lm_head.weight"]["data_offsets"]


def twice_in_header(path: Path) -> None:
    data = (path / WEIGHTS).read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    text = data[8:end].rstrip()[:-1] + b', "model.norm.weight": {}}'
    (path / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[end:])


def longer(path: Path) -> None:
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes() + b"7 bytes")


def only_pickles(path: Path) -> None:
    (path / WEIGHTS).rename(path / "pytorch_model.bin")


def no_weights(path: Path) -> None:
    (path / WEIGHTS).unlink()


def no_config(path: Path) -> None:
    (path / "config.json").unlink()


def bad_json(path: Path) -> None:
    (path / "config.json").write_text("{ nope")


def not_an_object(path: Path) -> None:
    (path / "config.json").write_text("[1]")


def unsupported(path: Path) -> None:
    edit_json(path / "config.json", model_type="gpt2")


BROKEN: list[tuple[Callable[[Path], None], str]] = [
    (drop_tensor, r"lacks the tensor 'model.layers.1.mlp.up_proj.weight'"),
    (wrong_shape, r"'model.norm.weight' in model.safetensors has shape \(65,\); config.json implies \(64,\)"),
    (wrong_dtype, r"'model.norm.weight' in model.safetensors has dtype I32"),
    (truncate, r"model.safetensors is truncated: tensor 'model.layers.\d"),
    (truncate_in_header, r"model.safetensors is truncated: the header ends at byte \d+, the file at 100"),
    (empty_file, r"model.safetensors cannot be read"),
    (huge_header, r"model.safetensors is no safetensors file"),
    (corrupt_header, r"model.safetensors has a corrupt header"),
    (header_with("y"), r"corrupt header: tensor 'x' is described as y"),
    (header_with({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}), r"corrupt header: tensor 'x'"),
    (header_with({"dtype": "F32", "shape": [-1], "data_offsets": [8, 4]}), r"corrupt header: tensor 'x'"),
    (header_with({"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}), r"corrupt header: tensor 'x'"),
    (edit_header(lambda h: h["model.norm.weight"].update(made_up=1)), r"tensor 'model.norm.weight' is described as"),
    (
        edit_header(lambda h: h["model.norm.weight"].update(shape=[1] * 100 + [64])),
        r"corrupt header: tensor 'model.norm",
    ),
    (edit_header(overlap), r"corrupt header: tensor 'lm_head.weight' and tensor 'model.embed.* overlap"),
    (edit_header(lambda h: h.pop("model.norm.weight")), r"no tensor has the 256 bytes behind|have 256 bytes between"),
    (edit_header(lambda h: h.update({"n" * 300: h.pop("model.norm.weight")})), r"a tensor's name of 300 characters"),
    (
        lambda path: edit_json(path / "config.json", rope_theta=5e5),
        r"rope_theta must be what rope_parameters says, 10000.0",
    ),
    (
        lambda path: (path / "generation_config.json").unlink() or os.mkfifo(path / "generation_config.json"),
        r"no regular file",
    ),
    (twice_in_header, r"corrupt header: 'model.norm.weight' is there twice"),
    (longer, r"is corrupt: no tensor has the 7 bytes behind tensor '"),
    (only_pickles, r"only pytorch_model.bin; pickled weights are never loaded"),
    (no_weights, r"has no weights"),
    (no_config, r"config.json is missing"),
    (bad_json, r"config.json is not readable as JSON"),
    (not_an_object, r"config.json must hold a JSON object, not list"),
    (unsupported, r"model_type 'gpt2' is not supported; supported: llama"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN, ids=[message[:40] for _, message in BROKEN])
def test_one_clear_error(damage: Callable[[Path], None], message: str, copy_checkpoint: Callable[..., Path]) -> None:
    path = copy_checkpoint("llama")
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def first_shard(path: Path) -> Path:
    return min(path.glob("model-*.safetensors"))


def edit_index(path: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def twice_in_shards(path: Path) -> None:
    """One tensor in two files: which of them is meant is anyone's guess."""
    index = json.loads((path / INDEX).read_text())["weight_map"]
    other = next(file for file in sorted(set(index.values())) if file != index["lm_head.weight"])
    tensor = load_file(path / index["lm_head.weight"])["lm_head.weight"]
    save_file({**load_file(path / other), "lm_head.weight": tensor}, path / other)


BROKEN_SHARDS: list[tuple[Callable[[Path], Any], str]] = [
    (lambda path: first_shard(path).unlink(), r"model-00001-of-\d+.safetensors is missing; .*index.json names it"),
    (lambda path: first_shard(path).write_bytes(b""), r"model-00001-of-\d+.safetensors cannot be read"),
    (lambda path: (path / INDEX).write_text("{}"), r"has no usable weight_map"),
    (lambda path: (path / INDEX).write_text("{"), r"index.json is not readable as JSON"),
    (lambda path: edit_index(path, lambda m: m.update(x="../../secret")), r"'../../secret', which is not a plain file"),
    (
        lambda path: edit_index(path, lambda m: m.update(made_up=first_shard(path).name)),
        r"lacks the tensor 'made_up' that the index promises",
    ),
    (lambda path: edit_index(path, lambda m: m.update({min(m): "x\0.safetensors"})), r"which is not a plain file name"),
    (
        lambda path: edit_index(path, lambda m: m.update({"model.layers.0.input_layernorm.weight": max(m.values())})),
        r"tensor 'model.layers.0.input_layernorm.weight' is in model-.*; the index says that it is in 'model-",
    ),
    (twice_in_shards, r"tensor 'lm_head.weight' is in model-00001-of-\d+.safetensors; the index says"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN_SHARDS, ids=[message[:40] for _, message in BROKEN_SHARDS])
def test_one_clear_error_about_shards(
    damage: Callable[[Path], Any], message: str, copy_checkpoint: Callable[..., Path]
) -> None:
    path = copy_checkpoint("llama", max_shard_size="100KB")
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_damage_anywhere_in_the_header_is_reported_or_harmless(copy_checkpoint: Callable[..., Path]) -> None:
    path = copy_checkpoint("llama", num_hidden_layers=1)
    data = bytearray((path / WEIGHTS).read_bytes())
    (header_bytes,) = struct.unpack("<Q", data[:8])
    config = json.loads((path / "config.json").read_text())
    draw = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(draw.choice((1, 1, 5))):
            damaged[draw.randrange(8 + header_bytes)] = draw.choice((*b'0919{}[]",:-e', draw.randrange(256)))
        cut = draw.choice((len(data), len(data), draw.randrange(len(data))))
        (path / WEIGHTS).write_bytes(damaged[:cut])
        try:
            plan_layout(model_spec(config), family_of(config), Checkpoint(path))
        except CheckpointError:
            refused += 1
    assert refused > 200


def test_nothing_is_read_before_everything_is_checked(
    copy_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy_checkpoint("llama")
    wrong_shape(path)

    def no_view(self: Checkpoint, name: str) -> None:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Checkpoint, "view", no_view)
    with pytest.raises(CheckpointError, match=r"model.norm.weight"):
        load(path)
