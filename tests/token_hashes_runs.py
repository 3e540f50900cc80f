"""What ``token_hashes.py`` runs: groups of loaded models, and what each of them is asked.

A group is a process (or a launcher's processes) of its own. A run's name is its load's and its workload's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16")
# Random checkpoints, made anew with a fixed seed; their model's name is RANDOM and the family.
RANDOM = "random:"
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": SMALL | EXPERTS | {"head_dim": 24, "norm_topk_prob": True},
    "qwen2_moe": SMALL | EXPERTS | {"shared_expert_intermediate_size": 72},  # operation by operation: a shared expert
    "mistral": SMALL | {"sliding_window": 24},  # pages that no later token sees are given back
}
# Instruction sets of the C++ kernels: what /proc/cpuinfo calls what they need.
BACKENDS = {"cpu": "", "cpu:portable": "", "cpu:avx2": "avx2", "cpu:avx512": "avx512f", "cpu:avx512vnni": "avx512_vnni"}
METHODS = ("int8", "w4a8", "int4")
MORE_METHODS = ("w8a8", "int8-g32", "int4-g32-asym", "fp8", "fp8-block")


@dataclass(frozen=True, kw_only=True)
class Load:
    """A model as it is loaded, and what it is asked.

    Arguments:
        name: beginning of its runs' names.
        model: what ``LLM`` or ``model=`` takes, or one of ``FAMILIES`` behind ``RANDOM``.
        workloads: of ``token_hashes_worker.WORKLOADS``; of ``token_hashes_rest.WORKLOADS`` when ``how`` is ``rest``;
            of ``COMMANDS`` when it is ``cli``.
        settings: keyword arguments of ``LLM``; of a command line, what is in front and behind the ``=``.
        processes: how many a launcher starts.
        how: ``python``, ``rest`` or ``cli``: which face is asked.
    """

    name: str
    model: str
    workloads: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    how: str = "python"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Loads that follow one another in one process.

    Arguments:
        name: for the log.
        loads: exactly one where a launcher starts several processes.
    """

    name: str
    loads: tuple[Load, ...]

    @property
    def runs(self) -> list[str]:
        """Names of all runs."""
        return [f"{load.name}/{workload}" for load in self.loads for workload in load.workloads]

    def only(self, pattern: re.Pattern[str]) -> Group:
        """The runs whose names hold the pattern."""
        kept = []
        for load in self.loads:
            workloads = tuple(name for name in load.workloads if pattern.search(f"{load.name}/{name}"))
            kept += [replace(load, workloads=workloads)] if workloads else []
        return replace(self, loads=tuple(kept))


def groups() -> Iterator[Group]:
    """All of them, in the order in which they run."""
    for dtype in DTYPES:
        yield Group(name=f"tiny {dtype}", loads=tuple(_tiny(dtype)))
        yield Group(name=f"default {dtype}", loads=tuple(_default(dtype)))
        yield Group(name=f"random checkpoints {dtype}", loads=tuple(_random(dtype)))
        yield Group(name=f"backends {dtype}", loads=tuple(_backends(dtype)))
    for load in _several_processes():
        yield Group(name=load.name, loads=(load,))
    for load in _servers():
        yield Group(name=load.name, loads=(load,))
    yield Group(name="commands", loads=tuple(_commands()))


def _crowded(load: Load, page_bytes: int, *workloads: str) -> Load:
    """The same model where eight prompts are cut into chunks and do not fit into the cache together."""
    settings = {"max_num_batched_tokens": 48, "max_model_len": 256, "kv_memory": 24 * page_bytes}
    settings |= {"max_num_seqs": 8, "enable_prefix_caching": False}  # so that what is lost is computed again
    return replace(load, name=f"{load.name}/crowded", workloads=workloads, settings=load.settings | settings)


def _with(load: Load, name: str, *workloads: str, **settings: Any) -> Load:
    return replace(load, name=f"{load.name}/{name}", workloads=workloads, settings=load.settings | settings)


def _tiny(dtype: str) -> Iterator[Load]:
    exits = ("exits", "experts", "exits-and-experts", "mixed")
    contract = ("contract",) if dtype == "bfloat16" else ()  # what the certificates that ship are bound to
    workloads = ("plain", "chat", "prefix", "options", *exits, *contract)
    load = Load(name=f"tiny/{dtype}", model="tiny", workloads=workloads, settings={"dtype": dtype})
    yield load
    width = 4 if dtype == "float32" else 2
    yield _crowded(load, 16 * 16 * 2 * 2 * 32 * width, "crowd", "crowd-exits")
    yield _with(load, "kv-int8", "plain", "prefix", "exits", kv_cache_dtype="int8")
    for method in (*METHODS, *MORE_METHODS):
        yield _with(load, method, "plain", "mixed", quantization=method)
    yield _with(load, "int8-kv-int8", "plain", "mixed", quantization="int8", kv_cache_dtype="int8")


