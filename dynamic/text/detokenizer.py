"""Turns token ids into text while they are generated; the parts add up to exactly ``tokenizer.decode`` of all ids."""

from __future__ import annotations

import codecs
from functools import lru_cache
from typing import Protocol

from .tokenizer import Tokenizer


class Detokenizer(Protocol):
    """Turns a growing list of ids into parts of a text."""

    def add(self, token_id: int) -> str:
        """The text that is certain after one more token; what may still change is held back."""
        ...

    def flush(self) -> str:
        """The text held back so far, as it is."""
        ...


def make_detokenizer(tokenizer: Tokenizer, skip_special_tokens: bool) -> Detokenizer:
    """The cheapest exact detokeniser for a tokenizer."""
    if tokenizer.is_byte_level:
        return ByteDetokenizer(tokenizer, skip_special_tokens)
    return WindowDetokenizer(tokenizer, skip_special_tokens)


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """The byte-level alphabet (Radford et al. 2019): printable Latin-1 is itself, the rest sits at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


class ByteDetokenizer:
    """For byte-level vocabularies: constant work per token, and only an incomplete character is held back."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        name = self._tokenizer.token_name(token_id)
        if name is None:
            return ""
        alphabet = _byte_of_character()
        try:
            data = bytes([alphabet[character] for character in name])
        except KeyError:  # an added token, which is plain text
            data = name.encode()
        return self._decoder.decode(data)

    def flush(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class WindowDetokenizer:
    """For all other decoders: decodes a short window and reports what a token added to it.

    A decoder may look at neighbours (spaces, runs of byte tokens), so the window begins with the last part reported,
    and nothing is reported while it ends in a character that a further token could change.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._ids: list[int] = []
        self._reported = 0  # ids of the window whose text has been reported
        self._reported_text = ""

    def add(self, token_id: int) -> str:
        name = self._tokenizer.token_name(token_id)
        if name is None or token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        if len(name) == 6 and name.startswith("<0x"):
            return ""  # one of a run of byte tokens, which becomes text as a whole
        return self._report(held_back="\ufffd")

    def flush(self) -> str:
        return self._report(held_back=None)

    def _report(self, held_back: str | None) -> str:
        text = self._tokenizer.decode(self._ids, skip_special_tokens=False)
        if len(text) <= len(self._reported_text) or (held_back is not None and text.endswith(held_back)):
            return ""
        added = text[len(self._reported_text) :]
        self._ids = self._ids[self._reported :]
        self._reported = len(self._ids)
        self._reported_text = self._tokenizer.decode(self._ids, skip_special_tokens=False)
        return added
