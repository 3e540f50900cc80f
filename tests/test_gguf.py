"""GGUF files of every family that loads: logits are those of transformers on the checkpoint they were made from."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.checkpoint.gguf_blocks import block_sizes, dequantized, gguf_weight, has_format
from dynamoe.dynamic.checkpoint.quantized_checkpoint import open_checkpoint, split_config
from dynamoe.dynamic.checkpoint.weights import CheckpointError
from dynamoe.dynamic.convert.default_model import default_recipe
from dynamoe.dynamic.convert.gguf_architectures import ARCHITECTURES
from dynamoe.dynamic.convert.gguf_import import import_gguf, importer_digest
from dynamoe.dynamic.convert.model_store import resolve_model
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.model.prompt_pass import fresh_cache
from dynamoe.dynamic.text.tokenizer import Tokenizer
from dynamoe.exits.segments import Segment
from dynamoe.kernels.api.tolerance import error
from gguf_converters import CONVERTERS
from gguf_files import ARCHITECTURES as NAMES_OF_ARCHITECTURES
from gguf_files import LATENT, rounded_checkpoint, write_gguf
from safetensors.torch import load_file

IDS = torch.randint(3, 320, (60,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DYNAMOE_HOME", str(tmp_path / "home"))


def logits_of(path: Path, backend: str = "torch", **options: Any) -> torch.Tensor:
    """Of every position of a prompt that is longer than the windows, (T, V), float32."""
    decoder = load_decoder(path, dtype="float32", backend=backend, device="cpu", **options)
    kv, batch = fresh_cache(decoder, [len(IDS)])
    whole = Segment(index=0, layers=range(decoder.spec.num_layers))
    return decoder.logits(decoder.run_segment(whole, decoder.embed(IDS), kv, batch))


def transformers_logits(path: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(IDS[None]).logits[0]


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


def weights_add_up(values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    values["qwen2moe.expert_weights_norm"] = True


def sliding(*layers: bool, further: bool = False) -> Any:
    """Adds the pattern that says which layers have a window."""

    def edit(values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        if further:
            further_tokens(values, tensors)
        key = next(key for key in values if key.endswith(".attention.sliding_window"))
        values[f"{key}_pattern"] = list(layers)

    return edit


def only_legacy_keys(values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """As the first converters wrote: the linear factor under another key, frequencies among the tensors."""
    values["llama.rope.scale_linear"] = values.pop("llama.rope.scaling.factor")
    for key in ("rope.scaling.type", "attention.key_length", "attention.value_length", "vocab_size"):
        values.pop(f"llama.{key}", None)
    values |= {"llama.rope.dimension_count": 16, "llama.tensor_data_layout": "Meta AI original pth"}
    tensors |= {f"blk.{layer}.attn_rot_embd.weight": torch.ones(8) for layer in range(3)}


def fused(values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Queries, keys and values in one tensor, as the converter's ``--fuse-qkv`` has them."""
    for name in [name for name in tensors if ".attn_q." in name]:
        parts = [tensors.pop(name.replace("_q.", f"_{part}.")) for part in "qkv"]
        tensors[name.replace("_q.", "_qkv.")] = torch.cat(parts)


