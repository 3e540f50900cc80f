"""Parts of attention that few families have: each decides something, on all paths of the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import add_exits
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.model.decoder import Decoder
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.quantize.driver import quantize_checkpoint
from dynamoe.dynamic.quantize.methods import CalibratedMethod
from dynamoe.kernels.api.tolerance import error
from parallel_jobs import compare
from test_decoder import random_prompts
from test_families_parity_attention import VARIANTS
from test_quant_model import logits_of, prompt_of
from test_quantize_checkpoint import TEXT_NL

BY_FAMILY = {variant.family: variant for variant in VARIANTS}
SETTINGS = {"dtype": "float32", "device": "cpu"}
IDS = prompt_of(90)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a family's first variant."""
    found: dict[str, Path] = {}

    def save(family: str) -> Path:
        if family not in found:
            found[family] = BY_FAMILY[family].save(tmp_path_factory.mktemp(family))
        return found[family]

    return save


def without_rope(decoder: Decoder) -> None:
    """All layers rotate as the first does."""
    decoder.spec = replace(decoder.spec, layers=tuple(replace(layer, rope=None) for layer in decoder.spec.layers))


def with_attention(**fields: Any) -> Callable[[Decoder], None]:
    def change(decoder: Decoder) -> None:
        layers = [replace(layer, attention=replace(layer.attention, **fields)) for layer in decoder.spec.layers]
        decoder.spec = replace(decoder.spec, layers=tuple(layers))

    return change


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("smollm3", without_rope),
        ("mellum", without_rope),
        ("ministral3", with_attention(growth=None)),
        ("llama4_text", without_rope),
        ("llama4_text", with_attention(growth=None)),
        ("llama4_text", with_attention(chunk=None)),
        ("llama4_text", with_attention(unit_norm=False)),
        ("mimo_v2_flash", with_attention(value_scale=1.0)),
        ("mimo_v2_flash", with_attention(window=None)),
        ("hunyuan_v1_dense", with_attention(norm_after_rotation=False)),
    ],
)
def test_each_part_decides_something(
    saved: Callable[[str], Path], family: str, change: Callable[[Decoder], None]
) -> None:
    decoder = load_decoder(saved(family), **SETTINGS)
    decoder.stack = None  # operation by operation, so that a change of the description matters
    expected = logits_of(decoder, IDS)
    assert torch.equal(logits_of(decoder, IDS), expected)
    change(decoder)
    decoder._make_tables(decoder.cos_sin_LC.shape[0])
    assert error(logits_of(decoder, IDS), expected) > 1e-3


def test_rows_do_not_depend_on_those_beside(saved: Callable[[str], Path]) -> None:
    """Bitwise: alone, together, in small chunks of prompts that cross chunks of attention, and with exits."""
    for family in ("llama4_text", "mimo_v2_flash", "ministral3"):
        path = saved(family)
        add_exits(path, {1: 0.4, 2: 0.4})
        model = load_model(path, dtype="bfloat16", device="cpu", progress=False)
        settings = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, "quality": None, "logprobs": 2}
        params = SamplingParams(**settings, exit_thresholds={1: 0.5, 2: 0.5})
        prompts = random_prompts([5, 17, 2, 70])
        together = run(Engine(model, EngineConfig(enable_prefix_caching=False)), prompts, params)
        engine = Engine(model, EngineConfig(enable_prefix_caching=False, max_num_batched_tokens=13))
        assert [run(engine, [prompt], params)[0] for prompt in prompts] == together
        assert run(engine, prompts, SamplingParams(**settings)) != together


def run(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[Any]]:
    out: dict[str, list[Any]] = {}
    for number, prompt in enumerate(prompts):
        out[str(number)] = []
        engine.add_request(str(number), prompt, params)
    while engine.has_unfinished():
        for delta in engine.step():
            completion = delta.completions[0]
            out[delta.request_id] += [*completion.token_ids, *(completion.logprobs or [])]
    return list(out.values())


@pytest.mark.parametrize("family", ["phi3", "glm4", "llama4_text", "mimo_v2_flash"])
def test_quantised_copies_keep_the_order_of_the_file(saved: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    """Rows that the decoder keeps in another order are written where the configuration expects them."""
    path = saved(family)
    method = CalibratedMethod(name="gptq" if family == "glm4" else "smoothquant", group=32)
    quantize_checkpoint(path, tmp_path / "copy", TEXT_NL, method, progress=False, say=lambda line: None)
    expected = logits_of(load_decoder(path, **SETTINGS), IDS)
    change = logits_of(load_decoder(tmp_path / "copy", **SETTINGS), IDS) - expected
    assert change.norm() / expected.norm() < (0.6 if family == "glm4" else 0.3)  # 4 bits, 8 bits


@pytest.mark.parametrize("method", ["int8", "int4"])
@pytest.mark.parametrize("family", ["phi3", "llama4_text", "mimo_v2_flash"])
def test_quantised_logits_are_those_of_the_oracle(saved: Callable[[str], Path], family: str, method: str) -> None:
    path = saved(family)
    expected = logits_of(load_decoder(path, **SETTINGS, backend="torch", quantization=method), IDS)
    decoder = load_decoder(path, **SETTINGS, backend="cpu", quantization=method)
    assert error(logits_of(decoder, IDS), expected) <= 2e-5
    assert error(logits_of(load_decoder(path, **SETTINGS), IDS), expected) > 1e-3


def test_what_cannot_be_is_refused_by_name(saved: Callable[[str], Path]) -> None:
    model = load_model(saved("llama4_text"), dtype="float32", device="cpu", progress=False)
    with pytest.raises(ValueError, match="block_size=64 does not divide the model's chunks of 32 positions"):
        Engine(model, EngineConfig(block_size=64))
    decoder = load_decoder(saved("phi3"), **SETTINGS)
    with pytest.raises(ValueError, match="a context of 257 tokens exceeds the model's maximum of 256"):
        decoder.reserve_positions(257)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["phi3", "glm4", "llama4_text", "mimo_v2_flash", "ministral3", "smollm3"])
@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"pipeline": 2}], ids=str)
def test_tokens_of_several_processes(
    saved: Callable[[str], Path], tmp_path: Path, family: str, sizes: dict[str, int]
) -> None:
    compare(tmp_path, str(saved(family)), sizes)
