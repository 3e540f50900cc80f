"""What lies in a cache and was cut off or filled with zeros is made again, or refused in one line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dynamoe.dynamic.contract.monitor_store import MonitorStore
from dynamoe.dynamic.convert import model_store
from dynamoe.dynamic.text import corpus
from dynamoe.dynamic.text.sealed_directory import is_intact, seal
from dynamoe.exits import sidecar as exit_sidecar
from dynamoe.exits.training.checkpoint import load_checkpoint, save_checkpoint
from dynamoe.kernels.cpu import build as cpu_build
from dynamoe.moe import sidecar as expert_sidecar
from dynamoe.moe.contribution import ExpertScales, LayerScales
from torch.utils import cpp_extension

Damage = Callable[[Path], None]


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def emptied(file: Path) -> None:
    os.truncate(file, 0)


def zeroed(file: Path) -> None:
    file.write_bytes(b"\0" * file.stat().st_size)


damages = pytest.mark.parametrize("damage", [cut, emptied, zeroed], ids=lambda damage: damage.__name__)


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels of one small file in a cache of their own; names of what was compiled."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "small.cpp").write_text("int seven() { return 7; }\n")
    monkeypatch.setattr(cpu_build, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiled: list[str] = []
    compile_library = cpu_build._compile

    def counted(compiler: str, name: str, *arguments: object) -> Path:
        compiled.append(name)
        cpp_extension.JIT_EXTENSION_VERSIONER.entries.clear()  # in one process torch builds a name once
        return compile_library(compiler, name, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(cpu_build, "_compile", counted)
    return compiled


def test_damaged_kernels_are_built_again_before_they_are_loaded(builds: list[str]) -> None:
    library = cpu_build.build()
    whole = library.read_bytes()
    assert cpu_build.build() == library
    assert len(builds) == 1
    assert [file.name for file in library.parent.iterdir() if file.is_dir()] == []
    hashes = library.with_suffix(".sha256")
    for number, (file, damage) in enumerate(((library, cut), (library, zeroed), (hashes, emptied)), 2):
        copied = file.with_name("copied")  # the file itself is mapped: this process has loaded it
        shutil.copyfile(file, copied)
        damage(copied)
        copied.replace(file)
        assert cpu_build.build() == library
        assert len(builds) == number
        torch.ops.load_library(library)
    assert len(library.read_bytes()) == len(whole)
    hashes.unlink()  # as a version that wrote none has left it
    cpu_build.build()
    assert len(builds) == 5


def test_a_library_is_on_the_disk_before_it_can_be_found(
    builds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def flushed(handle: int) -> None:
        steps.append(("fsync", Path(os.readlink(f"/proc/self/fd/{handle}")).suffix))
        fsync(handle)

    def moved(source: Path, target: Path) -> None:
        steps.append(("replace", Path(target).suffix))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", moved)
    cpu_build.build()
    of_library = [step for step, suffix in steps if suffix == ".so"]
    assert of_library == ["fsync", "replace"]
    assert steps[-1] == ("fsync", ""), "the folder's entry is flushed last"


@damages
@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "part/config.json"])
def test_a_damaged_model_of_the_store_is_prepared_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, damage: Damage
) -> None:
    monkeypatch.setenv("DYNAMOE_HOME", str(tmp_path))
    prepared: list[Path] = []

    def prepare(target: Path) -> None:
        prepared.append(target)
        (target / "part").mkdir()
        for name in ("model.safetensors", "tokenizer.json", "part/config.json"):
            (target / name).write_bytes(name.encode() * 100)

    first = model_store.prepare_once("some", {"a": 1}, prepare)
    assert model_store.prepare_once("some", {"a": 1}, prepare) == first
    assert len(prepared) == 1
    damage(first / file)
    assert model_store.prepare_once("some", {"a": 1}, prepare) == first
    assert len(prepared) == 2
    assert (first / file).read_bytes() == file.encode() * 100
    (first / file).unlink()
    model_store.prepare_once("some", {"a": 1}, prepare)
    assert len(prepared) == 3


def test_a_sealed_directory_is_read_only_where_its_files_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "a").write_bytes(b"a" * 1000)
    assert not is_intact(folder)
    seal(folder)
    read: list[str] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda stream, kind: read.append(stream.name) or digest(stream, kind))
    assert is_intact(folder)
    assert read == []
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied, copy_function=shutil.copyfile)
    for _ in range(2):  # once read, it has the time of change that was sealed
        assert is_intact(copied)
        assert read == [str(copied / "a")]
    (folder / "b").touch()
    assert not is_intact(folder), "a file too many"


def test_a_seal_brings_every_file_and_directory_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "outer" / "inner" / "a").write_bytes(b"a")
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.readlink(f"/proc/self/fd/{handle}")))
    seal(tmp_path)
    assert sorted(flushed) == sorted(map(str, (tmp_path, *tmp_path.rglob("*"))))
    assert len(flushed) == 5


@damages
@pytest.mark.parametrize("file", ["tokens.safetensors", "corpus.json", ".sealed.json"])
def test_a_damaged_corpus_is_made_again(tmp_path: Path, file: str, damage: Damage) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(3):
        (text / f"{number}.txt").write_text(f"A line of text about {number} things and others.\n" * 200)
    settings = corpus.CorpusConfig(vocab_size=300, text_folder=str(text))
    said: list[str] = []
    folder = corpus.build_corpus(settings, tmp_path / "cache", say=said.append)
    expected, once = (
        corpus.load_corpus(folder).train.clone(),
        len(said),
    )  # a copy: the file is cut off under the mapping
    damage(folder / file)
    assert corpus.build_corpus(settings, tmp_path / "cache", say=said.append) == folder
    assert len(said) == 2 * once
    assert torch.equal(corpus.load_corpus(folder).train, expected)


def filled_monitor(folder: Path) -> Path:
    file = folder / "monitor.db"
    store = MonitorStore(file)
    store.register("c", 0.05, 0.05)
    for number in range(200):
        store.pick(f"request {number}", "c")
    store.close()
    return file


@damages
def test_a_damaged_monitor_is_refused(tmp_path: Path, damage: Damage) -> None:
    file = filled_monitor(tmp_path)
    damage(file)
    with pytest.raises(ValueError, match=r"monitor\.db (is|cannot be)") as refusal:
        MonitorStore(file)
    assert "\n" not in str(refusal.value)


def test_a_monitor_with_a_damaged_page_is_refused(tmp_path: Path) -> None:
    file = filled_monitor(tmp_path)
    with file.open("r+b") as stream:
        stream.seek(-4096, os.SEEK_END)
        stream.write(b"\0" * 4096)
    with pytest.raises(ValueError, match=r"monitor\.db (is damaged|cannot be used)"):
        MonitorStore(file)


@damages
def test_damaged_sidecars_are_refused(tmp_path: Path, damage: Damage) -> None:
    layer = LayerScales(scale_E=torch.rand(4), impact=0.5)
    expert_sidecar.save_scales(ExpertScales(layers=(layer,), tokens=9, backbone_sha256="ab"), tmp_path)
    damage(tmp_path / expert_sidecar.JSON_FILE)
    with pytest.raises(ValueError, match=r"experts\.json is damaged"):
        expert_sidecar.load_scales(tmp_path)
    (tmp_path / exit_sidecar.JSON_FILE).write_text(json.dumps({"format": 1}) * 20)
    damage(tmp_path / exit_sidecar.JSON_FILE)
    with pytest.raises(ValueError, match=rf"{exit_sidecar.JSON_FILE} or .* is damaged"):
        exit_sidecar.load_heads(tmp_path)


@damages
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_of_a_training_run_is_refused(tmp_path: Path, file: str, damage: Damage) -> None:
    model = torch.nn.Linear(8, 8)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(model.parameters())]
    saved = save_checkpoint(tmp_path, 3, model, optimizers, {})
    damage(saved / file)
    with pytest.raises(ValueError, match="step-00000003 is damaged"):
        load_checkpoint(saved, model, optimizers)


@damages
def test_damaged_measurements_of_kernels_are_taken_again(tmp_path: Path, damage: Damage) -> None:
    from dynamoe.kernels.triton.tuning import TuningCache

    TuningCache("GPU", tmp_path).put("key", {"config": {"block_m": 16}})
    (file,) = tmp_path.iterdir()
    assert TuningCache("GPU", tmp_path).get("key")
    damage(file)
    assert TuningCache("GPU", tmp_path).get("key") == {}
    for text in ("null", "[]", "{}", '{"entries": 3}', '{"entries": {"key": 3}}'):
        file.write_text(text)
        assert TuningCache("GPU", tmp_path).get("key") == {}
