"""What stands in for the tokenizer of a model that takes and gives token ids only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class NoTokenizer(Tokenizer):
    """Knows no text and no special tokens; whatever needs text is refused.

    Arguments:
        path: the checkpoint's directory.
        vocab_size: token ids below it exist.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.path, self.vocab_size = path, vocab_size
        self.special_tokens: dict[str, str] = {}
        self.special_ids: frozenset[int] = frozenset()
        self._chat_sources: dict[str, str] = {}
        self._chat_templates = {}
        self._token_bytes = {}

    def _refuse(self) -> NoReturn:
        raise ValueError(f"the model in {self.path} was loaded without its tokenizer; it takes and gives token ids")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self._refuse()

    def encode_with_starts(self, text: str, add_special_tokens: bool = True) -> tuple[list[int], list[int]]:
        self._refuse()

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        self._refuse()

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self._refuse()

    def hf(self) -> PreTrainedTokenizerBase:
        self._refuse()

    def token_text(self, token_id: int) -> str:
        """Empty, as for ids outside a vocabulary: logprobs have ids and no texts."""
        return ""

    def token_name(self, token_id: int) -> None:
        """None, as for ids outside a vocabulary."""
