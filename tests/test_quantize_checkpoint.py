"""Checkpoints quantised layer by layer: written, read back by us and by compressed-tensors, gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.checkpoint.quantized_checkpoint import open_checkpoint, split_config
from dynamoe.dynamic.cli.main import main
from dynamoe.dynamic.model.decoder import Decoder
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.model.prompt_pass import fresh_cache
from dynamoe.dynamic.quantize import driver
from dynamoe.dynamic.quantize.driver import PROGRESS, REPORT, quantize_checkpoint
from dynamoe.dynamic.quantize.methods import CalibratedMethod
from dynamoe.exits.segments import Segment
from dynamoe.kernels.api.tolerance import error
from safetensors.torch import load_file, save_file

METHODS = [
    CalibratedMethod(name="gptq", group=32),
    CalibratedMethod(name="awq", group=32, symmetric=False),
    CalibratedMethod(name="smoothquant"),
]
TEXT_NL = torch.randint(3, 320, (8, 48), generator=torch.Generator().manual_seed(5))


def logits_of(decoder: Decoder, ids: torch.Tensor = TEXT_NL[0]) -> torch.Tensor:
    """Of every position of one prompt, (T, V)."""
    kv, batch = fresh_cache(decoder, [len(ids)])
    whole = Segment(index=0, layers=range(decoder.spec.num_layers))
    return decoder.logits(decoder.run_segment(whole, decoder.embed(ids), kv, batch))


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a sharded checkpoint."""
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize(
    "family",
    ["llama", "qwen2_moe", "granitemoe", "glm4_moe", pytest.param("granitemoeshared", marks=pytest.mark.slow)],
)
def test_written_checkpoints_are_what_compressed_tensors_makes_of_them(
    make_checkpoint: Callable[..., Path], tmp_path: Path, family: str, method: CalibratedMethod
) -> None:
    """Dequantised by that library and stored as a plain checkpoint, the weights give the logits that ours give."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    sizes: dict[str, Any] = {"intermediate_size": 64} if family != "qwen2_moe" else {}
    if family == "qwen2_moe":
        sizes = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 96}
    if family == "glm4_moe":
        sizes["moe_intermediate_size"] = 64
    if family == "granitemoeshared":
        sizes["shared_intermediate_size"] = 96
    source, ours, theirs = make_checkpoint(family, **sizes), tmp_path / "ours", tmp_path / "theirs"
    report = quantize_checkpoint(source, ours, TEXT_NL, method, progress=False, say=lambda line: None)
    assert [layer["layer"] for layer in report["layers"]] == [0, 1, 2]
    assert json.loads((ours / REPORT).read_text()) == report
    assert not (ours / PROGRESS).exists()
    assert not list(ours.glob("stream*"))
    assert (ours / "tokenizer.json").exists()
    config = json.loads((ours / "config.json").read_text())
    settings = config.pop("quantization_config")
    scheme = QuantizationConfig.model_validate(settings).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(settings["format"])
    stored = tensors_of(ours)
    kept = ("weight", "bias", "e_score_correction_bias")
    plain = {name: t for name, t in stored.items() if name.rpartition(".")[2] in kept}
    for scale in [name for name in stored if name.endswith("weight_scale")]:
        module = scale.removesuffix(".weight_scale")
        parts = {name.rpartition(".")[2]: t for name, t in stored.items() if name.rpartition(".")[0] == module}
        parts.pop("bias", None)
        plain[f"{module}.weight"] = compressor.decompress(parts, scheme)["weight"].float().contiguous()
    theirs.mkdir()
    save_file(plain, theirs / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "generation_config.json"):
        (theirs / name).write_bytes((ours / name).read_bytes())
    (theirs / "config.json").write_text(json.dumps(config))
    read = open_checkpoint(ours, split_config(json.loads((ours / "config.json").read_text()))[1])
    assert set(read) == set(plain)
    assert all(error(read.view(name), weight) <= 1e-6 for name, weight in plain.items())
    found = logits_of(load_decoder(ours, dtype="float32", backend="torch", device="cpu"))
    original = logits_of(load_decoder(source, dtype="float32", backend="torch", device="cpu"))
    assert error(original, found) > 1e-4
    if method.name != "smoothquant":  # whose activations are rounded as well
        expected = logits_of(load_decoder(theirs, dtype="float32", backend="torch", device="cpu"))
        assert error(expected, found) <= 2e-5
        assert error(logits_of(load_decoder(ours, dtype="float32", backend="cpu")), found) <= 2e-5


def test_side_by_side_experts_are_written_one_by_one(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Our own family's layout, with experts whose width is no multiple of a group, and biases of attention."""
    source, ours = make_side_by_side(make_checkpoint("llama"), tmp_path / "source"), tmp_path / "ours"
    method = CalibratedMethod(name="gptq", group=32)
    quantize_checkpoint(source, ours, TEXT_NL, method, progress=False, say=lambda line: None)
    assert "model.layers.0.mlp.experts.3.down_proj.weight_packed" in tensors_of(ours)
    found, original = (logits_of(load_decoder(path, dtype="float32")) for path in (ours, source))
    assert error(found, original) > 1e-3
    closer = (found - original).norm() / original.norm()
    nearest = logits_of(load_decoder(source, dtype="float32", quantization="int4-g32", quantize_lm_head=False))
    assert closer < (nearest - original).norm() / original.norm()


