"""A model that is ready to serve: its decoder, its tokenizer and what its makers recommend."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .decoder import Decoder
from .spec import ModelSpec

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model with its tokenizer.

    Arguments:
        name: what the caller asked for.
        path: the directory it came from.
        generation_defaults: what ``generation_config.json`` recommends: any of temperature, top_p, top_k, min_p,
            repetition_penalty, max_new_tokens.
    """

    name: str
    path: Path
    spec: ModelSpec
    decoder: Decoder
    tokenizer: Tokenizer
    generation_defaults: dict[str, Any]
