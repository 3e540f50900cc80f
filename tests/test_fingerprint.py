"""What the kernels compute on fixed inputs: every operator is asked, any bit counts, and nothing else does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.kernels.api import uncommon
from dynamoe.kernels.api.uncommon import CHANNEL_DECAYS, LATENT_PAGES, STATES
from dynamoe.kernels.cpu import build as cpu_build
from dynamoe.kernels.cpu.backend import CpuBackend
from dynamoe.kernels.cpu.fingerprint import fingerprint, hash_of
from dynamoe.kernels.cpu.vectors import CODED_CACHE, PLAIN, SINKS, cpu_formats, vectors
from dynamoe.kernels.reference.operations import CLAMPED_SWIGLU
from torch.utils._python_dispatch import TorchDispatchMode

# Those that make weights: their bits are those of plain torch (test_rounding_kernels.py).
MADE = {"round_weight", "pack_halves"}
NOTHING_COMPUTED = {"isas", "find_isa", "shared_bytes", "allocate", "read_words", "team_counters", *MADE}
OPERATORS = (
    *("add_rms_norm", "all_experts", "attention", "embed", "exit_decide", "experts", "limit_experts", "linear"),
    *("logits", "pack_experts", "pack_linear", "pack_quant", "project_kv", "quant_experts", "quant_linear"),
    *("rms_norm", "rope_and_write", "route", "router_entropy", "short_convolution", "recurrence"),
    *("head_linear", "latent_attention", "time_steps", "silu_gated", "selective_scan"),
)
PART_OF = {"quant_linear": "int8", "quant_experts": "int8", "pack_quant": "int8"}
PART_OF |= dict.fromkeys(("short_convolution", "recurrence", "time_steps", "silu_gated"), STATES)
PART_OF["selective_scan"] = CHANNEL_DECAYS
PART_OF |= dict.fromkeys(("head_linear", "latent_attention"), LATENT_PAGES)
WRITES = {"rope_and_write": (7, 8), "project_kv": (6, 7), "add_rms_norm": (2,), "attention": (10,)}  # their arguments


class Watch(TorchDispatchMode):
    """Sees every operator of the C++ kernels, and may flip one bit of what one of them computes.

    Arguments:
        plant: the operator; call: which of its calls.
    """

    def __init__(self, plant: str = "", call: int = 0) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        self.planted = False
        self._plant, self._call = plant, call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.namespace != "dynamoe_cpu":
            return found
        name = func._schema.name.split("::")[1]
        self.calls[name] = self.calls.get(name, 0) + 1
        if (name, self.calls[name]) == (self._plant, self._call):
            flip_a_bit(next(tensors([found, [args[place] for place in WRITES.get(name, ())]])))
            self.planted = True
        return found


def tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor) and values.numel():
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors(value)


def flip_a_bit(tensor: torch.Tensor) -> None:
    """Of a number, in its highest byte, so that it is not rounded away where it is a weight; else the lowest."""
    tensor.view(-1)[:1].view(torch.uint8)[-1 if tensor.is_floating_point() else 0] ^= 1


def operators() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name.split("::")[1].split(".")[0] for name in names if name.startswith("dynamoe_cpu::")}


@pytest.fixture(scope="module")
def backend() -> CpuBackend:
    return CpuBackend("cpu", torch.float32)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder in place of the built library's, so that nothing is known from an earlier run."""
    monkeypatch.setattr(cpu_build, "loaded", lambda: tmp_path / "kernels.so")
    return tmp_path


Found = tuple[list[str], dict[str, int]]


def found_by(backend: CpuBackend, part: str) -> Found:
    """The hash of every output, and how often each operator is called."""
    watch = Watch()
    with torch.inference_mode(), watch:
        return [hash_of([tensor]) for tensor in vectors()[part](backend)], watch.calls


UNCOMMON = {name for key, name in vars(uncommon).items() if key.isupper()}


@pytest.fixture(scope="module")
def plain(backend: CpuBackend) -> Found:
    return found_by(backend, PLAIN)


@pytest.fixture(scope="module")
def quantised(backend: CpuBackend) -> Found:
    return found_by(backend, "int8")


@pytest.fixture(scope="module")
def found(backend: CpuBackend, plain: Found, quantised: Found) -> dict[str, Found]:
    return {PLAIN: plain, "int8": quantised} | {
        part: found_by(backend, part) for part in (STATES, CHANNEL_DECAYS, LATENT_PAGES)
    }


