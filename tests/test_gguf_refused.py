"""GGUF files that are not understood in full: refused in one line that names the tensor or the key."""

# ruff: noqa: E501

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.checkpoint.weights import CheckpointError
from dynamoe.dynamic.convert.gguf_import import import_gguf
from dynamoe.dynamic.convert.model_store import resolve_model
from gguf_files import write_gguf

Values, Tensors = dict[str, Any], dict[str, torch.Tensor]


@pytest.fixture
def refused(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., str]:
    """``refused(family, edit, **writing) -> message`` of the import of a file that was edited."""

    def refuse(family: str, edit: Callable[[Values, Tensors], Any], **writing: Any) -> str:
        file = write_gguf(make_checkpoint(family), tmp_path / "model.gguf", edit=lambda v, t: edit(v, t), **writing)
        target = tmp_path / "target"
        target.mkdir(exist_ok=True)
        with pytest.raises(CheckpointError) as caught:
            import_gguf(file, target, keep_codes=True, progress=False)
        message = str(caught.value)
        assert "\n" not in message
        assert "model.gguf" in message
        assert not (target / "model.safetensors").exists()
        return message

    return refuse


def add(**values: Any) -> Callable[[Values, Tensors], None]:
    """Adds metadata of the architecture llama; ``__`` stands for a dot."""
    return lambda v, t: v.update({f"llama.{key.replace('__', '.')}": value for key, value in values.items()})


