"""Files that llama.cpp wrote, loaded here: against transformers, and against llama.cpp. Run by hand.

``python tests/llama_cpp_files.py LLAMA_CPP [--build BIN --bindings FOLDER] [--family NAME …] [--vocabularies]``

``LLAMA_CPP`` is a folder of its sources, ``BIN`` one with its programs and libraries, ``FOLDER`` that of the bindings
``llama_cpp``. Each family's random tiny checkpoint goes through ``convert_hf_to_gguf.py``: the file must give
transformers' logits and greedy tokens, and the tokenizer's ids. With a build, llama.cpp computes logits of the same
file, and ``llama-quantize`` writes further ones; those are compared with what it makes of them in float32 again.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
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
from conftest import FAMILIES, TRAINING_TEXT
from dynamoe.dynamic.checkpoint.directory import write_json
from dynamoe.dynamic.checkpoint.gguf_file import GgufFile
from dynamoe.dynamic.checkpoint.weights import read_json
from dynamoe.dynamic.convert.default_model import dense_default_file
from dynamoe.dynamic.convert.gguf_import import import_gguf
from dynamoe.dynamic.convert.gguf_metadata import Metadata
from dynamoe.dynamic.convert.gguf_tokenizer import read_vocabulary, write_tokenizer
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.text.tokenizer import Tokenizer
from family_parity import Variant, check_logits, expected_tokens, generate
from safetensors.torch import load_file, save_file
from test_decoder import PagedSequences, error, random_prompts
from test_families_parity_attention import FULL
from test_families_parity_latent import YARN

NEW_TOKENS = 16
OUTER_TYPES = ("f32", "bf16", "q8_0")
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
TRAINED_TOKENS = 320
# In place of the default model's special tokens, from its fourth one: converters of GLM and Solar Open look for them.
SPECIAL = ("[gMASK]", "<|user|>", "<|observation|>", "<unk>", "<|startoftext|>")
# What files cannot say, or converters leave away.
SETTINGS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "ernie4_5_moe": {"moe_norm_min": 1e-12},
    "deepseek_v3": {"attention_bias": False},
    "deepseek_v2": {"rope_parameters": {**YARN, "mscale": YARN["mscale_all_dim"]}},
    "hunyuan_v1_moe": {"moe_topk": 3, "num_shared_expert": 1},
    "granitemoe_swa": {"layer_rope_theta": [1e4, 0.0, 1e4, 0.0, 1e4]},
    "jamba": {"num_hidden_layers": 4},
}
# Keys of published checkpoints that transformers 5 writes otherwise, or not at all.
PUBLISHED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
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
    "nemotron_h": lambda config: {"norm_eps": config["layer_norm_epsilon"]},
}
# Tensors of published checkpoints.
RENAMED = {"kimi_linear": {r"block_sparse_moe\.(gate|up|down)_proj": r"mlp.\1_proj"}}
# Checkpoints without layers for further tokens.
OPTIONS = dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), ("--no-mtp",))
TEXTS = (
    *("Hello world", " a  b\n\n c\t\td", "It's 3.14159 or 1234567, isn't it?", "naïve café, Straße, Việt Nam"),
    *("日本語のテキスト 한국어 🚀👩‍🚀", "def f(x):\n    return x ** 2  # ok", "<|im_start|>user\nHi<|im_end|>\n"),
)
# Forks for each conversion, for its imports take seconds.
CONVERTER = """
import json, os, sys, traceback
sys.path.insert(0, "")
import convert_hf_to_gguf
from transformers import AutoTokenizer
for line in sys.stdin:
    arguments, log, other_vocabulary = json.loads(line)
    if not (process := os.fork()):
        code, output = 1, os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        try:
            sys.argv = ["", *arguments]
            if other_vocabulary:
                import conversion
                model_class = convert_hf_to_gguf.get_model_class
                def with_other_vocabulary(*names, **options):
                    found = model_class(*names, **options)
                    found.set_vocab = conversion.TextModel._set_vocab_gpt2
                    return found
                convert_hf_to_gguf.get_model_class = with_other_vocabulary
            convert_hf_to_gguf.main()
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""
TOKEN_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja")


