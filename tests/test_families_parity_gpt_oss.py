"""gpt-oss against transformers: sinks, biases, windows, the clamped activation, and experts in MXFP4."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.checkpoint.weights import CheckpointError
from dynamoe.dynamic.convert.model_store import resolve_model
from dynamoe.dynamic.model.decoder import Decoder
from dynamoe.dynamic.model.families import model_spec
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.model.rope import rope_table
from dynamoe.kernels.api.formats import MXFP4
from dynamoe.kernels.cpu.quantized import CpuQuantExperts
from family_parity import ENGINE_PATHS, Variant, check_engine, check_logits
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file
from test_decoder import PagedSequences, error, random_prompts

EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 4, "head_dim": 16}
YARN = {
    **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0},
    **{"truncate": False, "original_max_position_embeddings": 64},
}
EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
SMALL = {**EXPERTS, "sliding_window": 12, "rope_parameters": YARN}


def prepare(model: torch.nn.Module) -> None:
    """Gates and ups that reach the limits of the activation, and sinks that take a good part of the attention."""
    for name, parameter in model.named_parameters():
        if name.endswith("gate_up_proj"):
            parameter *= 5
        if name.endswith("down_proj"):
            parameter *= 0.2
        if name.endswith("sinks"):
            parameter += 1.0


def rounded(weight_EIO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (E, O, G, 32) and exponents (E, O, G) of a weight in groups of 32 inputs."""
    groups = weight_EIO.transpose(1, 2).unflatten(2, (-1, 32))
    exponents = groups.abs().amax(-1).log2().floor() - 2
    numbers = MXFP4.codes.numbers(MXFP4.codes.pack(torch.arange(16, dtype=torch.uint8)), 16)
    scaled = groups * torch.exp2(-exponents)[..., None]
    return (scaled[..., None] - numbers).abs().argmin(-1).to(torch.uint8), exponents


def to_mxfp4(directory: Path) -> None:
    """What published checkpoints look like: the experts' weights are 4-bit floats, with a power of two for 32."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(EXPERT_WEIGHTS)]:
        codes, exponents = rounded(tensors.pop(name))
        tensors[f"{name}_blocks"] = MXFP4.codes.pack(codes).contiguous()
        tensors[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
    save_file(tensors, file, metadata={"format": "pt"})
    modules = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    edit_config(directory, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": modules})


def to_what_mxfp4_holds(directory: Path) -> None:
    """The same numbers, stored as they are."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(EXPERT_WEIGHTS)]:
        codes, exponents = rounded(tensors[name])
        numbers = MXFP4.codes.numbers(MXFP4.codes.pack(codes), 32) * torch.exp2(exponents)[..., None]
        tensors[name] = numbers.flatten(2).transpose(1, 2).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(directory: Path, **keys: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **keys}))


def variant(edit: Callable[[Path], None] | None = None, **config: Any) -> Variant:
    return Variant(family="gpt_oss", config={**SMALL, **config}, prepare=prepare, edit=edit)


