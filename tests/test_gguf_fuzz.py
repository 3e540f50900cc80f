"""Damaged and hostile GGUF files: an error of one line that names the file, or a model; no crash, no hang.

A worker imports and loads file after file, so that a crash or a hang is seen from outside, and its memory measured.
"""

from __future__ import annotations

import json
import random
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gguf_files import write_gguf

HERE = Path(__file__).parent
LONGEST = 10.0  # seconds of a processor that a file may take
PATIENCE = 240.0  # seconds until a worker counts as hanging, with whatever else the machine does
HUGE = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1]
WORKER = """
import gc, json, re, shutil, sys, time
from pathlib import Path
from dynamoe.dynamic.checkpoint.weights import CheckpointError
from dynamoe.dynamic.convert.gguf_import import import_gguf
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.text.tokenizer import Tokenizer
def memory(of):
    return int(re.search(rf"{of}:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
for line in sys.stdin:
    file = Path(line.strip())
    target = file.with_suffix(".out")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, begun = memory("VmRSS"), time.process_time()
    try:
        import_gguf(file, target, keep_codes=True, progress=False)
        load_decoder(target, device="cpu", backend="torch", dequantize=True)
        Tokenizer.from_directory(target).encode("The 12 routers")
        said = "loaded"
    except CheckpointError as error:
        said = str(error)
    except BaseException as error:
        said = f"!{type(error).__name__}: {error}"
    grown = memory("VmHWM") - before
    gc.collect()
    if "transformers" in sys.modules:
        said = "!transformers was loaded"
    print(json.dumps([said, grown, time.process_time() - begun]), flush=True)
"""


class Worker:
    """Imports files in a process of its own."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", WORKER]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def read(self, file: Path) -> tuple[str, int, float]:
        """What became of a file, how much more memory it took at its peak, and how long the processor was busy."""
        import selectors

        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{file}\n")
        self.process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            assert selector.select(PATIENCE), f"{file} hangs"
        line = self.process.stdout.readline()
        assert line, f"{file} ended the process"
        return tuple(json.loads(line))


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.process.kill()
    worker.process.communicate()


@pytest.fixture(scope="module")
def sources(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """A dense file and a mixture, quantised, and the dense one with other kinds of metadata."""
    folder = tmp_path_factory.mktemp("sources")
    llama = make_checkpoint("llama", num_hidden_layers=1)
    mixtral = make_checkpoint("mixtral", num_hidden_layers=1, intermediate_size=64)
    files = [
        write_gguf(llama, folder / "a.gguf", {"attn_q": "Q4_0", "token_embd": "Q8_0"}),
        write_gguf(llama, folder / "b.gguf", edit=lambda v, t: v.update({"llama.rope.scaling.factor": 2.0})),
        write_gguf(mixtral, folder / "c.gguf", "Q8_0"),
    ]
    return [file.read_bytes() for file in files]


def header_end(data: bytes) -> int:
    """About where the tensors' data begin."""
    return data.index(b"output_norm.weight") + 40


def truncated(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data)) if draw.random() < 0.5 else draw.randrange(header_end(data))]