def variants() -> list[Variant]:
    """Every configuration that is tested as a GGUF file, and of the other families the one of their parity test."""
    tested = [*test_gguf_families.FIRST, *test_gguf_families.MORE]
    known = {*(variant.family.removesuffix("_text") for variant in tested)}
    rest = [v for v in models_table.variants().values() if v.family.removesuffix("_text") not in known]
    return [*(replace(variant, edit=None) for variant in rest), *tested]


def read_tokenizer(file: Path, directory: Path) -> int:
    """Write the tokenizer of a GGUF file as ours reads it; returns the number of tokens."""
    meta = Metadata(GgufFile(file))
    vocabulary = read_vocabulary(meta, 1 << 20)
    write_tokenizer(meta, vocabulary, 512, directory)
    return len(vocabulary.tokens)


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


def train_sentence_piece(directory: Path, *, prefix: bool) -> None:
    """``tokenizer.model``, whose texts begin with a space or not."""
    from sentencepiece import SentencePieceTrainer

    text = directory / "text.txt"
    text.write_text(TRAINING_TEXT.replace(". ", ".\n"))
    SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=TRAINED_TOKENS,
        byte_fallback=True,
        add_dummy_prefix=prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


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


class Converter:
    """llama.cpp's converter, in a process of its own: it comes with another version of the ``gguf`` package."""

    def __init__(self, sources: Path) -> None:
        self.sources = sources
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", CONVERTER],
            cwd=sources,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __call__(self, checkpoint: Path, kind: str = "f32", *options: str, other_vocabulary: bool = False) -> Path:
        """The checkpoint as a file."""
        file = checkpoint.with_name(f"{checkpoint.name}-{kind}{''.join(options)}.gguf")
        log = file.with_suffix(".log")
        arguments = [str(checkpoint), "--outtype", kind, "--outfile", str(file), *options]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([arguments, str(log), other_vocabulary]).encode() + b"\n")
        self._process.stdin.flush()
        if self._process.stdout.readline() != b"0\n":
            raise RuntimeError("the converter: " + "\n".join(log.read_text().strip().splitlines()[-3:]))
        return file


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