def make_side_by_side(dense: Path, target: Path) -> Path:
    """A dense model's FFN of 96 neurons as 4 experts of 24, of which each token uses 1 always and 2 that are routed."""
    target.mkdir()
    for file in dense.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((dense / "config.json").read_text())
    experts = {"num_experts": 4, "num_always_on_experts": 1, "num_experts_per_tok": 2, "expert_size": 24}
    (target / "config.json").write_text(json.dumps({**config, "model_type": "dynamoe", **experts}))
    weights = load_file(dense / "model.safetensors")
    for number in range(config["num_hidden_layers"]):
        router = torch.randn(3, config["hidden_size"], generator=torch.Generator().manual_seed(number))
        weights[f"model.layers.{number}.mlp.router.weight"] = router
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def fail_for_config(write: Callable[..., None]) -> Callable[..., None]:
    def failing(file: Path, content: dict[str, Any]) -> None:
        if file.name == "config.json":
            raise KeyboardInterrupt
        write(file, content)

    return failing


def test_an_interrupted_run_goes_on_where_it_was(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, whole, cut = make_checkpoint("mixtral"), tmp_path / "whole", tmp_path / "cut"
    method = METHODS[0]

    def run(target: Path, method: CalibratedMethod = method) -> None:
        quantize_checkpoint(source, target, TEXT_NL, method, progress=False, say=lambda line: None)

    run(whole)
    done: list[int] = []
    one_layer = driver._one_layer

    def interrupted(origin: Any, target: Path, number: int, *rest: Any) -> Any:
        if number == 2 and 2 not in done:
            done.append(2)
            raise KeyboardInterrupt
        done.append(number)
        return one_layer(origin, target, number, *rest)

    monkeypatch.setattr(driver, "_one_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(cut)
    assert not (cut / "config.json").exists()
    with pytest.raises(ValueError, match="unfinished run with other settings"):
        run(cut, replace(method, group=64))
    monkeypatch.setattr(driver, "write_json", fail_for_config(driver.write_json))
    with pytest.raises(KeyboardInterrupt):
        run(cut)  # all layers are done, the configuration is not written
    monkeypatch.undo()
    run(cut)
    assert done == [0, 1, 2, 2]
    first, second = tensors_of(whole), tensors_of(cut)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ValueError, match="holds a model already"):
        run(cut)
    with pytest.raises(ValueError, match="quantised already"):
        quantize_checkpoint(whole, tmp_path / "again", TEXT_NL, method)
    with pytest.raises(ValueError, match="leave quantization=int8 away"):
        load_decoder(whole, quantization="int8")


def test_the_command(
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = make_checkpoint("qwen3_moe")
    monkeypatch.chdir(tmp_path)
    common = ["prepare", f"model={source}", "windows=4", "window_tokens=32"]
    assert main([*common, "quantization=awq", "output=out", "group=32"]) == 0
    assert "out: awq; largest error of a layer" in capsys.readouterr().out
    assert logits_of(load_decoder(tmp_path / "out", dtype="bfloat16")).isfinite().all()
    for wrong, message in (
        (["quantization=awq"], "output=DIRECTORY is needed"),
        (["quantization=awg", "output=x"], "gptq, awq, smoothquant, not 'awg'"),
        (["output=x"], "goes with quantization="),
        (["quantization=gptq", "output=out"], "holds a model already"),
        (["quantization=gptq", "output=x", "windows=0"], "windows must be at least 1"),
    ):
        assert main([*common, *wrong]) == 2
        assert message in capsys.readouterr().err
