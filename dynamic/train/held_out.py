"""Prompts out of a corpus's held-out text that neither the model nor its exits learned from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..text.corpus import Corpus
from .served import round_robin, unused_blocks

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from .recipe_config import RecipeConfig

PROMPTS_FILE = "prompts.jsonl"


@dataclass(frozen=True, kw_only=True)
class HeldOutPrompt:
    """The beginning of a text, with its genre and whether other pages of its package were trained on."""

    tokens: list[int]
    genre: str
    known: bool

    @property
    def label(self) -> str:
        return f"{self.genre}/{'known' if self.known else 'unseen'}"


def held_out_prompts(
    corpus: Corpus, config: RecipeConfig, count: int, length: int, *, skip: int = 0, strict: bool = True
) -> list[HeldOutPrompt]:
    """Prompts after the first ``skip``, in turn from each label, and there from each package, until one is used up.

    Arguments:
        config: of the recipe; determines the blocks that its exits used.
        length: tokens of a prompt; at most a block of the recipe.
        strict: refuse to give fewer.

    Raises:
        ValueError: when the text does not hold that many.
    """
    block = config.prompt_tokens + config.new_tokens
    if length > block:
        raise ValueError(f"a prompt of {length} tokens is longer than a block of {block}")
    used = config.served_prompts + config.exit_rows // block
    by_label: dict[str, list[list[HeldOutPrompt]]] = {}
    for stream, blocks in unused_blocks(corpus.held_out, used, block, config.seed).items():
        genre, known = stream.split("/")[0], corpus.known[stream]
        prompts = [HeldOutPrompt(tokens=tokens[:length], genre=genre, known=known) for tokens in blocks]
        if prompts:
            by_label.setdefault(prompts[0].label, []).append(prompts)
    labels = [round_robin(packages) for _, packages in sorted(by_label.items())]
    found = round_robin(labels)[skip : skip + count]
    if strict and len(found) < count:
        raise ValueError(f"the held-out text holds {max(0, len(found) + skip)} prompts, not {skip} + {count}")
    return found


def write_prompts(prompts: list[HeldOutPrompt], tokenizer: Tokenizer, file: Path) -> None:
    """One JSON object per line: ``prompt``, a text, and its ``genre``."""
    with file.open("w", encoding="utf-8") as lines:
        for prompt in prompts:
            text = tokenizer.decode(prompt.tokens, skip_special_tokens=False)
            lines.write(json.dumps({"prompt": text, "genre": prompt.label}, ensure_ascii=False) + "\n")