def no_expert_width(values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    del values["qwen3moe.expert_feed_forward_length"]


def no_attention_scale(values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    del values["granitemoe.attention.scale"]


def further_tokens(values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """A block behind the model's own."""
    architecture = next(key for key in values if key.endswith(".block_count")).partition(".")[0]
    values |= {f"{architecture}.block_count": 4, f"{architecture}.nextn_predict_layers": 1}
    tensors |= {name.replace("blk.2.", "blk.3."): t.clone() for name, t in tensors.items() if name.startswith("blk.2.")}
    tensors |= {f"blk.3.nextn.{name}.weight": torch.ones(64) for name in ("enorm", "hnorm")}
    tensors["blk.3.nextn.eh_proj.weight"] = torch.ones(64, 128)


WINDOWS = {"use_sliding_window": True, "sliding_window": 16}
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=128)
BIASES = {"attention_bias": True}
FILES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, {}),
    "llama-biases": ("llama", {**BIASES, "mlp_bias": True}, {}),
    "llama-biases-fused": ("llama", {**BIASES, "mlp_bias": True}, {"edit": fused}),
    "llama-wide-heads": ("llama", {"head_dim": 32}, {}),
    "llama-linear": ("llama", rope("linear", factor=3.0), {}),
    "llama-legacy": ("llama", rope("linear", factor=3.0), {"edit": only_legacy_keys}),
    "llama-yarn": ("llama", YARN, {}),
    "llama-3.1": ("llama", LLAMA3, {}),
    "llama-with-qwens-biases": ("qwen2", {}, {"architecture": "llama"}),
    "mistral": ("mistral", {}, {}),
    "mixtral": ("mixtral", {}, {}),
    "mixtral-one-by-one": ("mixtral", {}, {"one_each": True}),
    "mixtral-window": ("mixtral", {"sliding_window": 24}, {}),
    "granitemoe": ("granitemoe", {}, {}),
    "granitemoe-usual-scale": ("granitemoe", {"attention_multiplier": 0.25}, {"edit": no_attention_scale}),
    "granitemoe-biases": ("granitemoe", BIASES, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}, {}),
    "qwen2-fused": ("qwen2", {}, {"edit": fused}),
    "qwen2-yarn": ("qwen2", YARN, {}),
    "qwen2-windows": ("qwen2", {**WINDOWS, "max_window_layers": 1}, {"edit": sliding(False, True, True)}),
    "qwen2-windows-further-tokens": (
        "qwen2",
        {**WINDOWS, "max_window_layers": 1},
        {"edit": sliding(False, True, True, further=True)},
    ),
    "qwen2_moe": ("qwen2_moe", {}, {}),
    "qwen2_moe-normalised": ("qwen2_moe", {"norm_topk_prob": True}, {"edit": weights_add_up}),
    "qwen2_moe-dense-layer": ("qwen2_moe", {"mlp_only_layers": [1]}, {}),
    "qwen2_moe-further-tokens": ("qwen2_moe", {"mlp_only_layers": [2]}, {"edit": further_tokens}),
    "qwen3": ("qwen3", {}, {}),
    "qwen3-biases": ("qwen3", BIASES, {}),
    "qwen3-window": ("qwen3", {**WINDOWS, "max_window_layers": 0}, {"edit": sliding(True, True, True)}),
    "qwen3_moe": ("qwen3_moe", {}, {}),
    "qwen3_moe-wide-experts": ("qwen3_moe", {"moe_intermediate_size": 56}, {"edit": no_expert_width}),
    "qwen3_moe-window": ("qwen3_moe", WINDOWS, {"edit": sliding(True, True, True)}),
    "qwen3_moe-yarn": ("qwen3_moe", YARN, {}),
    "granitemoeshared": ("granitemoeshared", {}, {}),
    "glm4_moe": ("glm4_moe", {}, {}),
    "glm4_moe-further-tokens": ("glm4_moe", {}, {"edit": further_tokens}),
    "glm4_moe-groups": ("glm4_moe", {"n_group": 4, "topk_group": 2, "attention_bias": True, "use_qk_norm": False}, {}),
    "dots1": ("dots1", {}, {}),
    "ernie4_5_moe": ("ernie4_5_moe", {"moe_norm_min": 1e-12}, {}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {}, {}),
    "olmoe": ("olmoe", {}, {}),
    "olmoe-clip": ("olmoe", {"clip_qkv": 0.8}, {}),
}


@pytest.mark.parametrize("name", FILES)
def test_an_imported_file_computes_what_transformers_does(
    make_checkpoint: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    family, settings, writing = FILES[name]
    checkpoint = make_checkpoint(family, **settings)
    file = write_gguf(checkpoint, tmp_path / "tiny.gguf", **writing)
    imported = resolve_model(file, progress=False)
    assert resolve_model(str(file), progress=False) == imported
    assert error(logits_of(imported), transformers_logits(checkpoint)) <= 2e-5
    text = "The router, chooses them<|im_end|>\nall 123."
    tokenizer = Tokenizer.from_directory(imported)
    assert tokenizer.chat_prompt([{"role": "user", "content": "hello"}]) == "hello"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=False) == text


def test_all_families_are_covered() -> None:
    """Some architectures have tests elsewhere."""
    covered = {NAMES_OF_ARCHITECTURES.get(family, family) for family, *_ in FILES.values()}
    covered |= {*LATENT, "gpt-oss", "nemotron_h"} | {converter.architecture for converter in CONVERTERS.values()}
    assert covered == set(ARCHITECTURES)


WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
WIDE_EXPERTS = {
    "qwen2_moe": {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256},
    "qwen3_moe": {"moe_intermediate_size": 256, "head_dim": 64},
    "qwen3": {"head_dim": 64},
}
KINDS = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4"]
ON_REQUEST = ["Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "TQ2_0"]


SLOW = [
    *(("llama", kind) for kind in ("Q2_K", "IQ4_NL", "TQ2_0")),
    *(("mixtral", kind) for kind in ("Q8_0", "BF16")),
    *(("qwen2_moe", kind) for kind in ("Q4_K", "BF16")),
    *(("qwen3_moe", kind) for kind in ("Q8_0", "Q4_K", "BF16")),
    *((family, "Q6_K") for family in ("mistral", "qwen2", "qwen3", "olmoe", "granitemoe")),
]


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("llama", kind) for kind in (*KINDS, "Q3_K", "IQ4_XS")),
        *(("mixtral", "Q4_K"), ("qwen2_moe", "Q8_0"), ("qwen3_moe", "Q6_K"), ("olmoe", "BF16")),
        *(pytest.param(*cell, marks=pytest.mark.slow) for cell in SLOW),
    ],
)
def test_quantised_files_run_on_what_their_blocks_stand_for(
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    family: str,
    kind: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Transformers gets the dequantised weights; the file, and what runs, keep the blocks."""
    checkpoint = tmp_path / "rounded"
    blocks = rounded_checkpoint(make_checkpoint(family, **WIDE, **WIDE_EXPERTS.get(family, {})), checkpoint, kind)
    file = write_gguf(checkpoint, tmp_path / "tiny.gguf", kind, blocks=blocks)
    imported = resolve_model(file, progress=False)
    with caplog.at_level(logging.WARNING):
        found = logits_of(imported, dequantize=kind in ON_REQUEST)
    assert error(found, transformers_logits(checkpoint)) <= 3e-5
    widened = [record for record in caplog.records if "are dequantised" in record.getMessage()]
    assert len(widened) == (kind in block_sizes() and not has_format(kind))
    if kind in block_sizes():
        stored = load_file(imported / "model.safetensors")
        matrices = [t for name, t in stored.items() if name.endswith(f".weight_{kind.lower()}")]
        _, size = block_sizes()[kind]
        assert len(matrices) > 10
        assert all(t.dtype == torch.uint8 and t.shape[1] % size == 0 for t in matrices)
        assert sum(t.numel() for t in matrices) > 0.8 * file.stat().st_size
        assert error(logits_of(imported, "cpu", dequantize=kind in ON_REQUEST), found) <= 2e-5


@pytest.mark.parametrize("kind", ["Q2_K", "IQ4_NL", "TQ2_0"])
def test_types_far_smaller_than_what_they_become_are_refused_unless_asked_for(
    make_checkpoint: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    rounded_blocks = rounded_checkpoint(make_checkpoint("llama", **WIDE), tmp_path / "rounded", kind)
    file = write_gguf(tmp_path / "rounded", tmp_path / "tiny.gguf", kind, blocks=rounded_blocks)
    imported = resolve_model(file, progress=False)
    with pytest.raises(ValueError, match=rf"weight is {kind}.*dequantize=true.*GiB in 16 bits instead of .*GiB"):
        load_decoder(imported, device="cpu")


@pytest.mark.parametrize("kind", [kind for kind in (*KINDS, *ON_REQUEST) if kind in block_sizes()])
def test_blocks_are_read_as_the_gguf_package_reads_them(kind: str, tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, dequantize

    block, size = block_sizes()[kind]
    raw = torch.randint(0, 256, (5, 768 // block * size), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}
    places |= {"Q4_K": (0, 2), "Q5_K": (0, 2), "TQ2_0": (64,)}
    blocks = raw.view(5, -1, size)
    for at in places.get(kind, (0,)):
        blocks[..., at + 1] &= 0x3B  # finite scales
    if kind == "MXFP4":
        blocks[..., 0] = 120  # an exponent
    wanted = torch.tensor(dequantize(raw.numpy(), GGMLQuantizationType[kind]))
    assert torch.equal(dequantized(raw, kind, (5, 768)), wanted)
    weight = gguf_weight(raw, kind, (5, 768))
    assert (weight is not None) == has_format(kind)
    if weight is not None:
        assert torch.equal(weight.dequantize(), wanted)
        assert weight.nbytes < 0.7 * 2 * wanted.numel()


def test_parts_that_run_together_may_be_of_different_types(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """As in llama.cpp's mixes: values and down projections of wider types."""
    mix = {"attn_q": "Q4_0", "attn_k": "Q4_0", "attn_v": "Q8_0", "attn_output": "Q4_1", "ffn_gate": "Q4_1"}
    mix |= {"ffn_up": "Q4_1", "ffn_down": "Q5_1", "token_embd": "Q8_0", "output": "Q8_0"}
    file, plain = write_gguf(make_checkpoint("llama", **WIDE), tmp_path / "tiny.gguf", mix), tmp_path / "plain"
    plain.mkdir()
    import_gguf(file, plain, progress=False)
    imported = resolve_model(file, progress=False)
    weights = [
        open_checkpoint(path, split_config(json.loads((path / "config.json").read_text()))[1])
        for path in (plain, imported)
    ]
    assert set(weights[0]) == set(weights[1])
    for name in weights[0]:
        torch.testing.assert_close(weights[1].view(name), weights[0].view(name), rtol=1e-6, atol=1e-6)
    for backend in ("torch", "cpu"):
        assert error(logits_of(imported, backend), logits_of(plain)) <= 2e-5


def test_caches_of_another_importer_are_not_used(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(make_checkpoint("llama"), tmp_path / "tiny.gguf")
    first = resolve_model(file, progress=False)
    recipe = default_recipe()
    for user in ("model_store", "default_model"):
        monkeypatch.setattr(f"dynamoe.dynamic.convert.{user}.importer_digest", lambda: "another")
    assert resolve_model(file, progress=False) != first
    assert default_recipe() != recipe


@pytest.mark.parametrize(
    "name",
    ["convert/gguf_norms.py", "checkpoint/gguf_blocks.py", "model/families.py", "model/family_tables/gemma.py",
     "model/family.py", "model/rope.py"],
)  # fmt: skip
def test_what_an_imported_file_follows_from_is_part_of_the_digest(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, read = importer_digest(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda file: read(file) + b"#" * file.as_posix().endswith(f"/{name}"))
    assert importer_digest() != before


def test_blocks_have_the_sizes_of_the_library() -> None:
    from gguf import GGML_QUANT_SIZES

    assert block_sizes() == {kind.name: sizes for kind, sizes in GGML_QUANT_SIZES.items() if sizes[0] > 1}


def test_blocks_behind_the_layers_are_named_and_hold_known_parts(
    make_checkpoint: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_gguf(make_checkpoint("qwen2_moe", mlp_only_layers=[2]), tmp_path / "known.gguf", edit=further_tokens)
    with caplog.at_level(logging.WARNING):
        resolve_model(file, progress=False)
    assert "what predicts further tokens is left out" in caplog.text
    assert "not known of qwen2_moe models" in caplog.text
    checkpoint = make_checkpoint("glm4_moe")

    def unknown(values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        further_tokens(values, tensors)
        tensors["blk.3.made_up.weight"] = torch.ones(4)

    with pytest.raises(CheckpointError, match=r"'blk\.3\.made_up\.weight' is not one of the model's"):
        resolve_model(write_gguf(checkpoint, tmp_path / "unknown.gguf", edit=unknown), progress=False)


@pytest.mark.parametrize(
    ("kind", "dtype"), [(None, "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16")]
)
def test_files_are_of_the_dtype_that_holds_their_numbers(
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    kind: str | None,
    dtype: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = write_gguf(make_checkpoint("llama", num_hidden_layers=1), tmp_path / "tiny.gguf", kind)
    imported = resolve_model(file, progress=False)
    assert json.loads((imported / "config.json").read_text())["dtype"] == dtype
    with caplog.at_level(logging.WARNING):
        decoder = load_decoder(imported, device="cpu", dtype="auto")
    assert ("it runs in float32, which holds the same numbers" in caplog.text) == (dtype == "float16")
    assert decoder.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)


@pytest.mark.parametrize("given", ["first", "last", "folder", "folder beside config.json"])
def test_a_model_that_was_split_is_found_by_any_part(
    make_checkpoint: Callable[..., Path], tmp_path: Path, given: str
) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    checkpoint = make_checkpoint("llama")
    write_gguf(checkpoint, folder / "tiny.gguf", split_max_tensors=9)
    parts = sorted(folder.iterdir())
    assert len(parts) > 2
    assert parts[0].name == f"tiny-00001-of-{len(parts):05}.gguf"
    if "config" in given:
        shutil.copy(checkpoint / "config.json", folder)
    path = {"first": parts[0], "last": parts[-1]}.get(given, folder)
    imported = resolve_model(path, progress=False)
    assert resolve_model(parts[1], progress=False) == imported
    assert error(logits_of(imported), transformers_logits(checkpoint)) <= 2e-5
