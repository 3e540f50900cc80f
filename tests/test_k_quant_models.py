"""GGUF files of mixed K-quants, as most people have them, run at their width: tokens are the dequantised model's."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import add_exits
from dynamoe.dynamic.convert.gguf_import import import_gguf
from dynamoe.dynamic.convert.model_store import resolve_model
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.llm import LLM
from dynamoe.dynamic.model.decoder import Decoder
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.model.prompt_pass import fresh_cache
from dynamoe.exits.segments import Segment
from dynamoe.kernels.api.tolerance import error
from gguf_files import write_gguf
from safetensors.torch import load_file

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
# As llama.cpp's Q4_K_M and Q5_K_M: what counts most is wider, so that queries, keys and values differ.
Q4_K_M = {"attn_q": "Q4_K", "attn_k": "Q4_K", "attn_v": "Q6_K", "attn_output": "Q4_K", "token_embd": "Q4_K"}
Q4_K_M |= {f"ffn_{part}": kind for part, kind in (("gate", "Q4_K"), ("up", "Q4_K"), ("down", "Q6_K"))}
Q4_K_M |= {f"{name}_exps": kind for name, kind in Q4_K_M.items() if name.startswith("ffn")} | {"output": "Q6_K"}
MIXES = {
    "Q4_K_M": Q4_K_M,
    "Q5_K_M": {name: "Q5_K" if kind == "Q4_K" else kind for name, kind in Q4_K_M.items()},
    "of all kinds": {**Q4_K_M, "attn_k": "Q8_0", "attn_v": "Q4_1", "attn_output": "Q4_0", "token_embd": "Q8_0"},
}
PROMPTS = [[5, 9, 33, 100, 7], list(range(40, 70))]
PARAMS = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=1)


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DYNAMOE_HOME", str(tmp_path / "home"))


@pytest.fixture
def files(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """The checkpoints that a file becomes: with its blocks, and dequantised."""

    def make(family: str, mix: dict[str, str]) -> tuple[Path, Path]:
        file = write_gguf(make_checkpoint(family, **WIDE), tmp_path / "tiny.gguf", mix)
        plain = tmp_path / "plain"
        plain.mkdir()
        import_gguf(file, plain, progress=False)
        return resolve_model(file, progress=False), plain

    return make


def answers(path: Path, backend: str, dtype: str) -> list[tuple[list[int], list[float]]]:
    """Tokens, and their log-probabilities."""
    llm = LLM(path, backend=backend, dtype=dtype, device="cpu", progress=False)
    outputs = [output.outputs[0] for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]
    return [
        (o.token_ids, [step[token].logprob for token, step in zip(o.token_ids, o.logprobs or [], strict=True)])
        for o in outputs
    ]


def logits_of(decoder: Decoder) -> torch.Tensor:
    ids_T = torch.arange(3, 40)
    kv, batch = fresh_cache(decoder, [len(ids_T)])
    whole = Segment(index=0, layers=range(decoder.spec.num_layers))
    return decoder.logits(decoder.run_segment(whole, decoder.embed(ids_T), kv, batch))


@pytest.mark.parametrize(
    ("family", "mix", "backend"),
    [
        ("mixtral", "Q4_K_M", "cpu"),
        ("mixtral", "Q4_K_M", "torch"),
        ("llama", "Q5_K_M", "cpu"),
        ("llama", "of all kinds", "cpu"),
        ("llama", "of all kinds", "torch"),
    ],
)
def test_tokens_are_those_of_the_dequantised_model(
    files: Callable[..., tuple[Path, Path]], family: str, mix: str, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    stored, plain = files(family, MIXES[mix])
    with caplog.at_level(logging.WARNING):
        found = answers(stored, backend, "float32")
    assert "dequantised" not in caplog.text
    for (tokens, logprobs), (wanted, expected) in zip(found, answers(plain, backend, "float32"), strict=True):
        assert tokens == wanted
        assert logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("isa", ["auto", "avx2", "portable"])
def test_bfloat16_is_as_near_as_with_plain_weights(files: Callable[..., tuple[Path, Path]], isa: str) -> None:
    """A dense model: where rows are rounded, a router may choose other experts."""
    stored, plain = files("llama", MIXES["Q4_K_M"])
    backend = "cpu" if isa == "auto" else f"cpu:{isa}"
    exact, *rounded = (
        logits_of(load_decoder(path, dtype=dtype, backend=backend, device="cpu"))
        for path, dtype in ((plain, "float32"), (plain, "bfloat16"), (stored, "bfloat16"))
    )
    expected, found = ((logits - exact).norm() / exact.norm() for logits in rounded)
    assert found < expected  # whose weights were rounded to bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_call_gives_the_bits_of_single_operations(
    files: Callable[..., tuple[Path, Path]], tmp_path: Path, dtype: str
) -> None:
    """With exits too, whose keys and values are the tail of a layer of several parts."""
    stored, _ = files("mixtral", MIXES["Q4_K_M"])
    path = tmp_path / "with exits"
    shutil.copytree(stored, path)
    add_exits(path, {1: 0.5})
    early = SamplingParams(**{**vars(PARAMS), "quality": None, "exit_thresholds": {1: 0.5}})
    results: list[Any] = []
    for single in (False, True):
        llm = LLM(path, backend="cpu", dtype=dtype, progress=False)
        decoder = llm.model.decoder
        assert decoder.stack is not None
        if single:
            decoder.stack = None
        logits = logits_of(decoder)
        outputs = [o.outputs[0] for o in llm.generate(PROMPTS, early, use_tqdm=False)]
        results.append((logits.tolist(), [(o.token_ids, copy.copy(o.layers)) for o in outputs]))
    assert results[0] == results[1]
    assert {depth for _, layers in results[0][1] for depth in layers} == {1, 2}


@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
def test_a_model_takes_what_its_file_takes(files: Callable[..., tuple[Path, Path]], backend: str) -> None:
    stored, plain = files("mixtral", MIXES["Q4_K_M"])
    tensors = load_file(stored / "model.safetensors")
    blocks = sum(t.nbytes for name, t in tensors.items() if ".weight_q" in name)
    others = sum(t.numel() * 2 for name, t in tensors.items() if ".weight_q" not in name)
    assert blocks > 10 * others
    decoder = load_decoder(stored, dtype="bfloat16", backend=backend, device="cpu")
    assert blocks + others <= decoder.weight_bytes <= 1.03 * (blocks + others)
    wide = load_decoder(plain, dtype="bfloat16", backend=backend, device="cpu")
    assert decoder.weight_bytes < 0.35 * wide.weight_bytes


def test_gate_and_up_of_different_types_run_apart(
    files: Callable[..., tuple[Path, Path]], caplog: pytest.LogCaptureFixture
) -> None:
    stored, plain = files("llama", {**MIXES["Q4_K_M"], "ffn_up": "Q6_K"})
    with caplog.at_level(logging.WARNING):
        found = logits_of(load_decoder(stored, dtype="float32", backend="cpu", device="cpu"))
    assert "experts whose projections are in different formats" in caplog.text
    assert error(found, logits_of(load_decoder(plain, dtype="float32", backend="cpu", device="cpu"))) <= 2e-5