class LlamaCpp:
    """llama.cpp's library.

    Arguments:
        binaries: the folder of its programs and libraries.
        bindings: the folder that holds the package ``llama_cpp``.
    """

    def __init__(self, binaries: Path, bindings: Path) -> None:
        os.environ["LLAMA_CPP_LIB_PATH"] = str(binaries)
        sys.path.append(str(bindings))
        import llama_cpp.llama_cpp as library  # type: ignore[import-not-found]

        self.binaries, self.library = binaries, library
        self._quiet = library.llama_log_callback(lambda level, text, data: None)
        library.llama_log_set(self._quiet, ctypes.c_void_p(0))
        library.llama_backend_init()

    def logits(self, file: Path, prompt: list[int]) -> torch.Tensor:
        """Of all rows of a prompt, with keys and values in float32."""
        library = self.library
        settings = library.llama_model_default_params()
        settings.use_mmap = False
        model = library.llama_model_load_from_file(str(file).encode(), settings)
        if not model:
            raise RuntimeError(f"llama.cpp does not load {file.name}")
        running = library.llama_context_default_params()
        running.n_ctx, running.n_batch, running.n_ubatch, running.n_threads, running.n_threads_batch = (
            512,
            512,
            512,
            1,
            1,
        )
        running.type_k = running.type_v = 0  # float32
        running.flash_attn_type, running.offload_kqv = 0, False
        context = library.llama_init_from_model(model, running)
        if not context:
            raise RuntimeError(f"llama.cpp cannot run {file.name}")
        batch = library.llama_batch_init(len(prompt), 0, 1)
        batch.n_tokens = len(prompt)
        for row, token in enumerate(prompt):
            batch.token[row], batch.pos[row], batch.n_seq_id[row], batch.seq_id[row][0] = token, row, 1, 0
            batch.logits[row] = 1
        if (code := library.llama_decode(context, batch)) != 0:
            raise RuntimeError(f"llama.cpp fails with {code} on {file.name}")
        columns = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
        numbers = (ctypes.c_float * (len(prompt) * columns)).from_address(
            ctypes.addressof(library.llama_get_logits(context).contents)
        )
        found = torch.frombuffer(numbers, dtype=torch.float32).clone().view(len(prompt), columns)
        library.llama_batch_free(batch)
        library.llama_free(context)
        library.llama_model_free(model)
        return found

    def quantised(self, file: Path, kind: str) -> Path:
        """The file in another type of weights."""
        target = file.with_name(f"{file.stem}-{kind}.gguf")
        command = [self.binaries / "llama-quantize", "--allow-requantize", file, target, kind, "1"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError("llama-quantize: " + "\n".join((done.stdout + done.stderr).splitlines()[-3:]))
        return target


def check(
    variant: Variant, folder: Path, converted: Converter, llama: LlamaCpp | None, kinds: Iterable[str]
) -> list[str]:
    """Compare what the files of a variant give; returns what is to be said of it.

    Raises:
        AssertionError: where files differ from the checkpoint.
    """
    name = VOCABULARIES.get(variant.family, "")
    tokens = put_tokenizer(folder, name, converted.sources)
    settings = {**FAMILIES.get(variant.family, {}), **variant.config, **SETTINGS.get(variant.family, {})}
    checkpoint = replace(variant, config={**settings, "vocab_size": tokens}).save(folder / "checkpoint")
    put_tokenizer(checkpoint, name, converted.sources)
    reference = models_table.reference_model(checkpoint)
    as_published(checkpoint, variant.family)
    options = OPTIONS.get(variant.family, ())
    file, said = converted(checkpoint, "f32", *options, other_vocabulary=variant.family in OTHER_VOCABULARY), []
    target = imported(file)
    check_logits(target, reference)
    prompts = random_prompts([1, 7, 33], seed=0)
    engine = Engine(load_model(target, dtype="float32", device="cpu", progress=False), EngineConfig())
    assert generate(engine, prompts, NEW_TOKENS) == expected_tokens(reference, prompts, NEW_TOKENS), "greedy tokens"
    found = Tokenizer.from_directory(target)
    for text in TEXTS:
        ids = found.encode(text, add_special_tokens=False)
        assert ids == expected_ids(checkpoint, text), f"ids of {text!r}: {ids}, not {expected_ids(checkpoint, text)}"
    (prompt,) = random_prompts([40])
    ours = logits(target, prompt)
    if llama is not None:
        said.append(f"llama.cpp {error(llama.logits(file, prompt), ours):.1e}")
        for kind in kinds:
            written = llama.quantised(file, kind)
            plain = llama.quantised(written, "F32")
            codes, widened = logits(imported(written), prompt), logits(imported(plain), prompt)
            same, theirs = error(codes, widened), llama.logits(written, prompt)
            cosine = float(torch.cosine_similarity(theirs, codes, dim=-1).median())
            said.append(f"{kind}: {same:.1e} of its float32, cosine with llama.cpp's {cosine:.4f}")
            assert same < 1e-4, said[-1]
    return said


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
    parser.add_argument("--vocabularies", action="store_true")
    given = parser.parse_args()
    if given.vocabularies and not check_vocabularies(given.sources):
        return 1
    llama = LlamaCpp(given.build, given.bindings) if given.build else None
    converter, failed = Converter(given.sources), 0
    for variant in variants():
        if given.family and variant.family.removesuffix("_text") not in given.family:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                said = check(variant, Path(folder), converter, llama, given.kinds)
                print(f"{variant}: right", *said, sep="; ", flush=True)
            except Exception as fault:
                failed += 1
                print(f"{variant}: {type(fault).__name__}: {fault}"[:700], flush=True)
                if os.environ.get("VERBOSE"):
                    traceback.print_exc()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
