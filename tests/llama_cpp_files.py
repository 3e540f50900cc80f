"""Files that llama.cpp wrote, loaded here: against transformers, and against llama.cpp. Run by hand.

``python tests/llama_cpp_files.py LLAMA_CPP [--build BIN --bindings FOLDER] [--family NAME …] [--vocabularies]``

``LLAMA_CPP`` is a folder of its sources, ``BIN`` one with its programs and libraries, ``FOLDER`` that of the bindings
``llama_cpp``. Each family's random tiny checkpoint goes through ``convert_hf_to_gguf.py``: the file must give
transformers' logits and greedy tokens, and the tokenizer's ids. With a build, llama.cpp computes logits of a larger
one, and ``llama-quantize`` writes further files; those are compared with what it makes of them in float32 again, and
with llama.cpp's logits by their cosine, since it rounds the inputs of quantised weights.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import models_table
import test_gguf_families
import torch
from conftest import FAMILIES
from dynamoe.dynamic.checkpoint.directory import write_json
from dynamoe.dynamic.checkpoint.weights import read_json
from dynamoe.dynamic.convert.default_model import dense_default_file
from dynamoe.dynamic.convert.gguf_import import import_gguf
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.text.tokenizer import Tokenizer
from family_parity import Variant, check_logits, expected_tokens, generate
from llama_cpp_tools import TRAINED_TOKENS, Converter, LlamaCpp, read_tokenizer, train_sentence_piece
from safetensors.torch import load_file, save_file
from test_decoder import TOLERANCE, PagedSequences, error, random_prompts
from test_families_parity_attention import FULL, SLIDING
from test_families_parity_gpt_oss import to_mxfp4, to_what_mxfp4_holds
from test_families_parity_latent import YARN

NEW_TOKENS = 16
QUANTISED = ("Q4_K_M", "Q8_0", "Q5_K_M", "Q4_0")
TRAINED, TRAINED_BARE = "sentencepiece", "sentencepiece without spaces in front"  # vocabularies that are trained here
# Vocabularies that a family's converter wants; the others get the default model's.
VOCABULARIES = {
    **dict.fromkeys(("mistral", "mixtral", "ernie4_5", "ernie4_5_moe", "phi3", "phimoe", "jamba"), TRAINED),
    **dict.fromkeys(("gemma2", "gemma3_text"), TRAINED_BARE),
    **{"qwen2": "qwen2", "qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35"},
    "gemma4_text": "gemma-4",
}
# Whose converters want vocabularies that are not at hand: they get the default model's by another function of theirs.
OTHER_VOCABULARY = ("hunyuan_v1_moe", "deepseek_v32")
# In place of the default model's special tokens, from its fourth one: converters of GLM and Solar Open look for them.
SPECIAL = ("[gMASK]", "<|user|>", "<|observation|>", "<unk>", "<|startoftext|>")
# What files cannot say, or converters leave away.
SETTINGS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "ernie4_5_moe": {"moe_norm_min": 1e-12},
    "deepseek_v3": {"attention_bias": False},
    "deepseek_v2": {"rope_parameters": {**YARN, "mscale": YARN["mscale_all_dim"]}},
    "hunyuan_v1_dense": {"max_position_embeddings": 32768},
    "hunyuan_v1_moe": {"moe_topk": 3, "num_shared_expert": 1},
    "jamba": {"num_hidden_layers": 4},
    "olmoe": {"num_key_value_heads": 4},
    "dots1": {"num_key_value_heads": 4},
}
# Keys of published checkpoints that transformers 5 writes otherwise, or not at all.
PUBLISHED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    **dict.fromkeys(
        ("deepseek_v3", "deepseek_v32", "glm_moe_dsa", "glm4_moe", "dots1", "minimax_m2", "afmoe", "exaone_moe"),
        lambda config: {"scoring_func": "sigmoid"},
    ),
    "phimoe": lambda config: {
        "architectures": ["PhiMoEForCausalLM"],
        "original_max_position_embeddings": config["max_position_embeddings"],
    },
    "phi3": lambda config: {
        "original_max_position_embeddings": config.get("original_max_position_embeddings")
        or config["max_position_embeddings"]
    },
    "glm4_moe_lite": lambda config: {"first_k_dense_replace": config["mlp_layer_types"].count("dense")},
    "hunyuan_v1_moe": lambda config: {
        key: [config[of]] * config["num_hidden_layers"]
        for key, of in {
            **{"moe_intermediate_size": "intermediate_size", "moe_topk": "moe_topk"},
            "num_shared_expert": "num_shared_expert",
        }.items()
    },
    "solar_open": lambda config: {"partial_rotary_factor": 1.0},
    "bamba": lambda config: {"attn_rotary_emb": config["hidden_size"] // config["num_attention_heads"] // 2},
    "granitemoehybrid": lambda config: {
        "layer_types": ["attention" if kind == FULL else "mamba" for kind in config["layer_types"]]
    },
    "granitemoe_swa": lambda config: {"no_rope_layers": [int(base > 0) for base in config["layer_rope_theta"]]},
    "kimi_linear": lambda config: {
        "linear_attn_config": {
            "head_dim": config["linear_head_dim"],
            "num_heads": config["linear_num_heads"],
            "short_conv_kernel_size": config["linear_conv_kernel_dim"],
            "full_attn_layers": [layer for layer, kind in enumerate(config["layer_types"], 1) if kind == FULL],
            "kda_layers": [layer for layer, kind in enumerate(config["layer_types"], 1) if kind != FULL],
        },
        "first_k_dense_replace": config["mlp_layer_types"].index("sparse"),
        "moe_router_activation_func": "sigmoid",
    },
    # The converter reads what the first checkpoints had; transformers' own class would hide it.
    "mimo_v2_flash": lambda config: {
        **{"model_type": "mimo_v2", "architectures": ["MiMoV2ForCausalLM"], "rope_parameters": None},
        "hybrid_layer_pattern": [int(kind != FULL) for kind in config["layer_types"]],
        **{f"swa_{key}": config[key] for key in ("head_dim", "v_head_dim", "num_attention_heads")},
        "swa_num_key_value_heads": 2 * config["num_key_value_heads"],
        "rope_theta": config["rope_parameters"][FULL]["rope_theta"],
        "swa_rope_theta": config["rope_parameters"][SLIDING]["rope_theta"],
        "partial_rotary_factor": config["rope_parameters"][FULL]["partial_rotary_factor"],
        **{"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    },
    "nemotron_h": lambda config: {"norm_eps": config["layer_norm_epsilon"]},
}
# Tensors of published checkpoints.
RENAMED = {
    "kimi_linear": {r"block_sparse_moe\.(gate|up|down)_proj": r"mlp.\1_proj"},
    "mimo_v2_flash": {r"self_attn\.sinks$": "self_attn.attention_sink_bias"},
}
# Sizes of whole blocks of 256 inputs, where a family has such a key.
COMMON_WIDE = {"hidden_size": 256, "intermediate_size": 256}
WIDE = {
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 256),
    **dict.fromkeys(("intermediate_size_mlp", "prefix_dense_intermediate_size", "moe_latent_size"), 256),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "kv_lora_rank", "q_lora_rank"), 256),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "linear_value_head_dim"), 64),
    **{
        "query_pre_attn_scalar": 64,
        "qk_rope_head_dim": 32,
        "mamba_head_dim": 64,
        "linear_key_head_dim": 64,
        "global_head_dim": 128,
    },
}
# Checkpoints without layers for further tokens.
OPTIONS = dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "mimo_v2_flash"), ("--no-mtp",))
TEXTS = (
    *("Hello world", " a  b\n\n c\t\td", "It's 3.14159 or 1234567, isn't it?", "naïve café, Straße, Việt Nam"),
    *("日本語のテキスト 한국어 🚀👩‍🚀", "def f(x):\n    return x ** 2  # ok", "<|im_start|>user\nHi<|im_end|>\n"),
)
TOKEN_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja")


def variants() -> list[Variant]:
    """Every configuration that is tested as a GGUF file, and of the other families the one of their parity test."""
    tested = [*test_gguf_families.FIRST, *test_gguf_families.MORE]
    known = {*(variant.family.removesuffix("_text") for variant in tested)}
    rest = [v for v in models_table.variants().values() if v.family.removesuffix("_text") not in known]
    published = replace(models_table.variants()["gpt_oss"], edit=to_mxfp4)
    return [*(replace(variant, edit=None) for variant in rest), published, *tested]


def put_tokenizer(directory: Path, name: str, sources: Path) -> int:
    """A vocabulary beside a checkpoint; returns the number of its tokens."""
    for file in TOKEN_FILES:
        (directory / file).unlink(missing_ok=True)
    if name in (TRAINED, TRAINED_BARE):
        train_sentence_piece(directory, prefix=name == TRAINED)
        return TRAINED_TOKENS
    if name:
        return read_tokenizer(sources / "models" / f"ggml-vocab-{name}.gguf", directory)
    count = read_tokenizer(dense_default_file(), directory)
    file = directory / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    for token, added in zip(SPECIAL, tokenizer["added_tokens"][3:], strict=False):
        tokenizer["model"]["vocab"][token] = tokenizer["model"]["vocab"].pop(added["content"])
        added["content"] = token
    file.write_text(json.dumps(tokenizer))
    return count


def as_published(directory: Path, family: str) -> None:
    """A checkpoint of transformers 5 with the keys and names that converters look for."""
    if family in PUBLISHED:
        config = read_json(directory / "config.json")
        write_json(directory / "config.json", {**config, **PUBLISHED[family](config)})
    for pattern, name in RENAMED.get(family, {}).items():
        file = directory / "model.safetensors"
        save_file({re.sub(pattern, name, key): tensor for key, tensor in load_file(file).items()}, file)


def expected_ids(directory: Path, text: str) -> list[int]:
    """What the checkpoint's own tokenizer makes of a text, without tokens that frame it."""
    if (directory / "tokenizer.model").exists():
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(str(directory / "tokenizer.model")).encode(text)
    return Tokenizer.from_directory(directory).encode(text, add_special_tokens=False)