def _default(dtype: str) -> Iterator[Load]:
    load = Load(
        name=f"default/{dtype}", model="default", workloads=("plain", "chat", "prefix"), settings={"dtype": dtype}
    )
    yield load
    if dtype == "bfloat16":
        yield _crowded(load, 16 * 30 * 2 * 3 * 64 * 2, "crowd")
        yield _with(load, "ten-experts", "plain", experts_per_token=10)
        yield _with(load, "kv-int8", "plain", kv_cache_dtype="int8")
    for method in METHODS:
        yield _with(load, method, "short", quantization=method)


def _random(dtype: str) -> Iterator[Load]:
    for family in FAMILIES:
        load = Load(
            name=f"{family}/{dtype}",
            model=RANDOM + family,
            workloads=("plain", "prefix", "options"),
            settings={"dtype": dtype, "max_model_len": 448},
        )
        yield load
        if family == "qwen3_moe":
            width = 4 if dtype == "float32" else 2
            yield _crowded(load, 16 * 3 * 2 * 2 * 24 * width, "crowd")
            yield _with(load, "kv-int8", "plain", kv_cache_dtype="int8")
        for method in METHODS:
            yield _with(load, method, "plain", quantization=method)


def _backends(dtype: str) -> Iterator[Load]:
    contract = ("contract",) if dtype == "bfloat16" else ()
    for backend in (*(name for name, needs in BACKENDS.items() if needs in _processor_flags()), "torch"):
        label = f"tiny/{dtype}/backend={backend}"
        settings = {"dtype": dtype, "backend": backend}
        certified = contract if backend in ("cpu", "cpu:avx512vnni") else ()
        load = Load(name=label, model="tiny", workloads=("plain", "mixed", *certified), settings=settings)
        yield load
        for method in METHODS:
            yield _with(load, method, "short", quantization=method)
        yield _with(load, "kv-int8", "short", kv_cache_dtype="int8")
        if backend == "torch":
            yield _with(load, "kv-fp8", "short", kv_cache_dtype="fp8")


def _several_processes() -> Iterator[Load]:
    workloads = ("plain", "prefix", "mixed")
    for axis in ("tensor", "pipeline", "expert", "data"):
        settings = {"dtype": "float32", f"{axis}_parallel_size": 2}
        yield Load(name=f"tiny/float32/{axis}=2", model="tiny", workloads=workloads, settings=settings, processes=2)
    settings = {"dtype": "bfloat16", "quantization": "int8", "tensor_parallel_size": 2}
    yield Load(name="tiny/bfloat16/int8/tensor=2", model="tiny", workloads=workloads, settings=settings, processes=2)
    settings = {"dtype": "bfloat16", "tensor_parallel_size": 2}
    yield Load(name="default/bfloat16/tensor=2", model="default", workloads=("plain",), settings=settings, processes=2)
    settings = {"dtype": "bfloat16", "expert_parallel_size": 2, "max_model_len": 448}
    yield Load(
        name="qwen3_moe/bfloat16/expert=2",
        model=f"{RANDOM}qwen3_moe",
        workloads=("plain",),
        settings=settings,
        processes=2,
    )


def _servers() -> Iterator[Load]:
    everything = ("completions", "tokens", "stream", "list", "echo", "chat", "chat-stream", "tokenize")
    yield Load(
        name="rest/tiny/bfloat16",
        model="tiny",
        workloads=(*everything, "contract", "experts"),
        settings={"dtype": "bfloat16"},
        how="rest",
    )
    yield Load(
        name="rest/default/bfloat16",
        model="default",
        workloads=("completions", "chat", "chat-stream"),
        settings={"dtype": "bfloat16"},
        how="rest",
    )


def _commands() -> Iterator[Load]:
    yield Load(name="cli/tiny", model="tiny", workloads=("generate",), settings={"dtype": "float32"}, how="cli")
    settings = {"dtype": "float32", "parallel.tensor": 2, "parallel.shared_memory": "false"}
    yield Load(
        name="cli/tiny/messages", model="tiny", workloads=("generate",), settings=settings, processes=2, how="cli"
    )


def _processor_flags() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else ""
