"""Writing the files of a checkpoint directory; every file is written atomically."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .weights import ITEM_BITS


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a dictionary as indented JSON."""
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, file)


def write_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file."""
    from safetensors.torch import save_file

    unfinished = file.with_suffix(".unfinished")
    save_file(tensors, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, file)


@dataclass(frozen=True, kw_only=True)
class LateTensor:
    """A tensor of a file that is written piece by piece.

    Arguments:
        dtype: in safetensors' terms, ``F32``.
        shape: its sizes.
        make: the tensor itself, when it is its turn.
    """

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * ITEM_BITS[self.dtype] // 8


def write_tensors_one_by_one(file: Path, tensors: Mapping[str, LateTensor], done: Callable[[str], None]) -> str:
    """Write a safetensors file with no more than one tensor in memory.

    Arguments:
        done: called with each name when its tensor was written.

    Returns: the file's SHA-256, made by a second thread meanwhile.
    """
    end = 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    text = struct.pack("<Q", len(text)) + text
    unfinished, digest = file.with_suffix(".unfinished"), hashlib.sha256(text)
    with unfinished.open("wb") as stream, ThreadPoolExecutor(1) as beside:
        stream.write(text)
        for name, tensor in tensors.items():
            data = tensor.make().contiguous().view(-1).view(torch.uint8).numpy()
            assert data.nbytes == tensor.nbytes, f"{name} has {data.nbytes} bytes, not {tensor.nbytes}"
            hashed = beside.submit(digest.update, data.data)
            stream.write(data.data)
            hashed.result()
            done(name)
    os.replace(unfinished, file)
    return digest.hexdigest()


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy what belongs to the tokenizer and to generation from one checkpoint directory to another."""
    tokens = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    for name in (*tokens, "chat_template.jinja", "generation_config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
