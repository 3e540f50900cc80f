"""Inputs of a study: requests to serve, and texts for teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..text.calibration_text import reference_pages
from ..text.prompt_file import read_prompts
from ..train.held_out import PROMPTS_FILE

if TYPE_CHECKING:
    from ..model.loaded import LoadedModel

_WINDOW = 64  # tokens of a request that is cut out of running text


def read_requests(file: Path, model: LoadedModel, length: int = _WINDOW) -> list[list[int]]:
    """Token ids of every request in a file.

    Arguments:
        file: JSON lines (``.jsonl``) as for ``dynamoe calibrate``; anything else is running text and gets cut into
            pieces.
        length: tokens of such a piece.

    Raises:
        ValueError: for a file that cannot be read or holds nothing.
    """
    if file.suffix == ".jsonl":
        return read_prompts(file, model.tokenizer)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    found = _pieces([text], model, length)
    if not found:
        raise ValueError(f"{file} is too short: its text has fewer than {length} tokens")
    return found


def requests_from(file: str | None, model: LoadedModel) -> tuple[str, list[list[int]]]:
    """The requests of a file, see :func:`read_requests`, or else :func:`built_in_requests`."""
    return (
        built_in_requests(model) if file is None else (Path(file).name, read_requests(Path(file).expanduser(), model))
    )


def built_in_requests(model: LoadedModel, length: int = _WINDOW) -> tuple[str, list[list[int]]]:
    """The held-out prompts that lie beside a model; for one that has none, pages of Python's language reference.

    Returns: where they come from, in words, and their token ids.
    """
    file = model.path / PROMPTS_FILE
    if file.is_file():
        return f"{PROMPTS_FILE} beside the model", read_prompts(file, model.tokenizer)
    return "held-out pages of Python's language reference", _pieces(reference_pages(held_out=True), model, length)


def draw(requests: Sequence[list[int]], count: int, seed: int, what: str) -> list[list[int]]:
    """A random sample of the requests, in random order.

    Raises:
        ValueError: when there are fewer.
    """
    if len(requests) < count:
        raise ValueError(f"{count} requests are wanted, {what} holds {len(requests)}")
    order = np.random.default_rng(seed).permutation(len(requests))[:count]
    return [requests[place] for place in order]


def forced_texts(requests: Sequence[list[int]], context: int, longest: int, ends: frozenset[int]) -> list[list[int]]:
    """Texts as far as they are forced: to the first token that ends an output, at most ``context + longest`` tokens.

    Arguments:
        context: tokens in front of the first that is forced.
        ends: end-of-text tokens.

    Raises:
        ValueError: when no text has a token behind its context.
    """
    texts = []
    for tokens in requests:
        text = tokens[: context + longest]
        end = next((place for place in range(context, len(text)) if text[place] in ends), len(text) - 1)
        if end >= context:
            texts.append(text[: end + 1])
    if not texts:
        raise ValueError(f"no text is longer than context_tokens={context} tokens: there is nothing to predict")
    return texts


def _pieces(texts: Sequence[str], model: LoadedModel, length: int) -> list[list[int]]:
    stream = [i for ids in model.tokenizer.encode_batch(list(texts), add_special_tokens=False) for i in ids]
    return [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]
