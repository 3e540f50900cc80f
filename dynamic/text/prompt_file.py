"""Prompts out of a file: one JSON object per line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

KINDS = ("prompt", "messages", "prompt_token_ids")


def read_prompts(file: Path, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of every prompt, in the file's order.

    Arguments:
        file: JSON lines. Each holds ``prompt`` (a text), ``messages`` (a conversation, for the chat template) or
            ``prompt_token_ids``; other keys are passed over, empty lines too.

    Raises:
        ValueError: for a file that cannot be read or holds no prompt, and for a line that is none of these, with its
            number.
    """
    try:
        # Strings may hold other line ends of Unicode as they are.
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    prompts = [_read(line, f"{file}, line {n}", tokenizer) for n, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ValueError(f"{file} holds no prompt")
    return prompts


def _read(line: str, where: str, tokenizer: Tokenizer) -> list[int]:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {getattr(error, 'msg', error)}") from error
    found = [kind for kind in KINDS if isinstance(record, dict) and kind in record]
    if len(found) != 1:
        raise ValueError(f"{where} must hold one of {', '.join(KINDS)}")
    value = record[found[0]]
    if found[0] == "prompt" and isinstance(value, str):
        tokens = tokenizer.encode(value)
    elif found[0] == "messages" and isinstance(value, list):
        tokens = tokenizer.encode(tokenizer.chat_prompt(value, True), add_special_tokens=False)
    elif found[0] == "prompt_token_ids" and isinstance(value, list) and all(type(t) is int for t in value):
        tokens = value
    else:
        raise ValueError(f"{where}: {found[0]} has the wrong type, {type(value).__name__}")
    if not tokens:
        raise ValueError(f"{where}: the prompt is empty")
    return tokens