KEYS: dict[str, tuple[str, Callable[[Values, Tensors], Any], str]] = {
    "unknown key": ("llama", add(made_up=1), "'llama.made_up' = 1 is not supported"),
    "key of another architecture": ("llama", lambda v, t: v.update({"clip.use_gelu": True}), "'clip.use_gelu'"),
    "softcap": ("llama", add(attn_logit_softcapping=30.0), "attn_logit_softcapping' = 30.0"),
    "final softcap": ("llama", add(final_logit_softcapping=30.0), "final_logit_softcapping' = 30.0"),
    "scale": ("llama", add(attention__scale=0.5), "llama.attention.scale' = 0.5"),
    "logit scale": ("llama", add(logit_scale=2.0), "llama.logit_scale' = 2.0"),
    "rope type": ("llama", add(rope__scaling__type="su"), "rope.scaling.type must be none, linear, yarn or longrope"),
    "yarn extrapolation": ("llama", add(rope__scaling__yarn_ext_factor=0.5), "yarn_ext_factor must be left away"),
    "yarn extrapolation without yarn": ("llama", add(rope__scaling__yarn_ext_factor=1.0), "yarn_ext_factor must be left away"),
    "yarn without extrapolation": (
        "llama", add(rope__scaling__type="yarn", rope__scaling__yarn_ext_factor=0.0), "yarn_ext_factor must be left away"
    ),
    "two factors": (
        "llama", add(rope__scaling__factor=2.0, rope__scale_linear=4.0), "rope.scale_linear must be the same as"
    ),
    "half types of tokens": (
        "llama", lambda v, t: v.update({"tokenizer.ggml.token_type": [k + 0.5 for k in v["tokenizer.ggml.token_type"]]}),
        "token_type must be 1 to 6"
    ),
    "partial rotary": ("llama", add(rope__dimension_count=8), "rope.dimension_count must be the width of a head, 16"),
    "value width": ("llama", add(attention__value_length=8), "value_length must be the width of a head"),
    "heads per layer": ("llama", add(attention__head_count=[4, 2, 4]), r"head_count must be the same for all layers"),
    "no heads": ("llama", add(attention__head_count=0), "head_count must be at least 1, not 0"),
    "uneven heads": ("llama", add(attention__head_count_kv=3), "'blk.0.attn_k.weight' has shape .*, which 3 heads do not share"),
    "layers": ("llama", add(block_count=2), r"tensor 'blk\.2\.\w+\.weight' in .* belongs to no part of the model that the metadata describes"),
    "missing layers": ("llama", add(block_count=4), r"lacks the tensor 'blk\.3\.\w+\.weight'"),
    "many layers": ("llama", add(block_count=2**31 - 1), r"block_count must be at most \d+, for \d+ tensors"),
    "vocabulary": ("llama", add(vocab_size=300), "vocab_size must be the rows of 'token_embd.weight', 320"),
    "text for a number": ("llama", add(context_length="long"), "context_length must be a whole number"),
    "width": ("llama", add(embedding_length=32), r"tensor 'token_embd\.weight' .*the metadata implies \(320, 32\)"),
    "bidirectional": ("llama", add(attention__causal=False), "attention.causal' = False"),
    "window in one layer": ("llama", add(attention__sliding_window_pattern=[True] * 3), "sliding_window_pattern"),
    "window in some layers": (
        "qwen2", lambda v, t: v.update({"qwen2.attention.sliding_window": 16}), "lacks .*'qwen2.attention.sliding_window_pattern'"
    ),
    "architecture": ("llama", lambda v, t: v.update({"general.architecture": "gpt5"}), "must be one of llama, .*'gpt5'"),
    "adapter": ("llama", lambda v, t: v.update({"general.type": "adapter"}), "general.type must be 'model'"),
    "block layout": ("llama", lambda v, t: v.update({"general.quantization_version": 1}), "quantization_version must be 2"),
    "no eps": ("llama", lambda v, t: v.pop("llama.attention.layer_norm_rms_epsilon"), "lacks the metadata entry 'llama.att"),
    "sigmoid gate": ("mixtral", add(expert_gating_func=2), "expert_gating_func' = 2"),
    "weights that do not add up": ("mixtral", add(expert_weights_norm=False), "expert_weights_norm must be true"),
    "scaled experts": ("mixtral", add(expert_weights_scale=2.5), "expert_weights_scale' = 2.5"),
    "number of experts": ("mixtral", add(expert_count=5), r"the metadata: layer 0 has 5 experts; the files hold 6 of it, as 'blk\.0\.ffn_\w+_exps\.weight'"),
    "more experts than bytes": (
        "mixtral", lambda v, t: t.update({"blk.0.ffn_up_exps.weight": torch.ones(64, 1, 64)}), "must have 3 dimensions, and 1024 bytes for each"
    ),
    "more experts than there can be": (
        "mixtral", lambda v, t: t.update({"blk.0.ffn_up_exps.bias": torch.ones(2**16 + 1, 1)}), "must have at most 65536 experts"
    ),
    "experts per token": ("mixtral", add(expert_used_count=7), "must be between 1 and num_experts=6"),
    "expert width": ("mixtral", add(expert_feed_forward_length=40), r"'blk\.0\.ffn_\w+_exps\.weight' .*has shape"),
    "no experts": ("mixtral", lambda v, t: v.pop("llama.expert_count"), r"'blk\.0\.ffn_\w+_exps\.weight'|no part|lacks"),
    "two shared experts": (
        "qwen2_moe", lambda v, t: v.update({"qwen2moe.expert_shared_count": 2}), "expert_shared_count must be 1"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_keys_that_change_the_model_are_refused(refused: Callable[..., str], name: str) -> None:
    family, edit, fault = KEYS[name]
    message = refused(family, edit)
    assert re.search(fault, message), message


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("llama", "made_up.weight", (4,)),
        ("llama", "blk.0.made_up.weight", (4, 4)),
        ("llama", "blk.0.attn_q_norm.weight", (16,)),
        ("llama", "blk.0.attn_q.scale", (1,)),
        ("llama", "blk.9.attn_norm.weight", (64,)),
        ("llama", "blk.0.ffn_gate_inp.weight", (6, 64)),
        ("llama", "blk.0.attn_sinks.weight", (4,)),
        ("llama", "output.bias", (320,)),
        ("mistral", "blk.0.attn_q.bias", (64,)),
        ("mixtral", "blk.0.ffn_up.3.weight", (48, 64)),
        ("mixtral", "blk.0.ffn_up_shexp.weight", (48, 64)),
        ("qwen3_moe", "blk.0.exp_probs_b.bias", (8,)),
        ("qwen2", "blk.0.attn_output.bias", (64,)),
    ],
)
def test_tensors_without_a_place_are_refused_by_name(
    refused: Callable[..., str], family: str, name: str, shape: tuple[int, ...]
) -> None:
    assert repr(name) in refused(family, lambda values, tensors: tensors.update({name: torch.ones(shape)}))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe", "qwen2_moe"])
