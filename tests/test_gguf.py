"""GGUF files: what is read directly and through transformers, dense and with experts, and codes that are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.gguf_import import import_gguf
from dynamoe.dynamic.loader import load_decoder
from dynamoe.dynamic.model_store import resolve_model
from dynamoe.dynamic.prompt_pass import fresh_cache
from dynamoe.dynamic.quantized_checkpoint import open_checkpoint, split_config
from dynamoe.dynamic.tokenizer import Tokenizer
from dynamoe.exits.segments import Segment
from dynamoe.kernels.tolerance import error
from safetensors.torch import load_file


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DYNAMOE_HOME", str(tmp_path / "home"))


def write_gguf(checkpoint: Path, file: Path, architecture: str, kinds: dict[str, str] | None = None) -> None:
    """A tiny checkpoint as llama.cpp's converter would write it, its weights in float32.

    Arguments:
        kinds: by GGUF's names of projections, what they are quantised to.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, quantize

    config = json.loads((checkpoint / "config.json").read_text())
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    writer = GGUFWriter(file, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if index < 3 else 1 for _, index in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    for name, token in (("bos", 1), ("eos", 2), ("pad", 0)):
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    if "num_local_experts" in config:
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if architecture == "granitemoe":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, weight in gguf_tensors(load_file(checkpoint / "model.safetensors")).items():
        part, kind = name.split(".")[-2:]
        if architecture != "qwen2" and kind == "weight" and part in heads:
            weight = weight.unflatten(0, (heads[part], 2, -1)).transpose(1, 2).flatten(0, 2)
        array = weight.contiguous().numpy()
        if part in (kinds or {}):
            raw_type = GGMLQuantizationType[(kinds or {})[part]]
            writer.add_tensor(name, quantize(array, raw_type), raw_dtype=raw_type)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By GGUF's names; the experts of a layer in one tensor."""
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
        "self_attn.o_proj": "attn_output",
        **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
        **dict.fromkeys(("mlp.gate", "block_sparse_moe.gate", "block_sparse_moe.router.layer"), "ffn_gate_inp"),
        "block_sparse_moe.router": "ffn_gate_inp",
    }
    parts = {"w1": "gate", "w3": "up", "w2": "down", **{f"{part}_proj": part for part in ("gate", "up", "down")}}
    out, experts = {}, dict[str, dict[int, torch.Tensor]]()
    for name, weight in weights.items():
        stem, kind = name.removesuffix(".weight"), "bias" if name.endswith(".bias") else "weight"
        stem, block = stem.removesuffix(".bias"), ""
        if stem.startswith("model.layers."):
            _, _, number, stem = stem.split(".", 3)
            block = f"blk.{number}."
        if ".experts." in stem and stem.split(".")[-2].isdigit():
            expert, part = stem.split(".")[-2:]
            experts.setdefault(f"{block}ffn_{parts[part]}_exps.weight", {})[int(expert)] = weight
        elif stem.endswith(("experts.gate_up_proj", "input_linear")):
            gate, up = weight.chunk(2, 1)
            out |= {f"{block}ffn_gate_exps.weight": gate, f"{block}ffn_up_exps.weight": up}
        elif stem.endswith(("experts.down_proj", "output_linear")):
            out[f"{block}ffn_down_exps.weight"] = weight
        else:
            out[f"{block}{names[stem]}.{kind}"] = weight
    return out | {name: torch.stack([e for _, e in sorted(of.items())]) for name, of in experts.items()}


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
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}]) == "hello"


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
    output = load_decoder(imported, dtype="bfloat16", backend="torch", device="cpu").layers[0].o
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