def imported(file: Path, *, keep_codes: bool = True) -> Path:
    """The directory that a file becomes here."""
    target = file.with_suffix("")
    target.mkdir()
    import_gguf(file, target, keep_codes=keep_codes, progress=False)
    return target


def logits(directory: Path, prompt: list[int]) -> torch.Tensor:
    """Ours, of all rows of a prompt, in float32."""
    decoder = load_decoder(directory, dtype="float32", device="cpu", dequantize=True)
    with torch.inference_mode():
        return PagedSequences(decoder, 1).run([prompt])


def prepared(variant: Variant, folder: Path, sources: Path, *, wide: bool) -> tuple[Path, Any]:
    """A variant's checkpoint as it is published, with a tokenizer, and transformers' model of it.

    Arguments:
        wide: rows are of whole blocks of 256 inputs.
    """
    name = VOCABULARIES.get(variant.family, "")
    settings = {**FAMILIES.get(variant.family, {}), **variant.config, **SETTINGS.get(variant.family, {})}
    settings |= {"vocab_size": put_tokenizer(folder, name, sources)}
    if wide:
        settings |= {key: size for key, size in {**COMMON_WIDE, **WIDE}.items() if key in {*COMMON_WIDE, *settings}}
    given = replace(variant, config=settings)
    checkpoint = plain = given.save(folder / "checkpoint")
    if variant.edit is to_mxfp4:
        plain = replace(given, edit=to_what_mxfp4_holds).save(folder / "plain")
    reference = models_table.reference_model(plain)
    put_tokenizer(checkpoint, name, sources)
    as_published(checkpoint, variant.family)
    return checkpoint, reference