def test_every_tensor_must_be_there(
    refused: Callable[..., str], make_checkpoint: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    """Of a layer, one by one, and in front of and behind the layers; without a head the embedding takes its place."""
    names: list[str] = []
    write_gguf(make_checkpoint(family), tmp_path / "all.gguf", edit=lambda values, tensors: names.extend(tensors))
    wanted = [name for name in names if not name.startswith("blk.") or name.startswith("blk.1.")]
    assert len(wanted) > 10
    for name in wanted:
        if name != "output.weight":
            message = refused(family, lambda values, tensors, name=name: tensors.pop(name))
            assert f"lacks the tensor {name!r}" in message


@pytest.mark.parametrize(
    ("name", "kind", "fault"),
    [
        ("blk.0.attn_norm.weight", "Q8_0", "cannot have type Q8_0"),
        ("blk.0.attn_q.weight", "I32", "cannot have type I32"),
        ("rope_freqs.weight", "F32", "must hold factors of 1 or more"),
    ],
)
def test_types_and_values_that_weights_cannot_have_are_refused(
    make_checkpoint: Callable[..., Path], tmp_path: Path, name: str, kind: str, fault: str
) -> None:
    from gguf import GGMLQuantizationType

    def edit(values: Values, tensors: Tensors) -> None:
        tensors.setdefault(name, torch.full((8,), 0.5))

    file = write_gguf(make_checkpoint("llama"), tmp_path / "model.gguf", edit=edit)
    data = bytearray(file.read_bytes())
    at = data.index(name.encode()) + len(name)
    dimensions = struct.unpack_from("<I", data, at)[0]
    struct.pack_into("<I", data, at + 4 + 8 * dimensions, GGMLQuantizationType[kind])
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=fault):
        import_gguf(file, tmp_path, progress=False)


def test_a_file_that_is_refused_leaves_nothing_in_the_cache(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNAMOE_HOME", str(tmp_path / "home"))
    file = write_gguf(make_checkpoint("llama"), tmp_path / "model.gguf", edit=add(made_up=1))
    with pytest.raises(CheckpointError, match="made_up"):
        resolve_model(file, progress=False)
    assert not [path for path in (tmp_path / "home" / "models").iterdir() if path.is_dir()]


@pytest.fixture
def parts(make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A model in several files."""
    monkeypatch.setenv("DYNAMOE_HOME", str(tmp_path / "home"))
    write_gguf(make_checkpoint("llama"), tmp_path / "tiny.gguf", split_max_tensors=9)
    return sorted(tmp_path.glob("tiny-*.gguf"))


def test_a_part_that_is_missing_is_named(parts: list[Path]) -> None:
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"no such file: .*tiny-00002-of-0000\d\.gguf, and .* is one of \d parts"):
        resolve_model(parts[0], progress=False)


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (lambda parts: parts[0].rename(parts[0].with_name("model.gguf")), r"model\.gguf: split\.count=\d, but its name"),
        (lambda parts: parts[1].write_bytes(parts[2].read_bytes()), r"00002-of-\d+\.gguf: split\.no=2, but its name"),
        (lambda parts: parts[2].write_bytes(b"GGUF"), r"00003-of-\d+\.gguf is cut short"),
        (lambda parts: swap(parts[0], b"split.tensors.count", b"split.tensors.cnt__"), r"'split\.tensors\.cnt__'|split"),
        (lambda parts: (parts[0].parent / "other.gguf").write_bytes(b"GGUF"), "holds 2 models, such as other.gguf and"),
    ],
)  # fmt: skip
def test_parts_that_do_not_belong_together_are_refused(
    parts: list[Path], edit: Callable[[list[Path]], Any], fault: str
) -> None:
    folder = parts[0].parent
    edit(parts)
    given = folder / "model.gguf" if (folder / "model.gguf").exists() else parts[0]
    with pytest.raises(CheckpointError, match=fault):
        resolve_model(folder if (folder / "other.gguf").exists() else given, progress=False)


def swap(file: Path, old: bytes, new: bytes) -> None:
    file.write_bytes(file.read_bytes().replace(old, new))
