"""Layers of other blocks than Llama's on paths beside the engine's own: several processes, calibrated quantisation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.quantize.driver import quantize_checkpoint
from dynamoe.dynamic.quantize.methods import CalibratedMethod
from parallel_jobs import compare
from test_decoder import PagedSequences, random_prompts
from test_families_parity_norms import of_family

TEXT_NL = torch.randint(3, 320, (4, 32), generator=torch.Generator().manual_seed(5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "axis"),
    [
        *(("olmo2", axis) for axis in ("tensor", "pipeline")),
        *((family, "tensor") for family in ("gemma2", "gemma3_text", "phimoe", "cohere2_moe", "afmoe")),
        *((family, "expert") for family in ("flex_olmo", "phimoe", "cohere2_moe", "afmoe")),
    ],
)
def test_tokens_of_several_processes_are_those_of_one(family: str, axis: str, tmp_path: Path) -> None:
    compare(tmp_path, str(of_family(family).save(tmp_path / "model")), {axis: 2}, {"dtype": "float32"})


@pytest.mark.parametrize("family", ["gemma2", "olmo2", pytest.param("phimoe", marks=pytest.mark.slow)])
def test_gptq_leaves_norms_as_they_are(family: str, tmp_path: Path) -> None:
    source, target, prompts = of_family(family).save(tmp_path / "source"), tmp_path / "target", random_prompts([40])
    method = CalibratedMethod(name="gptq", group=32)
    quantize_checkpoint(source, target, TEXT_NL, method, progress=False, say=lambda line: None)
    exact, quantised = (load_decoder(path, dtype="float32", device="cpu") for path in (source, target))
    for ours, theirs in zip(exact.layers, quantised.layers, strict=True):
        assert ours.norms.keys() == theirs.norms.keys()
        assert all(torch.equal(norm, theirs.norms[name]) for name, norm in ours.norms.items())
    assert torch.equal(exact.final_norm_D, quantised.final_norm_D)
    expected, found = (PagedSequences(decoder, 1).run(prompts) for decoder in (exact, quantised))
    assert 0 < float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median()) < 0.5


@pytest.mark.parametrize("name", ["awq", "smoothquant"])
def test_methods_that_scale_inputs_are_refused(name: str, tmp_path: Path) -> None:
    source, method = of_family("gemma2").save(tmp_path / "source"), CalibratedMethod(name=name)
    with pytest.raises(ValueError, match=f"quantization={name} folds scales into norms .* those of gemma2 are others"):
        quantize_checkpoint(source, tmp_path / "target", TEXT_NL, method, progress=False, say=lambda line: None)
