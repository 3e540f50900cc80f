"""Damages one file of a checkpoint in many ways and loads each, in a process of its own with bounded memory.

``python file_fuzz.py COUNT FILE…`` prints a line of JSON per case: the file, the case's number, what was done, and what
came of it.
The process dies where a load crashes it, takes more than ten seconds, or more memory than it may have.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import random
import resource
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

SECONDS = 10
SLACK = 256 * 2**20  # what Python, torch and its threads may take meanwhile; a tensor of a wrong size takes more
STRANGE: list[Any] = [
    *(None, True, False, "x", "", "1", "a\nb", [], ["x"], [[]], {}, {"a": {}}, -1, 0, 1, 2, 0.5, -0.5, 7, 127, 4096),
    *(2**31 - 1, 2**31, 2**32, 2**53, 2**63, 10**30, -(2**31), float("inf"), float("-inf"), float("nan"), 1e30, 1e-30),
    *("z" * 100_000, [0] * 100_000, "\ud800", "\0", "../x"),
]


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def damage_json(value: Any, draw: random.Random) -> tuple[Any, str]:
    """A copy in which one place differs, and which."""
    root = {"root": copy.deepcopy(value)}
    holder, key, path = root, "root", ""
    while isinstance(holder[key], dict | list) and holder[key] and (not path or draw.random() < 0.75):
        holder = holder[key]
        key = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
        path += f"/{key}"
    old, how = holder[key], draw.randrange(8)
    if how == 0 and path:
        del holder[key]
        return root["root"], f"{path} is gone"
    if how == 1 and isinstance(holder, dict):
        name = draw.choice(("made_up", "", "made up\n", "_private", "hidden_size", "weights", "dtype"))
        holder[name] = draw.choice(STRANGE)
        return root["root"], f"{path} has {name!r} beside it"
    if how == 2 and isinstance(old, int | float):
        holder[key] = -old if draw.random() < 0.5 else old * draw.choice((2, 3, 2**20)) + draw.choice((0, 1))
    elif how == 3 and isinstance(old, list):
        holder[key] = old * draw.choice((0, 2, 3)) if len(old) < 1000 else old[::2]
    elif how == 4:
        holder[key] = nested(draw.choice((3, 100, 900)))
    elif how == 5 and isinstance(old, str):
        holder[key] = old[: draw.randrange(len(old) + 1)] + draw.choice(("", "x", "\n", "\u202e"))
    elif how == 6 and isinstance(old, list | dict):
        holder[key] = str(old)[:1000]
    else:
        holder[key] = draw.choice(STRANGE)
    return root["root"], f"{path} is {str(holder[key])[:60]!r}"


def damage_bytes(data: bytes, draw: random.Random, near: int) -> tuple[bytes, str]:
    """Bytes that differ, most often among the first ``near``; or that end early, or late."""
    how = draw.randrange(3)
    if how == 0:
        cut = draw.randrange(len(data))
        return data[:cut], f"cut at {cut}"
    if how == 1:
        return data + draw.randbytes(draw.choice((1, 8, 1000))), "longer"
    out = bytearray(data)
    for _ in range(draw.choice((1, 2, 20))):
        out[draw.randrange(min(near, len(out)))] = draw.choice((*b'0919{}[]",:-e', draw.randrange(256)))
    return bytes(out), "other bytes"


def damaged(data: bytes, binary: bool, draw: random.Random) -> tuple[bytes, str]:
    """One damage to a file."""
    if not binary:
        if draw.random() < 0.15:
            return damage_bytes(data, draw, len(data))
        whole = json.loads(data)
        if "quantization_config" in whole and draw.random() < 0.8:  # one of thirty keys, with many below it
            part, how = damage_json(whole["quantization_config"], draw)
            return json.dumps({**whole, "quantization_config": part}).encode(), f"quantization_config{how}"
        value, how = damage_json(whole, draw)
        return json.dumps(value).encode(), how
    (length,) = struct.unpack("<Q", data[:8])
    if draw.random() < 0.3:
        return damage_bytes(data, draw, 8 + length)
    if draw.random() < 0.1:
        wrong = draw.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))
        return struct.pack("<Q", wrong) + data[8:], f"a header of {wrong} bytes"
    value, how = damage_json(json.loads(data[8 : 8 + length]), draw)
    header = json.dumps(value).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :], how


def load(path: Path) -> None:
    """The model, and one step of it."""
    import torch
    from dynamoe.dynamic.convert.load_model import load_model
    from dynamoe.dynamic.model.prompt_pass import fresh_cache
    from dynamoe.exits.segments import Segment

    model = load_model(path, dtype="float32", device="cpu", progress=False)
    tokens = model.tokenizer.encode("The capital of France is Paris. é")
    model.tokenizer.decode(tokens)
    ids = torch.tensor(
        [token for token in tokens if token < model.spec.vocab_size][: min(5, model.spec.max_position)] or [0]
    )
    kv, batch = fresh_cache(model.decoder, [len(ids)])
    whole = Segment(index=0, layers=range(model.spec.num_layers))
    model.decoder.logits(model.decoder.run_segment(whole, model.decoder.embed(ids), kv, batch))


def main(file: Path, count: int) -> None:
    """Run the cases of one file, and leave it as it was."""
    from dynamoe.dynamic.checkpoint.weights import CheckpointError

    load(file.parent)  # whatever is imported or built on the way is there now
    whole = file.read_bytes()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + max(2 * len(whole), SLACK)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        for number in range(count):
            data, how = damaged(whole, file.suffix == ".safetensors", random.Random(number))
            file.write_bytes(data)
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            try:
                load(file.parent)
                result = "it loads"
            except CheckpointError as error:
                result = f"refused: {error}"
            except Exception as error:
                result = f"{type(error).__name__}: {error}"
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps([str(file), number, how, result]), flush=True)
    finally:
        file.write_bytes(whole)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for argument in sys.argv[2:]:
        main(Path(argument), int(sys.argv[1]))
