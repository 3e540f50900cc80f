"""llama.cpp's converter, quantiser and library, and tokenizers for what it converts; see ``llama_cpp_files``."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from conftest import TRAINING_TEXT
from dynamoe.dynamic.checkpoint.gguf_file import GgufFile
from dynamoe.dynamic.convert.gguf_metadata import Metadata
from dynamoe.dynamic.convert.gguf_tokenizer import read_vocabulary, write_tokenizer

TRAINED_TOKENS = 320
POSITIONS = 512
ERROR = 4  # a level of messages
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


class LlamaCpp:
    """llama.cpp's library.

    Arguments:
        binaries: the folder of its programs and libraries.
        bindings: the folder that holds the package ``llama_cpp``.
    """

    def __init__(self, binaries: Path, bindings: Path) -> None:
        os.environ |= {"LLAMA_CPP_LIB_PATH": str(binaries), "GGML_NO_BACKTRACE": "1"}
        sys.path.append(str(bindings))
        import llama_cpp.llama_cpp as library  # type: ignore[import-not-found]

        self.binaries, self.library = binaries, library
        self._log = library.llama_log_callback(
            lambda level, text, data: print(text.decode()) if level == ERROR else None
        )
        library.llama_log_set(self._log, ctypes.c_void_p(0))
        library.llama_backend_init()

    def logits(self, file: Path, prompt: list[int]) -> torch.Tensor:
        """Of all rows of a prompt, with keys and values in float32; in a process of its own, since faults end it."""
        found = file.with_suffix(".pt")
        if not (process := os.fork()):
            code = 1
            try:
                torch.save(self._logits(file, prompt), found)
                code = 0
            except RuntimeError as fault:
                print(fault, flush=True)
            os._exit(code)
        _, status = os.waitpid(process, 0)
        if status:
            raise RuntimeError(f"llama.cpp ends with {os.waitstatus_to_exitcode(status)} on {file.name}")
        return torch.load(found)

    def _logits(self, file: Path, prompt: list[int]) -> torch.Tensor:
        library = self.library
        settings = library.llama_model_default_params()
        model = library.llama_model_load_from_file(str(file).encode(), settings)
        if not model:
            raise RuntimeError(f"llama.cpp does not load {file.name}")
        running = library.llama_context_default_params()
        running.n_ctx = running.n_batch = running.n_ubatch = POSITIONS
        running.n_threads = running.n_threads_batch = 1
        running.type_k = running.type_v = 0  # float32
        running.flash_attn_type = 0  # none
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
        address = ctypes.addressof(library.llama_get_logits(context).contents)
        numbers = (ctypes.c_float * (len(prompt) * columns)).from_address(address)
        return torch.frombuffer(numbers, dtype=torch.float32).clone().view(len(prompt), columns)

    def quantised(self, file: Path, kind: str) -> Path:
        """The file in another type of weights."""
        target = file.with_name(f"{file.stem}-{kind}.gguf")
        command = [self.binaries / "llama-quantize", "--allow-requantize", file, target, kind, "1"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError("llama-quantize: " + "\n".join((done.stdout + done.stderr).splitlines()[-3:]))
        return target


def read_tokenizer(file: Path, directory: Path) -> int:
    """Write the tokenizer of a GGUF file as ours reads it; returns the number of tokens."""
    meta = Metadata(GgufFile(file))
    vocabulary = read_vocabulary(meta, 1 << 20)
    write_tokenizer(meta, vocabulary, 512, directory)
    return len(vocabulary.tokens)


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
