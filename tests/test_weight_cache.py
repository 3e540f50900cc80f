"""Quantised weights kept for the next start: the same bits, found again, never a damaged or a foreign file, bounded."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.checkpoint.packed_file import PackedFileError, read_packed, write_packed
from dynamoe.dynamic.cli.main import main
from dynamoe.dynamic.model.decoder import Decoder
from dynamoe.dynamic.model.load_config import WeightCacheConfig
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.model.quantization import methods
from dynamoe.kernels.api.packed_weight import PackedWeight
from dynamoe.kernels.cpu import build as cpu_build
from dynamoe.kernels.cpu.backend import CpuBackend
from forks import ForkedProcess
from test_loader import TOKENS, prompt_logits

# Projections, experts, a shared expert, and the embedding as LM head.
FAMILY = {"family": "granitemoeshared", "tie_word_embeddings": True, "num_hidden_layers": 1}


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of weights that are quantised."""
    seen: list[torch.Size] = []
    quantize = CpuBackend.quantize

    def counted(self: CpuBackend, rounding: Any, weight: torch.Tensor) -> Any:
        seen.append(weight.shape)
        return quantize(self, rounding, weight)

    monkeypatch.setattr(CpuBackend, "quantize", counted)
    return seen


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "weights"


def load(path: Path, folder: Path | None, method: str = "int4", size: int | str = "1GiB", **options: Any) -> Decoder:
    kept = WeightCacheConfig(enabled=folder is not None, folder=folder and str(folder), size=size, least=0)
    return load_decoder(path, dtype="bfloat16", device="cpu", quantization=method, weight_cache=kept, **options)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.packed"))


@pytest.mark.parametrize("method", methods())
def test_what_is_kept_has_the_same_bits(
    method: str, make_checkpoint: Callable[..., Path], folder: Path, counts: list[torch.Size]
) -> None:
    path = make_checkpoint(**FAMILY)
    without = load(path, None, method)
    assert not folder.exists()
    expected, every = prompt_logits(without, TOKENS), len(counts)
    assert torch.equal(prompt_logits(load(path, folder, method), TOKENS), expected)
    assert len(counts) == 2 * every
    found = load(path, folder, method)
    assert len(counts) == 2 * every  # nothing was quantised again
    assert torch.equal(prompt_logits(found, TOKENS), expected)
    assert (found.weight_bytes, found.quantization) == (without.weight_bytes, without.quantization)
    assert found.backend.numerics("any", False) == without.backend.numerics("any", False)
    assert len(files(folder)) == 1


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe", "hunyuan_v1_moe"])
def test_other_families_have_the_same_bits(
    family: str, make_checkpoint: Callable[..., Path], folder: Path, counts: list[torch.Size]
) -> None:
    """Biases, experts one by one, dense layers in front, an embedding of its own: that is small, and made each time."""
    path = make_checkpoint(family)
    expected = prompt_logits(load(path, folder, "w8a8"), TOKENS)
    counts.clear()
    assert torch.equal(prompt_logits(load(path, folder, "w8a8"), TOKENS), expected)
    assert len(counts) <= 1


