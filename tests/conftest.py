"""Tiny random checkpoints of every family, written by transformers, and the transformers models to compare with.

Tests of the model, the engine and the server share them: ``make_checkpoint("mixtral", num_hidden_layers=2)`` is a
directory in Hugging Face layout with weights, configuration, tokenizer and chat template.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# While it is imported, Triton decides whether to compile kernels or to interpret them; without a GPU only that can run.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

# The kernels are imported after that.
from dynamoe.kernels.cpu import build as cpu_build
from dynamoe.kernels.cpu.backend import CpuBackend
from forks import ForkedProcess
from resume import pytest_addoption, pytest_configure  # noqa: F401 - pytest finds hooks by their names
from timeouts import pytest_timeout_set_timer  # noqa: F401

if os.environ["TRITON_INTERPRET"] == "1":
    from interpreter import hasten

    hasten()

VOCAB_SIZE = 320
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRAINING_TEXT = (
    "The capital of France is Paris, and the capital of Italy is Rome. A mixture of experts sends every token to a few "
    "of its experts; the router chooses them. The quick brown fox jumps over the lazy dog while the other dogs sleep. "
    "One, two, three, four, five, six, seven, eight, nine, ten. What is the answer to the question that was asked? "
    "There is a house in the middle of the forest, and there the old man reads his books every night until morning."
)
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 24},
    "qwen2": {},
    "qwen3": {"head_dim": 24},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 48},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 72,
    },
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "head_dim": 24,
        "norm_topk_prob": True,
    },
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 40},
    "granitemoe": {
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "intermediate_size": 40,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.35,
        "residual_multiplier": 0.6,
        "logits_scaling": 1.7,
    },
    "granitemoeshared": {
        **{"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 40, "shared_intermediate_size": 72},
        **{"embedding_multiplier": 3.0, "attention_multiplier": 0.35, "residual_multiplier": 0.6},
        "logits_scaling": 1.7,
    },
    "glm4_moe": {
        **{"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "n_shared_experts": 2},
        **{"first_k_dense_replace": 1, "routed_scaling_factor": 1.7, "use_qk_norm": True, "num_mtp_layers": 0},
        "head_dim": 24,
    },
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 40, "moe_norm_min": 0.4},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 3, "intermediate_size": 40, "head_dim": 24},
    "dots1": {
        **{"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "n_shared_experts": 2},
        **{"first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.7},
    },
}


def pytest_collection_finish() -> None:
    """What the imports have made stays: collecting garbage need not look through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the tables that tests recorded as ``table``: registers and shared memory of compiled kernels."""
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == "table":
                terminalreporter.section(report.nodeid)
                terminalreporter.write_line(text)


def write_tokenizer(directory: Path) -> None:
    """A small byte-level BPE tokenizer with a ChatML template, in the files that transformers' tokenizers write."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRAINING_TEXT], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": IM_START,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "add_bos_token": False,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Draw weights that make every part matter: peaked attention, uneven norms, biases as large as what they add to."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "norm" in name:
                parameter.uniform_(0.4, 1.6, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.6, generator=generator)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.normal_(0.0, 1.0, generator=generator)
            else:
                parameter.normal_(0.0, 1.6 / math.sqrt(parameter.shape[-1]), generator=generator)
        for name, buffer in sorted(model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.3, generator=generator)


def build_checkpoint(
    directory: Path, family: str, *, seed: int = 0, dtype: str = "float32", max_shard_size: str = "1GB", **config: Any
) -> None:
    """Write a random model of a family with its tokenizer to ``directory``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **config})
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    randomize(model, seed)
    model.generation_config.update(eos_token_id=[2, 0], pad_token_id=0, bos_token_id=1)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=max_shard_size)
    write_tokenizer(directory)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh floating-point tensors hold NaN and fresh integers the largest value, so that unwritten outputs show."""
    was_strict, was_filled = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(was_strict)
    torch.utils.deterministic.fill_uninitialized_memory = was_filled


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cpu_backend" in metafunc.fixturenames:
        cells = [(isa, dtype) for isa in cpu_build.isas() for dtype in (torch.float32, torch.bfloat16)]
        ids = [f"{isa}-{str(dtype)[6:]}" for isa, dtype in cells]
        metafunc.parametrize("cpu_backend", cells, ids=ids, indirect=True)