def test_every_operator_has_vectors(found: dict[str, Found]) -> None:
    assert {name for _, calls in found.values() for name in calls} == operators() - NOTHING_COMPUTED
    stack = torch.classes.dynamoe_cpu.Stack(0, torch.float32, 64, 1e-5, 1.0)
    assert set(stack._method_names()) == {"__init__", "add_layer", "add_exit", "share", "run", "run_with_exits"}


def test_every_format_with_kernels_has_vectors(backend: CpuBackend) -> None:
    assert {format.name for format in cpu_formats()} == (
        set(vectors()) - {PLAIN, CODED_CACHE, SINKS, CLAMPED_SWIGLU} - UNCOMMON
    )
    assert set(vectors()) >= UNCOMMON
    assert {"int4", "int8", "fp8", "mxfp4"} <= set(vectors())
    with pytest.raises(ValueError, match="no test vectors for toy"):
        fingerprint(backend, backend.isa, ["toy"], "any processor")


def test_threads_and_unwritten_memory_do_not_count(backend: CpuBackend, plain: Found, poisoned_memory: None) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with torch.inference_mode():
            assert [hash_of([tensor]) for tensor in vectors()[PLAIN](backend)] == plain[0]
    finally:
        torch.set_num_threads(threads)


def test_another_process_finds_the_same() -> None:
    code = (
        "import torch; from dynamoe.kernels.cpu.backend import CpuBackend; from dynamoe.kernels.cpu.vectors import *;"
        "from dynamoe.kernels.cpu.fingerprint import hash_of;"
        "print(hash_of(vectors()[PLAIN](CpuBackend('cpu', torch.bfloat16))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout.strip() == hash_of(vectors()[PLAIN](CpuBackend("cpu", torch.bfloat16)))


@pytest.mark.parametrize("name", OPERATORS)
def test_one_bit_in_any_operator_changes_it(name: str, backend: CpuBackend, found: dict[str, Found]) -> None:
    part = PART_OF.get(name, PLAIN)
    hashes, calls = found[part]
    watch = Watch(name, calls[name] // 2 + 1)
    with torch.inference_mode(), watch:
        outputs = vectors()[part](backend)
        assert any(hash_of([tensor]) != known for tensor, known in zip(outputs, hashes, strict=True))
    assert watch.planted


def test_the_hashes_are_kept_beside_the_build(monkeypatch: pytest.MonkeyPatch, backend: CpuBackend, kept: Path) -> None:
    found = fingerprint(backend, backend.isa, ["int8"], "any processor")
    assert [file.name.startswith(f"outputs-{backend.isa}-float32-") for file in kept.iterdir()] == [True]
    monkeypatch.setattr("dynamoe.kernels.cpu.fingerprint.hash_of", None)  # nothing is computed again
    assert fingerprint(backend, backend.isa, ["int8"], "any processor") == found
    assert fingerprint(backend, backend.isa, [], "any processor") != found
    with pytest.raises(TypeError):
        fingerprint(backend, backend.isa, ["int8"], "another processor")


def test_kept_hashes_belong_to_the_python_that_packs_as_well(
    monkeypatch: pytest.MonkeyPatch, backend: CpuBackend, kept: Path
) -> None:
    fingerprint(backend, backend.isa, [], "any processor")
    monkeypatch.setattr("dynamoe.kernels.cpu.fingerprint.hash_of", None)
    fingerprint(backend, backend.isa, [], "any processor")
    monkeypatch.setattr("dynamoe.kernels.cpu.fingerprint.sources_hash", lambda *folders: f"others of {folders}")
    with pytest.raises(TypeError):
        fingerprint(backend, backend.isa, [], "any processor")


def test_a_folder_that_only_can_be_read_costs_a_warning(
    monkeypatch: pytest.MonkeyPatch, backend: CpuBackend, caplog: pytest.LogCaptureFixture, kept: Path
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", refuse)
        found = fingerprint(backend, backend.isa, [], "any processor")
    assert "computed at every start: read-only" in caplog.text
    assert not list(kept.iterdir())
    assert fingerprint(backend, backend.isa, [], "any processor") == found


def test_a_cut_file_of_hashes_is_made_again(backend: CpuBackend, kept: Path) -> None:
    found = fingerprint(backend, backend.isa, [], "any processor")
    (file,) = kept.iterdir()
    whole = file.read_text()
    file.write_text(whole[:20])
    assert fingerprint(backend, backend.isa, [], "any processor") == found
    assert file.read_text() == whole