def reference(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM, Mxfp4Config

    quantised = "quantization_config" in json.loads((directory / "config.json").read_text())
    settings = {"quantization_config": Mxfp4Config(dequantize=True)} if quantised else {}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager", **settings)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The directory of a variant, written once."""

    @cache
    def directory(kind: str) -> Path:
        made = VARIANTS[kind]
        return made.save(tmp_path_factory.mktemp(kind))

    return directory


VARIANTS = {
    "mxfp4": variant(to_mxfp4),
    "plain": variant(),
    "rounded": variant(to_what_mxfp4_holds),
    "full": variant(
        layer_types=["full_attention"] * 4, rope_parameters={"rope_type": "default", "rope_theta": 150000.0}
    ),
    "unbiased": variant(attention_bias=False, tie_word_embeddings=True, num_key_value_heads=1, sliding_window=5),
}


@pytest.mark.parametrize(
    "kind", ["mxfp4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in VARIANTS if kind != "mxfp4")]
)
def test_logits_and_tokens_are_those_of_transformers(kind: str, saved: Callable[..., Path]) -> None:
    directory = saved(kind)
    model = reference(directory)
    decoder = check_logits(directory, model)
    assert decoder.stack is not None
    check_engine(directory, model, paths=("together", "chunked") if kind == "mxfp4" else tuple(ENGINE_PATHS))


@pytest.mark.parametrize("kinds", [None, {f"ffn_{part}_exps": "MXFP4" for part in ("gate", "up", "down")}])
def test_gguf_files_are_the_same_model(
    kinds: dict[str, str] | None, saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As numbers, and with the experts in GGUF's blocks, whose nibbles have another order."""
    monkeypatch.setenv("DYNAMOE_HOME", str(tmp_path / "home"))
    directory = saved("rounded")
    imported = resolve_model(write_gguf(directory, tmp_path / "tiny.gguf", kinds, pre="gpt-4o"), progress=False)
    decoder = check_logits(imported, reference(directory))
    data = decoder.layers[0].ffn.data
    assert isinstance(data, CpuQuantExperts) == (kinds is not None)
    if kinds is not None:
        assert data.gate_up_layout.format == data.down_layout.format == MXFP4.cpu


@pytest.mark.slow  # interpreted kernels
@pytest.mark.parametrize("kind", ["mxfp4", "plain"])
def test_the_gpu_backend_gives_the_same_logits(kind: str, saved: Callable[..., Path]) -> None:
    check_logits(saved(kind), reference(saved(kind)), backend="triton")


def test_mxfp4_takes_little_more_memory_than_the_file(saved: Callable[..., Path]) -> None:
    """Numbers of 4 bits and a byte for 32; the 6 experts of 96 neurons and 64 channels fill whole blocks of 32."""
    for backend in ("cpu", "torch"):
        decoder = load_decoder(saved("mxfp4"), dtype="bfloat16", device="cpu", backend=backend)
        biases = 6 * (2 * 96 + 64) * (4 if backend == "cpu" else 2)
        assert decoder.layers[0].ffn.nbytes - biases == 6 * 3 * 64 * 96 * 17 // 32


def test_a_row_is_the_same_whatever_is_beside_it(saved: Callable[..., Path]) -> None:
    prompts = random_prompts([19, 33, 6])
    for dtype in ("float32", "bfloat16"):
        decoder = load_decoder(saved("mxfp4"), dtype=dtype, device="cpu")
        together = PagedSequences(decoder, 3).run(prompts)
        alone = [PagedSequences(decoder, 1).run([prompt]) for prompt in prompts]
        assert torch.equal(together, torch.cat(alone))
        decoder.stack = None  # operation by operation
        assert torch.equal(PagedSequences(decoder, 3).run(prompts), together)


PARTS = {
    "sinks": lambda name: name.endswith("sinks"),
    "biases of attention": lambda name: "self_attn" in name and name.endswith("bias"),
    "biases of routers": lambda name: name.endswith("router.bias"),
    "biases of gate and up": lambda name: name.endswith("gate_up_proj_bias"),
    "biases of down": lambda name: name.endswith("down_proj_bias"),
}


@pytest.mark.parametrize("part", PARTS)
def test_every_part_matters(part: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(saved("mxfp4"), changed := tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    names = [name for name in tensors if PARTS[part](name)]
    assert len(names) >= 4
    tensors |= {name: torch.zeros_like(tensors[name]) for name in names}
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    first, second = (logits(load_decoder(path, dtype="float32", device="cpu")) for path in (saved("mxfp4"), changed))
    assert error(first, second) > 1e-2


@pytest.mark.parametrize("what", ["limits", "windows", "truncation"])
def test_every_rule_matters(what: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    decoder = load_decoder(saved("mxfp4"), dtype="float32", device="cpu", backend="torch")
    with_rule = logits(decoder)
    if what == "limits":
        layers = [replace(layer, ffn=replace(layer.ffn, activation="silu")) for layer in decoder.layers]
        decoder.layers = tuple(layers)
    elif what == "windows":
        whole = (replace(layer, attention=replace(layer.attention, window=None)) for layer in decoder.spec.layers)
        decoder.spec = replace(decoder.spec, layers=tuple(whole))
    else:
        decoder.rope_tables = (rope_table(replace(decoder.spec.rope, truncate=True), 512),) * 4
    assert error(logits(decoder), with_rule) > 1e-3


def logits(decoder: Decoder) -> torch.Tensor:
    return PagedSequences(decoder, 1).run(random_prompts([40]))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("swiglu_limit", 10.0),
        ("swiglu_alpha", 1.0),
        ("layer_types", ["full_attention"] * 3),
        ("layer_types", ["chunked_attention"] * 4),
        ("sliding_window", None),
        ("sliding_window", 0),
        ("num_shared_experts", 1),
        ("quant_method", "mxfp8"),
        ("modules_to_not_convert", "lm_head"),
        ("block_size", 16),
    ],
)
def test_a_value_that_cannot_be_honoured_is_refused(
    key: str, value: object, saved: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(saved("mxfp4"), changed := tmp_path / "changed")
    settings = json.loads((changed / "config.json").read_text())["quantization_config"]
    inner = key in ("quant_method", "modules_to_not_convert", "block_size")
    edit_config(changed, **({"quantization_config": {**settings, key: value}} if inner else {key: value}))
    with pytest.raises(CheckpointError, match=key):
        load_decoder(changed, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(f"{name}_scales"), "lacks its tensor .*scales"),
        (lambda tensors, name: tensors.pop(f"{name}_blocks"), "lacks its tensor .*blocks"),
        (lambda tensors, name: tensors.pop(f"{name}_bias"), "and 11 more"),
        (lambda tensors, name: tensors[f"{name}_scales"].fill_(255), "of scales are NaN"),
        (
            lambda tensors, name: tensors.update({f"{name}_scales": tensors[f"{name}_scales"][:, :, :1].clone()}),
            "shape",
        ),
        (lambda tensors, name: tensors.update({name: torch.zeros(6, 64, 192)}), "stored twice"),
    ],
)
def test_damaged_experts_are_refused_by_name(
    change: Callable[..., Any], message: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(saved("mxfp4"), changed := tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    change(tensors, "model.layers.1.mlp.experts.gate_up_proj")
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"model.layers.1.mlp.experts.*({message})"):
        load_decoder(changed, device="cpu")


def test_missing_settings_are_those_of_transformers() -> None:
    from transformers import GptOssConfig

    theirs = GptOssConfig(num_hidden_layers=3)
    keys = ("model_type", "num_hidden_layers", "num_local_experts", "num_experts_per_tok", "vocab_size", "hidden_size")
    keys += ("intermediate_size", "num_attention_heads", "max_position_embeddings")
    written = theirs.to_dict()
    assert model_spec({key: written[key] for key in keys}) == replace(model_spec(written), bos_token_id=None)
