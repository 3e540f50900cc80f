"""What goes between the host and a device in a step, counted where the engine would ask a GPU for it.

There is no GPU here: tensors lie on the CPU, which the engine is made to treat as a device. Calls are counted in our
own files only, not in the interpreter that runs the Triton kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine import draws, sampler, selection
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.engine.staging import HostStaging

COUNTED = ("dynamic/engine/", "dynamic/model/", "kernels/triton/backend.py")
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, detokenize=False)
DRAWN = replace(GREEDY, temperature=0.8, seed=1)
FILTERED = replace(DRAWN, top_k=7, top_p=0.9, min_p=0.01)


class Counts:
    """Calls that bring tensors to a device, and calls that wait for one."""

    uploads = downloads = 0


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counts]:
    counts = Counts()

    def watched(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            file = sys._getframe(1).f_code.co_filename
            if any(part in file for part in COUNTED):
                setattr(counts, kind, getattr(counts, kind) + 1)
            return function(*arguments, **more)

        return call

    with monkeypatch.context() as patched:
        for name in ("item", "tolist", "cpu", "__int__", "__bool__", "__float__", "nonzero"):
            patched.setattr(torch.Tensor, name, watched(getattr(torch.Tensor, name), "downloads"))
        patched.setattr(torch, "tensor", watched(torch.tensor, "uploads"))
        yield counts


def as_on_a_gpu(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Packs what goes up, and samples as on a device."""
    engine.runner.staging = HostStaging(torch.device("cpu"), packed=True)
    for module in (selection, sampler):
        monkeypatch.setattr(module, "on_host", lambda _: False)
    monkeypatch.setattr(draws, "on_host", lambda _: False)
    return engine


def test_packed_arrays_come_out_as_they_went_in() -> None:
    staging = HostStaging(torch.device("cpu"), packed=True)
    arrays = [
        np.arange(5),
        np.arange(6, dtype=np.int32).reshape(2, 3),
        np.zeros((0, 4), dtype=np.int32),
        np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2],
    ]
    found = staging.upload(*arrays)
    assert staging.uploads == 1
    for array, tensor in zip(arrays, found, strict=True):
        assert np.array_equal(tensor.numpy(), array)
        assert tensor.numpy().dtype == array.dtype
        assert tensor.data_ptr() % 16 == found[0].data_ptr() % 16
        assert tensor.is_contiguous()
    shared = HostStaging(torch.device("cpu"))
    assert shared.upload(arrays[0])[0].numpy() is not None
    assert np.shares_memory(shared.upload(arrays[0])[0].numpy(), arrays[0]), "a CPU needs no copy"
    assert shared.uploads == 0


def tokens_of(engine: Engine, params: list[SamplingParams]) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(0)
    for number, settings in enumerate(params):
        prompt = torch.randint(3, 320, (3 + 5 * number,), generator=generator).tolist()
        engine.add_request(str(number), prompt, settings)
    found: dict[str, list[int]] = {str(number): [] for number in range(len(params))}
    while engine.has_unfinished():
        for delta in engine.step():
            found[delta.request_id] += delta.completions[0].token_ids
    return found


@pytest.mark.parametrize("params", [[GREEDY] * 3, [DRAWN] * 2, [GREEDY, DRAWN, FILTERED]])
def test_a_step_has_one_copy_up_and_one_wait(
    params: list[SamplingParams], make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(make_checkpoint("qwen3_moe"), dtype="float32", backend="torch", progress=False)
    config = EngineConfig(max_num_batched_tokens=8)  # prompts in chunks, beside decodes
    expected = tokens_of(Engine(model, config), params)
    engine = as_on_a_gpu(Engine(model, config), monkeypatch)
    assert tokens_of(engine, params) == expected
    for number, settings in enumerate(params):
        engine.add_request(str(number), list(range(5, 16 + number)), replace(settings, max_tokens=20))
    sampled = 0
    for _ in range(12):
        before = engine.runner.staging.uploads
        with counting(monkeypatch) as counts:
            deltas = engine.step()
        assert engine.runner.staging.uploads == before + 1
        assert counts.downloads == (1 if deltas else 0)
        assert counts.uploads == 0 or any(not p.greedy for p in params), "settings of draws go up one by one"
        sampled += bool(deltas)
    assert sampled > 8


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about lanes that are masked out
def test_an_exit_is_one_wait_and_no_copy_up(make_exits: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_exits("qwen3_moe", {1: 0.5}, num_hidden_layers=2)
    model = load_model(path, dtype="float32", backend="triton", device="cpu", progress=False)
    early = replace(GREEDY, quality=None, exit_thresholds={1: 0.5}, max_tokens=5)
    engine = as_on_a_gpu(Engine(model), monkeypatch)
    for number in range(3):
        engine.add_request(str(number), [5, 6 + number], early)
    engine.step()  # the prompts
    split = 0
    while engine.has_unfinished():
        before, rows = engine.runner.staging.uploads, engine.runner.exits.projected_rows
        with counting(monkeypatch) as counts:
            engine.step()
        assert engine.runner.staging.uploads == before + 1
        assert counts.downloads == 2, "one exit, and the tokens"
        assert counts.uploads == 0
        split += 0 < engine.runner.exits.projected_rows - rows < 3
    assert split, "some rows exit and some continue"