@pytest.fixture
def cpu_backend(request: pytest.FixtureRequest) -> CpuBackend:
    """The C++ kernels on each instruction set that this processor has, in each dtype."""
    torch.manual_seed(0)
    isa, dtype = request.param
    best = CpuBackend("cpu", dtype)
    if torch.ops.dynamoe_cpu.find_isa(isa) < 0:
        pytest.skip(f"this processor has no {isa}")
    return best if best.isa == isa else CpuBackend("cpu", dtype, isa=isa)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random tensors in every run, whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make_checkpoint(family, *, seed=0, dtype="float32", max_shard_size="1GB", **config) -> directory``.

    Equal arguments give the same directory: do not write into it, copy it.
    """
    root = tmp_path_factory.mktemp("checkpoints")

    def make(family: str, **arguments: Any) -> Path:
        key = hashlib.sha256(json.dumps([family, arguments], sort_keys=True).encode()).hexdigest()[:12]
        directory = root / f"{family}-{key}"
        if not directory.exists():
            build_checkpoint(directory, family, **arguments)
        return directory

    return make


@pytest.fixture
def copy_checkpoint(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """``copy_checkpoint(family, **config) -> directory``: a checkpoint of the test's own, to write into."""

    def copy(family: str, **config: Any) -> Path:
        return shutil.copytree(make_checkpoint(family, **config), tmp_path / family)

    return copy


def add_exits(directory: Path, exits: dict[int, float], *, seed: int = 0, **probe: Any) -> None:
    """Give a checkpoint random exits.

    Arguments:
        exits: layers in front of each exit → share of rows, about, whose calibrated probability is above one half.
        probe: settings of the probes' :class:`ProbeSpec`.
    """
    from dynamoe.exits.calibrators import Temperature
    from dynamoe.exits.exit_head import ExitHeadAdapter
    from dynamoe.exits.probes import Probe, ProbeSpec
    from dynamoe.exits.sidecar import ExitHeads, backbone_hash, save_heads

    hidden = json.loads((directory / "config.json").read_text())["hidden_size"]
    generator = torch.Generator().manual_seed(seed)
    adapters, probes, calibrators = {}, {}, {}
    for layer, share in exits.items():
        adapters[layer] = ExitHeadAdapter(hidden, 4)
        adapters[layer].reset(generator)
        torch.nn.init.normal_(adapters[layer].up_DJ, 0, 0.3, generator=generator)
        probes[layer] = Probe(ProbeSpec(**{"kind": "mlp", "width": 4, **probe}), hidden, generator)
        x_RD = torch.randn(512, hidden, generator=generator)
        with torch.no_grad():
            logits = probes[layer](x_RD, x_RD.flip(0), torch.full((512,), 1.5))
        calibrators[layer] = Temperature(1.0, shift=float(logits.quantile(1 - share)))
    save_heads(
        ExitHeads(
            hidden_size=hidden,
            adapters=adapters,
            probes=probes,
            calibrators=calibrators,
            backbone_sha256=backbone_hash(directory),
        ),
        directory,
    )