def check(variant: Variant, folder: Path, converted: Converter) -> list[str]:
    """Compare what the file of a variant gives with the checkpoint.

    Raises:
        AssertionError: where they differ.
    """
    checkpoint, reference = prepared(variant, folder, converted.sources, wide=False)
    target = imported(file_of(variant, checkpoint, converted))
    check_logits(target, reference)
    prompts = random_prompts([1, 7, 33], seed=0)
    engine = Engine(load_model(target, dtype="float32", device="cpu", progress=False), EngineConfig())
    assert generate(engine, prompts, NEW_TOKENS) == expected_tokens(reference, prompts, NEW_TOKENS), "greedy tokens"
    found = Tokenizer.from_directory(target)
    for text in TEXTS:
        ids = found.encode(text, add_special_tokens=False)
        assert ids == expected_ids(checkpoint, text), f"ids of {text!r}: {ids}, not {expected_ids(checkpoint, text)}"
    return ["right"]


def compare(variant: Variant, folder: Path, converted: Converter, llama: LlamaCpp, kinds: Iterable[str]) -> list[str]:
    """Compare logits of a variant's file, and of what ``llama-quantize`` makes of it, with llama.cpp's.

    Raises:
        AssertionError: where codes are not the numbers that llama.cpp makes of them.
    """
    checkpoint, reference = prepared(variant, folder, converted.sources, wide=True)
    file, (prompt,) = file_of(variant, checkpoint, converted), random_prompts([40])
    ours = logits(imported(file), prompt)
    with torch.inference_mode():
        assert error(ours, reference(torch.tensor([prompt])).logits[0]) < TOLERANCE, "logits of transformers"
    said = [f"llama.cpp {attempt(lambda: f'{error(llama.logits(file, prompt), ours):.1e}')}"]
    for kind in kinds:
        written = llama.quantised(file, kind)
        codes = logits(imported(written), prompt)
        same = error(codes, logits(imported(llama.quantised(written, "F32")), prompt))

        def cosine(written: Path = written, codes: torch.Tensor = codes) -> str:
            return f"{float(torch.cosine_similarity(llama.logits(written, prompt), codes, dim=-1).median()):.4f}"

        said.append(f"{kind} {same:.1e} ({attempt(cosine)})")
        assert same < TOLERANCE, said
    return said


