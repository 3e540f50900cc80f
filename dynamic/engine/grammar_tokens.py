"""The vocabulary and the tokenizer as llguidance reads them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

END = b"<end>"  # the text of the token that stands for every token which ends an output
_FORCED_TEXTS = 1024  # whose tokens are kept: keys and punctuation come again and again
_FORCED_LENGTH = 512  # characters of one that the tokenizer sees: only its first token is used


class GrammarTokens:
    """A vocabulary as llguidance reads it. Its end-of-text token is one behind the model's: see :data:`END`.

    Arguments:
        ends: tokens that end an output; no text can be written with them, nor with the tokenizer's special tokens.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: frozenset[int]) -> None:
        self._encode = lru_cache(_FORCED_TEXTS)(tokenizer.encode)
        self._special = tokenizer.special_ids | ends
        self.longest: Callable[[str], list[int]] = lambda text: []
        self.eos_token_id = vocab_size
        self.tokens = [tokenizer.token_bytes(token) or b"" for token in range(vocab_size)] + [END]
        self.special_token_ids = [*sorted(token for token in self._special if token < vocab_size), vocab_size]

    def __call__(self, text: str | bytes) -> list[int]:
        """The tokens of a part of a text, which have to add up to it: the library breaks if they do not."""
        whole = text if isinstance(text, str) else text.decode("utf-8", "replace")
        part, rest = whole[:_FORCED_LENGTH], whole[_FORCED_LENGTH:]
        for before in ("", "\x02"):  # some tokenizers put a space in front of a text
            ids = self._encode(before + part, False)[len(self._encode(before, False)) if before else 0 :]
            if self._special.isdisjoint(ids) and b"".join(self.tokens[token] for token in ids) == part.encode():
                return [*ids, *self.longest(rest)] if rest else ids
        return self.longest(whole)