@pytest.fixture(scope="session")
def make_exits(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make_exits(family, {layers: share}, probe={}, **config) -> directory``: a checkpoint with :func:`add_exits`."""
    root = tmp_path_factory.mktemp("exits")

    def make(family: str, exits: dict[int, float], probe: dict[str, Any] | None = None, **config: Any) -> Path:
        key = hashlib.sha256(repr((family, exits, probe, config)).encode()).hexdigest()[:12]
        directory = root / f"{family}-{key}"
        if not directory.exists():
            shutil.copytree(make_checkpoint(family, **config), directory)
            add_exits(directory, exits, **(probe or {}))
        return directory

    return make


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's directory in the user's own cache; made when it is not there, which takes about a minute."""
    from dynamoe.dynamic.convert.model_store import resolve_model

    return resolve_model("default", progress=False)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files of words in random order, to train on."""
    folder = tmp_path_factory.mktemp("texts")
    words = ["the", "router", "of", "an", "expert", "is", "a", "layer", "in", "the", "model", "and", "it", "reads"]
    generator = torch.Generator().manual_seed(0)
    for number in range(12):
        picks = torch.randint(len(words), (200,), generator=generator).tolist()
        (folder / f"{number}.txt").write_text(" ".join(words[i] for i in picks) + ".")
    return folder


@pytest.fixture(scope="session")
def reference_model() -> Callable[[Path], Any]:
    """``reference_model(directory)``: the checkpoint as a transformers model in float32 with eager attention."""
    models: dict[Path, Any] = {}

    def load(directory: Path) -> Any:
        from transformers import AutoModelForCausalLM

        if directory not in models:
            model = AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True
            )
            models[directory] = model.eval()
        return models[directory]

    return load


class ServerProcess:
    """A server in a process of its own, on a free port of the loopback interface, until :meth:`stop`.

    Arguments:
        command: arguments of the Python interpreter.
        directory: for its log.
    """

    def __init__(self, command: list[str], directory: Path) -> None:
        self.log_file = directory / f"server-{time.monotonic_ns()}.log"
        self.process = ForkedProcess(command, self.log_file, directory)
        self.url = self._wait_until_ready()

    def _wait_until_ready(self) -> str:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and self.process.poll() is None:
            if match := re.search(r"^dynamoe .* serves .* on (?:the UNIX socket .*|(http://\S+))$", self.log, re.M):
                return match.group(1) or "http://localhost"
            time.sleep(0.05)
        self.process.kill()
        raise AssertionError(f"the server did not start (exit code {self.process.poll()}):\n{self.log}")

    @property
    def log(self) -> str:
        """What it has written so far."""
        return self.process.output

    def logged(self, pattern: str, timeout: float = 120) -> str:
        """The first line of the log that holds ``pattern``; a request's line follows its answer."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for line in self.log.splitlines():
                if re.search(pattern, line):
                    return line
            time.sleep(0.02)
        raise AssertionError(f"{pattern!r} is not in the log:\n{self.log}")

    def stop(self, timeout: float = 120) -> int:
        """SIGTERM, then the exit code."""
        self.process.terminate()
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the server did not stop:\n{self.log}") from None


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ServerProcess]]:
    """``start_server(directory, "server.drain_timeout=1", …)`` runs ``dynamoe serve`` on a checkpoint; with ``script=``
    it runs that Python file, given the directory and the other arguments, instead."""
    root = tmp_path_factory.mktemp("servers")
    started: list[ServerProcess] = []

    def start(directory: Path, *arguments: str, script: Path | None = None) -> ServerProcess:
        if script is None:
            model = ["model=" + json.dumps(str(directory)), "server.served_model_name=tiny", "server.port=0"]
            command = ["-m", "dynamoe", "serve", *model, *arguments]
        else:
            command = [str(script), str(directory), *arguments]
        server = ServerProcess(command, root)
        started.append(server)
        return server

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


@pytest.fixture(scope="session")
def server(start_server: Callable[..., ServerProcess], make_checkpoint: Callable[..., Path]) -> ServerProcess:
    """A server of a tiny model with default settings, shared by the tests that leave it as it was."""
    return start_server(make_checkpoint("mixtral"))


@pytest.fixture(scope="session")
def certify() -> Callable[..., Any]:
    """``certify(directory, running, alpha, probability, keep=None, **scope)`` writes a certificate for the exits of
    tiny and what ``deployment`` says that runs, whatever it claims."""
    from dynamoe.dynamic.contract.certificate import Certificate, HeldOut, Scope, save_certificate

    def write(directory: Path, running: Any, alpha: float, at: float, keep: float | None = None, **scope: Any) -> Any:
        certificate = Certificate(
            alpha=alpha,
            delta=0.05,
            requests=1000,
            method="wsr",
            loss="made up",
            scope=Scope(**{"max_tokens": 64, "prompts": "of a test", **scope}),
            exit_thresholds=dict.fromkeys((4, 8, 12), at),
            expert_budget={} if keep is None else {"expert_keep": keep},
            held_out=HeldOut(requests=500, mean_loss=0.0, low=0.0, high=alpha, layers_executed=0.5),
            created="2026-01-01",
            deployment=running,
        )
        directory.mkdir(exist_ok=True)
        save_certificate(certificate, directory / f"{certificate.id}.json")
        return certificate

    return write