def test_another_checkpoint_option_or_instruction_set_is_another_file(
    make_checkpoint: Callable[..., Path], folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = make_checkpoint(**FAMILY)
    load(path, folder)
    assert len(files(folder)) == 1
    load(shutil.copytree(path, tmp_path / "copy"), folder)  # the same content
    assert len(files(folder)) == 1
    load(make_checkpoint(**FAMILY, seed=1), folder)
    load(path, folder, "w4a8")
    load(path, folder, quantize_lm_head=False)
    load(path, folder, backend="cpu:portable")
    monkeypatch.setattr("dynamoe.dynamic.model.weight_cache.sources_hash", lambda *_: "of other code")
    load(path, folder)
    assert len(files(folder)) == 6


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def flip(place: int) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[place] ^= 1
        file.write_bytes(data)

    return change


def replace_by_link(file: Path) -> None:
    other = file.with_name("other")
    file.rename(other)
    file.symlink_to(other)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut short": cut,
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"more"),
    "empty": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "a bit of the magic": flip(0),
    "a bit of the header's length": flip(15),
    "a bit of the header": flip(60),
    "a bit of the last weight": flip(-1),
    "writable by others": lambda file: file.chmod(0o666),
    "a link": replace_by_link,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_anew(
    damage: str,
    make_checkpoint: Callable[..., Path],
    folder: Path,
    counts: list[torch.Size],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = make_checkpoint(**FAMILY)
    expected, every = prompt_logits(load(path, folder), TOKENS), len(counts)
    (file,) = files(folder)
    DAMAGES[damage](file)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(prompt_logits(load(path, folder), TOKENS), expected)
    assert len(counts) == 2 * every
    assert [str(file) in record.message for record in caplog.records] == [True]
    load(path, folder)
    assert len(counts) == 2 * every
    assert len(caplog.records) == 1


def test_a_file_under_another_key_is_not_read(
    make_checkpoint: Callable[..., Path], folder: Path, counts: list[torch.Size], caplog: pytest.LogCaptureFixture
) -> None:
    one, other = make_checkpoint(**FAMILY), make_checkpoint(**FAMILY, seed=1)
    load(one, folder)
    (first,) = files(folder)
    expected = prompt_logits(load(other, folder), TOKENS)
    (second,) = set(files(folder)) - {first}
    shutil.copyfile(first, second)
    counts.clear()
    assert torch.equal(prompt_logits(load(other, folder), TOKENS), expected)
    assert counts
    assert "other weights than its name says" in caplog.text


def test_those_used_least_recently_make_room(make_checkpoint: Callable[..., Path], folder: Path) -> None:
    path = make_checkpoint(**FAMILY)
    load(path, folder, "int8")
    (first,) = files(folder)
    limit = 2 * first.stat().st_size + 4096
    load(path, folder, "w8a8", size=limit)
    (second,) = set(files(folder)) - {first}
    for age, file in ((200, first), (100, second)):
        os.utime(file, (file.stat().st_atime, file.stat().st_mtime - age))
    load(path, folder, "int8", size=limit)  # used now
    load(path, folder, "fp8", size=limit)
    assert first.exists()
    assert not second.exists()
    assert len(files(folder)) == 2
    kept = set(files(folder))
    load(path, folder, "int4", size=1000)  # larger than all that may be there
    assert set(files(folder)) == kept
    assert not list(folder.glob("*.unfinished"))


def test_folders_of_others_are_not_used(
    make_checkpoint: Callable[..., Path], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_checkpoint(**FAMILY)
    load(path, folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert files(folder)[0].stat().st_mode & 0o777 == 0o600
    folder.chmod(0o777)
    load(path, folder, "int8")
    assert "others than this user may write" in caplog.text
    assert len(files(folder)) == 1


def test_nobody_waits_for_a_process_that_writes(make_checkpoint: Callable[..., Path], folder: Path) -> None:
    path = make_checkpoint(**FAMILY)
    folder.mkdir(mode=0o700)
    (folder / "killed.unfinished").write_bytes(b"left over")
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        load(path, folder)
        assert not files(folder)
    load(path, folder)
    assert len(files(folder)) == 1
    assert not (folder / "killed.unfinished").exists()


def test_an_error_while_writing_costs_a_warning(
    make_checkpoint: Callable[..., Path],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("dynamoe.dynamic.model.weight_cache.write_packed", full)
    load(make_checkpoint(**FAMILY), folder)
    assert "no space left on device" in caplog.text
    assert not [file for file in folder.iterdir() if file.suffix in (".packed", ".unfinished")]


def test_two_processes_at_once(make_checkpoint: Callable[..., Path], folder: Path, tmp_path: Path) -> None:
    path = make_checkpoint(**FAMILY)
    code = (
        "import sys; from pathlib import Path; from dynamoe.dynamic.model.loader import load_decoder;"
        "from dynamoe.dynamic.model.load_config import WeightCacheConfig;"
        "decoder = load_decoder(Path(sys.argv[1]), dtype='bfloat16', device='cpu', quantization='int4',"
        " weight_cache=WeightCacheConfig(folder=sys.argv[2], least=0)); print(decoder.weight_bytes)"
    )
    command = ["-c", code, str(path), str(folder)]
    both = [ForkedProcess(command, tmp_path / f"output-{number}", tmp_path) for number in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    assert len({process.output.splitlines()[-1] for process in both}) == 1
    assert len(files(folder)) == 1
    assert not list(folder.glob("*.unfinished"))
    assert torch.equal(prompt_logits(load(path, folder), TOKENS), prompt_logits(load(path, None), TOKENS))


def test_small_checkpoints_are_quantised_each_time(make_checkpoint: Callable[..., Path], folder: Path) -> None:
    kept = WeightCacheConfig(folder=str(folder))
    load_decoder(make_checkpoint(**FAMILY), device="cpu", quantization="int4", weight_cache=kept)
    load(make_checkpoint(**FAMILY), folder, "none")
    load(make_checkpoint(**FAMILY), folder, backend="torch")
    assert not folder.exists()


def test_prepare_keeps_them(
    make_checkpoint: Callable[..., Path], folder: Path, counts: list[torch.Size], capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_checkpoint(**FAMILY)
    keys = [f"weight_cache.folder={folder}", "weight_cache.least=0", "dtype=bfloat16", "device=cpu"]
    main(["prepare", f"model={path}", "quantization=int4", *keys])
    (file,) = files(folder)
    assert f"int4: {file}" in capsys.readouterr().out
    counts.clear()
    load(path, folder)
    assert not counts
    main(["prepare", f"model={path}", "quantization=int4", *keys, "weight_cache.enabled=false"])
    assert "int4: made at every start" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["size=big", "least=-1", "enabled=7"])
def test_settings_are_checked(key: str) -> None:
    name, value = key.split("=")
    with pytest.raises(ValueError, match=rf"weight_cache\.{name} must be .*{value}"):
        WeightCacheConfig(**{name: int(value) if value.isdigit() else value})


def test_a_file_of_many_chunks(tmp_path: Path) -> None:
    CpuBackend("cpu", torch.float32)
    words = [torch.randint(2**31, (count,), dtype=torch.int32) for count in (1, (5 << 20) + 3)]
    weights = {"a": PackedWeight(shape=(3, 4), words=(words[0],), layouts=((1, 2),))}
    weights["b"] = PackedWeight(shape=(2, 3, 4), words=(words[1], words[0]), layouts=((1,), (2,)))
    file = tmp_path / "file.packed"
    write_packed(file, {"key": (1, 2)}, weights)
    found = read_packed(file, {"key": [1, 2]}, torch.ops.dynamoe_cpu.allocate)
    assert [(w.shape, w.layouts) for w in found.values()] == [(w.shape, w.layouts) for w in weights.values()]
    assert torch.equal(found["b"].words[0], words[1])
    assert torch.equal(found["b"].words[1], words[0])
    flip(9 << 20)(file)
    with pytest.raises(PackedFileError, match=r"what it holds from byte \d+ on has changed"):
        read_packed(file, {"key": [1, 2]}, torch.ops.dynamoe_cpu.allocate)
    assert cpu_build.is_loaded()