def flipped(data: bytes, draw: random.Random) -> bytes:
    """A few bytes of the header, which say everything."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        out[draw.randrange(header_end(data))] = draw.randrange(256)
    return bytes(out)


def hugely_counted(data: bytes, draw: random.Random) -> bytes:
    """Numbers of 64 bits become extreme: counts, lengths of strings and arrays, sizes, offsets."""
    out, end = bytearray(data), header_end(data)
    places = [at for at in range(4, end - 8) if 0 < struct.unpack_from("<Q", data, at)[0] < 2**20]
    for at in draw.sample(places, draw.randint(1, 3)):
        struct.pack_into(
            "<Q", out, at, draw.choice([*HUGE, struct.unpack_from("<Q", data, at)[0] + draw.choice([-1, 1])])
        )
    return bytes(out)


def with_other_types(data: bytes, draw: random.Random) -> bytes:
    """Numbers of 32 bits behind names: types of values and tensors, small counts, values."""
    out, end = bytearray(data), header_end(data)
    keys = [b"llama.", b"tokenizer.", b"blk.", b"general.", b"output", b"token_embd"]
    places = []
    for key in keys:
        at = data.find(key)
        while 0 <= at < end:
            length = struct.unpack_from("<Q", data, at - 8)[0]
            places += [at + length + 4 * word for word in range(10) if length < 100]
            at = data.find(key, at + 1)
    for at in draw.sample(places, draw.randint(1, 2)):
        struct.pack_into("<I", out, at, draw.choice([*range(45), 2**31 - 1, 2**31, 2**32 - 1, 0x7F800000, 0xFF800000]))
    return bytes(out)


def with_other_keys(data: bytes, draw: random.Random) -> bytes:
    """Letters of a key or a tensor's name."""
    out = bytearray(data)
    key = draw.choice([b"llama.", b"tokenizer.", b"blk.0.", b"general.", b"output", b"token_embd"])
    at = data.index(key) + draw.randrange(len(key))
    out[at] = draw.choice(b"xyz.\n\x00\xff")
    return bytes(out)


def overlapping(data: bytes, draw: random.Random) -> bytes:
    """The offset of a tensor is another's, or negative, or not aligned."""
    out = bytearray(data)
    name = draw.choice([b"blk.0.attn_k.weight", b"blk.0.ffn_norm.weight", b"output_norm.weight"])
    at = data.index(name) + len(name)
    at += 4 + 8 * struct.unpack_from("<I", data, at)[0] + 4
    struct.pack_into("<Q", out, at, draw.choice([*HUGE, 32, 64, 33, 2**20]))
    return bytes(out)


def shuffled(data: bytes, draw: random.Random) -> bytes:
    """A piece of the file is elsewhere, twice, or gone."""
    begin, size = draw.randrange(header_end(data)), draw.randint(1, 200)
    piece, at = data[begin : begin + size], draw.randrange(header_end(data))
    return draw.choice(
        [data[:begin] + data[begin + size :], data[:at] + piece + data[at:], data[:at] + piece + data[at + size :]]
    )


def noisy(data: bytes, draw: random.Random) -> bytes:
    """The weights are anything at all: infinite scales, numbers that are none."""
    begin = header_end(data) + 64
    return data[:begin] + draw.randbytes(len(data) - begin)


NAMED = re.compile(r"'(model\.|blk\.|lm_head|token_embd|output)[\w.]*'")  # a tensor or its module
MUTATIONS = [truncated, flipped, hugely_counted, with_other_types, with_other_keys, overlapping, shuffled, noisy]


def check(worker: Worker, sources: list[bytes], folder: Path, numbers: range) -> None:
    """Mutate, import, and look at what is said; the first files only warm the process up."""
    for file_number, data in enumerate(sources):
        warm = folder / f"warm{file_number}.gguf"
        warm.write_bytes(data)
        assert worker.read(warm)[0] == "loaded"
    refused, faults = 0, list[str]()
    for number in numbers:
        draw = random.Random(number)
        source, mutate = draw.choice(sources), MUTATIONS[number % len(MUTATIONS)]
        file = folder / f"{mutate.__name__}-{number}.gguf"
        file.write_bytes(mutate(source, draw))
        said, grown, seconds = worker.read(file)
        named = said == "loaded" or file.name in said or NAMED.search(said)
        if said.startswith("!") or "\n" in said or not named or len(said) > 1000:
            faults.append(f"{file.name}: {said[:300]!r}")
        if grown > 2 * len(source) + 2**20:
            faults.append(f"{file.name} took {grown} bytes more")
        if seconds > LONGEST:
            faults.append(f"{file.name} took {seconds:.0f} s")
        refused += said != "loaded"
        file.unlink()
    assert not faults, "\n".join(faults[:10])
    assert refused > 0.5 * len(numbers)


def test_a_few_damaged_files(worker: Worker, sources: list[bytes], tmp_path: Path) -> None:
    check(worker, sources, tmp_path, range(48))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_damaged_files(worker: Worker, sources: list[bytes], tmp_path: Path) -> None:
    check(worker, sources, tmp_path, range(100, 900))