def file_of(variant: Variant, checkpoint: Path, converted: Converter) -> Path:
    """The checkpoint's file, in float32."""
    options = OPTIONS.get(variant.family, ())
    return converted(checkpoint, "f32", *options, other_vocabulary=variant.family in OTHER_VOCABULARY)


def attempt(number: Callable[[], str]) -> str:
    """What llama.cpp computes, where it does."""
    try:
        return number()
    except RuntimeError as fault:
        return str(fault)


def check_vocabularies(sources: Path) -> bool:
    """The vocabularies that come with the sources, against the ids that stand beside them."""
    all_right = True
    for file in sorted((sources / "models").glob("ggml-vocab-*.gguf")):
        texts, ids = (file.with_name(f"{file.name}.{ending}") for ending in ("inp", "out"))
        try:
            with tempfile.TemporaryDirectory() as folder:
                read_tokenizer(file, Path(folder))
                tokenizer = Tokenizer.from_directory(Path(folder))
        except ValueError as fault:
            print(f"{file.name}: refused: {fault}")
            continue
        if not texts.exists():
            print(f"{file.name}: loads; there are no texts with it")
            continue
        asked = texts.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
        pairs = list(zip(asked, ids.read_text().splitlines(), strict=False))
        wrong = [text for text, line in pairs if tokenizer.encode(text, add_special_tokens=False) != to_ids(line)]
        print(f"{file.name}: {len(pairs) - len(wrong)} of {len(pairs)} texts", *map(repr, wrong))
        all_right &= not wrong
    return all_right


def to_ids(line: str) -> list[int]:
    return [int(number) for number in line.split()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path)
    parser.add_argument("--build", type=Path)
    parser.add_argument("--bindings", type=Path)
    parser.add_argument("--family", nargs="*", default=[])
    parser.add_argument("--kinds", nargs="*", default=QUANTISED)
    parser.add_argument("--first", action="store_true", help="one configuration of each family")
    parser.add_argument("--traceback", action="store_true")
    parser.add_argument("--vocabularies", action="store_true")
    given = parser.parse_args()
    if given.vocabularies and not check_vocabularies(given.sources):
        return 1
    llama = LlamaCpp(given.build, given.bindings) if given.build else None
    converter, failed, seen = Converter(given.sources), 0, set[str]()
    for variant in variants():
        name = variant.family.removesuffix("_text")
        if (given.family and name not in given.family) or (given.first and name in seen):
            continue
        seen.add(name)
        with tempfile.TemporaryDirectory() as folder:
            try:
                if llama is None:
                    said = check(variant, Path(folder), converter)
                else:
                    said = compare(variant, Path(folder), converter, llama, given.kinds)
                print(f"{variant}: {'; '.join(said)}", flush=True)
            except Exception as fault:
                failed += 1
                print(f"{variant}: {type(fault).__name__}: {fault}"[:700], flush=True)
                if given.traceback:
                    traceback.print_exc()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
