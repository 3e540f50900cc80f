"""Writing the files of a checkpoint directory; every file is written atomically."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch


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


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy what belongs to the tokenizer and to generation from one checkpoint directory to another."""
    tokens = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    for name in (*tokens, "chat_template.jinja", "generation_config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
