"""GGUF files: what is read directly and through transformers, dense and with experts, and codes that are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.checkpoint.quantized_checkpoint import open_checkpoint, split_config
from dynamoe.dynamic.convert.gguf_import import import_gguf
from dynamoe.dynamic.convert.model_store import resolve_model
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.model.prompt_pass import fresh_cache
from dynamoe.dynamic.text.tokenizer import Tokenizer
from dynamoe.exits.segments import Segment
from dynamoe.kernels.api.tolerance import error
from gguf_files import write_gguf
from safetensors.torch import load_file


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DYNAMOE_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("mixtral", {}),
        ("granitemoe", {}),
        ("qwen2", {}),
    ],
    ids=["llama", "llama-tied", "mixtral", "granitemoe", "qwen2-through-transformers"],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_gguf_file_is_imported_once_and_is_the_model_it_was_made_from(
    family: str, settings: dict[str, Any], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = make_checkpoint(family, **settings)
    file = tmp_path / "tiny.gguf"
    write_gguf(checkpoint, file, ARCHITECTURES.get(family, family))
    imported = resolve_model(file, progress=False)
    assert resolve_model(str(file), progress=False) == imported
    ids = torch.tensor([[5, 9, 33, 100, 2, 7]])
    if family == "granitemoe":  # whose experts transformers does not know one by one
        before, after = (logits_of(folder, "torch") for folder in (checkpoint, imported))
    else:
        with torch.no_grad():
            before, after = (
                AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
                for folder in (checkpoint, imported)
            )
    assert before.equal(after)
    text = "The router, chooses them<|im_end|>\nall."
    tokenizer = Tokenizer.from_directory(imported)
    wanted = Tokenizer.from_directory(checkpoint).encode(text, add_special_tokens=False)
    assert tokenizer.encode(text, add_special_tokens=False) == wanted
    assert tokenizer.chat_prompt([{"role": "user", "content": "hello"}]) == "hello"


ARCHITECTURES = {"mixtral": "llama"}
ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
PROJECTIONS = (*ATTENTION, "ffn_gate", "ffn_up", "ffn_down")
EXPERTS = (*ATTENTION, "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
EVERYTHING = dict.fromkeys((*PROJECTIONS, *EXPERTS, "token_embd", "output"), "Q8_0")
MIXED = {"attn_q": "Q4_1", "attn_k": "Q4_1", "attn_v": "Q8_0", "attn_output": "Q4_0"}
WHOLE = {"intermediate_size": 64, "num_hidden_layers": 2}  # blocks are 32 inputs long and never ragged


@pytest.mark.parametrize(
    ("family", "kinds", "kept"),
    [
        ("llama", dict.fromkeys(PROJECTIONS, "Q4_0"), 14),
        ("llama", dict.fromkeys(PROJECTIONS, "Q4_1"), 14),
        ("llama", EVERYTHING, 16),
        ("llama", MIXED, 2),
        ("mixtral", EVERYTHING, 2 + 2 * (4 + 3 * 6)),
        ("mixtral", dict.fromkeys(EXPERTS, "Q4_0"), 2 * (4 + 3 * 6)),
        ("granitemoe", {**dict.fromkeys(EXPERTS, "Q4_1"), "token_embd": "Q8_0"}, None),
    ],
    ids=["Q4_0", "Q4_1", "Q8_0", "mixed", "mixtral-Q8_0", "mixtral-Q4_0", "granitemoe-Q4_1"],
)
def test_gguf_files_keep_their_codes(
    make_checkpoint: Callable[..., Path], tmp_path: Path, family: str, kinds: dict[str, str], kept: int | None
) -> None:
    """What the gguf package makes of the file is what the imported model runs on, in the memory of its codes."""
    file, plain = tmp_path / "tiny.gguf", tmp_path / "plain"
    write_gguf(make_checkpoint(family, **WHOLE), file, ARCHITECTURES.get(family, family), kinds)
    plain.mkdir()
    import_gguf(file, plain, progress=False)
    imported = resolve_model(file, progress=False)
    stored = load_file(imported / "model.safetensors")
    assert kept in (None, sum(name.endswith("_scale") for name in stored))
    assert kept is None or kept == sum(t.dtype in (torch.int8, torch.int32) for t in stored.values())
    weights = [
        open_checkpoint(path, split_config(json.loads((path / "config.json").read_text()))[1])
        for path in (plain, imported)
    ]
    assert set(weights[0]) == set(weights[1])
    for name in weights[0]:
        torch.testing.assert_close(weights[1].view(name), weights[0].view(name), rtol=1e-6, atol=1e-6)
    expected = logits_of(plain, "torch")
    for backend in ("torch", "cpu"):
        assert error(logits_of(imported, backend), expected) <= 2e-5
    output = load_decoder(imported, dtype="bfloat16", backend="torch", device="cpu").layers[0].attention.o
    assert output.nbytes / 64**2 < (1.2 if kinds["attn_output"] == "Q8_0" else 0.8)


def logits_of(path: Path, backend: str) -> torch.Tensor:
    """Of every position of a prompt, (T, V), float32."""
    ids = torch.randint(3, 320, (23,), generator=torch.Generator().manual_seed(1))
    decoder = load_decoder(path, dtype="float32", backend=backend, device="cpu")
    kv, batch = fresh_cache(decoder, [len(ids)])
    whole = Segment(index=0, layers=range(decoder.spec.num_layers))
    return decoder.logits(decoder.run_segment(whole, decoder.embed(ids), kv, batch))


@pytest.mark.parametrize(
    ("kept", "fault"), [(0.7, r"cut short: it has \d+ bytes, and 'blk\.\d+\.\S+' reaches"), (0.01, "header")]
)
def test_a_file_that_ends_early_is_named_with_the_tensor_it_ends_in(
    make_checkpoint: Callable[..., Path], tmp_path: Path, kept: float, fault: str
) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(make_checkpoint("llama"), file, "llama")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match=rf"model\.gguf is .*{fault}"):
        import_gguf(file, tmp_path / "target", progress=False)
    assert not (tmp_path / "target").exists()
