"""Models whose experts are not all in memory: the same bits, within the memory, and a clear end where a file is bad."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dynamoe.dynamic.checkpoint.expert_file import PAGE, ExpertFile, ExpertFileWriter, ExpertReadError
from dynamoe.dynamic.checkpoint.weights import CheckpointError
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.model import expert_memory
from dynamoe.dynamic.model.expert_pool import ExpertPool
from dynamoe.dynamic.model.loader import load_decoder
from engine_answers import answers
from test_decoder import random_prompts
from test_families_parity_gpt_oss import saved as saved

PROMPTS = random_prompts([1, 7, 33])
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0)
MIXTURE: dict[str, Any] = {"quantization": "int4-g32", "dtype": "bfloat16", "device": "cpu", "progress": False}
Checkpoints = Callable[..., Path]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DYNAMOE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "experts"


def engine(path: Path, memory: int | str | None = None, **options: Any) -> Engine:
    return Engine(load_model(path, **{**MIXTURE, "expert_memory": memory, **options}))


def load(path: Path, memory: str, **options: Any) -> None:
    load_decoder(path, **{**MIXTURE, "expert_memory": memory, **options})


def pool_of(engine: Engine) -> ExpertPool:
    pool = engine.model.decoder.expert_pool
    assert pool is not None
    return pool


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_moe", {}),
        # A dense layer first, shared experts, a selection bias.
        ("glm4_moe", {"quantization": "w8a8", "dtype": "float32"}),
        ("gpt_oss", {"quantization": "none"}),  # MXFP4, biases
    ],
)
def test_the_bits_are_those_of_experts_in_memory(
    family: str, options: dict[str, Any], make_checkpoint: Checkpoints, saved: Checkpoints
) -> None:
    path = saved("mxfp4") if family == "gpt_oss" else make_checkpoint(family)
    whole = engine(path, **options)
    expected, spec = answers(whole, PROMPTS, GREEDY), whole.model.spec
    most = max(layer.moe.num_experts for layer in spec.layers if layer.moe is not None)
    size = pool_of(engine(path, "1GiB", **options)).slot_bytes
    for memory in ("1GiB", most * size, (most + 3) * size + 1):
        found = engine(path, memory, **options)
        pool = pool_of(found)
        assert answers(found, PROMPTS, GREEDY) == expected
        traffic = found.stats().expert_traffic
        assert traffic is not None
        assert 0 < traffic.foreseen <= traffic.foreseeable < traffic.uses
        if memory == "1GiB":
            assert (pool.num_slots, pool.absent_bytes) == (pool.num_experts, 0)
            assert traffic.hits > pool.num_experts >= traffic.reads  # nobody may have used one of them
            assert found.model.decoder.weight_bytes == whole.model.decoder.weight_bytes
        else:
            assert pool.num_slots == memory // size
            assert pool.words.nbytes == pool.num_slots * size <= memory
            assert traffic.uses - traffic.hits - traffic.early <= traffic.reads
            assert traffic.reads > pool.num_experts
            assert traffic.early > 0 or memory == most * size  # there may be no room to read ahead


def test_packed_once(copy_checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    path = copy_checkpoint("qwen3_moe")
    load(path, "1GiB")
    (folder,) = home.glob("*/")
    packed: list[int] = []
    of = expert_memory.ExpertParts.of
    monkeypatch.setattr(expert_memory.ExpertParts, "of", lambda weights: packed.append(1) or of(weights))
    load(path, "1GiB")
    assert not packed
    load(path, "1GiB", quantization="int8")  # of other weights
    assert len(packed) == 3
    (path / "generation_config.json").touch()  # a file of another time
    load(path, "1GiB", quantization="int8")
    assert len(packed) == 6
    table = folder / "table.json"
    table.write_text(table.read_text().replace('"stride": ', '"stride": 1'))
    load(path, "1GiB", quantization="int8")
    assert len(packed) == 9
    assert [path for path in home.iterdir() if path.is_dir()] == [folder]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "replaced"])
def test_files_that_change_while_a_model_runs(damage: str, make_checkpoint: Checkpoints, home: Path) -> None:
    path = make_checkpoint("qwen3_moe")
    running, expected = engine(path, "1GiB"), answers(engine(path), PROMPTS, GREEDY)
    (records,) = home.glob("*/records")
    if damage == "replaced":  # the open file is still whole
        engine(path, "1GiB", quantization="int8")
        shutil.rmtree(records.parent)
        assert answers(running, PROMPTS, GREEDY) == expected
        return
    whole = bytearray(records.read_bytes())
    for place in range(123, len(whole), pool_of(running).slot_bytes):
        whole[place] ^= 1
    records.write_bytes(whole[:PAGE] if damage == "truncated" else whole)
    reason = "ends .* bytes too early" if damage == "truncated" else "bytes are damaged"
    with pytest.raises(ExpertReadError, match=f"expert [0-7] of layer 0 in {records}: .*{reason}"):
        answers(running, PROMPTS, GREEDY)
    if damage == "truncated":
        made_of = json.loads(records.with_name("table.json").read_text().split("\n")[1])["made_of"]
        with pytest.raises(CheckpointError, match="damaged, or of another model"):
            ExpertFile(records.parent, made_of)


def make_pool(folder: Path, layers: int, experts: int, slots: int) -> tuple[ExpertPool, np.ndarray]:
    """A pool over random records of unequal layers, and the two parts of all experts, (layers, experts, bytes)."""
    random, writer = np.random.default_rng(0), ExpertFileWriter(folder / "file", "numbers")
    parts = random.integers(0, 256, (layers, experts, 5000), np.uint8)
    for layer in range(layers):
        writer.add(layer, parts[layer, :, :1000], parts[layer, :, 1000:], b"biases", {"layer": layer})
    writer.finish()
    file = ExpertFile(folder / "file", "numbers")
    assert file.shared(layers - 1) == b"biases"
    return ExpertPool(file, slots * 2 * PAGE), parts


@pytest.mark.parametrize("slots", [6, 7, 13, 24])
def test_what_is_brought_is_the_expert(slots: int, tmp_path: Path) -> None:
    """Whatever was guessed, and whatever has a slot: experts in use have theirs until the next call."""
    pool, parts = make_pool(tmp_path, 4, 6, slots)
    random, reads = np.random.default_rng(1), 0
    memory = pool.words.numpy().view(np.uint8)
    assert len(memory) == slots * 2 * PAGE
    for step in range(120):
        layer = step % 4
        used = np.flatnonzero(random.random(6) < random.choice((0.2, 0.5, 1.0)))
        guess = random.permutation(6)[: random.integers(0, 7)] if random.random() < 0.8 else None
        places = pool.bring(layer, used, (layer + 1) % 4, lambda guess=guess: guess)
        assert places.shape == (2, 6)
        for expert in range(6):
            first, second = places[:, expert].tolist()
            assert (first >= 0) == (second >= 0) == (expert in used)
            if expert in used:
                assert np.array_equal(memory[first : first + 1000], parts[layer, expert, :1000])
                assert np.array_equal(memory[second : second + 4000], parts[layer, expert, 1000:])
        traffic = pool.traffic()
        assert traffic.reads - reads <= slots
        reads = traffic.reads
        assert traffic.read_bytes == reads * 2 * PAGE
    assert (reads == 24) if slots == 24 else reads > 24
    pool.close()


def test_experts_that_are_used_often_stay(tmp_path: Path) -> None:
    pool, _ = make_pool(tmp_path, 4, 6, 4 * 2 + 4)
    random = np.random.default_rng(2)
    for step in range(400):
        if step == 200:
            before = pool.traffic()
        pool.bring(step % 4, np.array([0, 1, random.integers(2, 6)]))
    after = pool.traffic()
    uses, hits = after.uses - before.uses, after.hits - before.hits
    assert uses == 600
    assert hits >= 400  # two of three, and what of the others was there
    pool.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "none"}, "the experts of layer 0 are not quantised, or in several formats"),
        ({"backend": "torch"}, "expert_memory needs backend=cpu, not torch"),
        ({"expert_memory": "1KiB"}, "expert_memory must hold the 8 experts of a layer, [0-9]+ bytes, not 1024"),
        ({"expert_memory": "much"}, "expert_memory must be a number of bytes or like '2GiB', not 'much'"),
        ({"join": lambda *arguments: None}, "expert_memory goes with one process"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    options: dict[str, Any], message: str, make_checkpoint: Checkpoints, home: Path
) -> None:
    settings = {**MIXTURE, "expert_memory": "1GiB", **options}
    with pytest.raises(ValueError, match=message):
        load_decoder(make_checkpoint("qwen3_moe"), **settings)
    assert not list(home.glob(".*"))  # nothing half done is left


def test_models_without_mixtures_are_refused(make_checkpoint: Checkpoints) -> None:
    with pytest.raises(ValueError, match="this qwen3 model has no mixtures of experts"):
        engine(make_checkpoint("qwen3"), "1GiB")
