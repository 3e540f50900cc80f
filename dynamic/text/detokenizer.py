"""Turns token ids into text while they are generated; the parts add up to exactly ``tokenizer.decode`` of all ids."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Protocol

from .tokenizer import Tokenizer, byte_of_name


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


class ByteDetokenizer:
    """For byte-level vocabularies: constant work per token, and only an incomplete character is held back."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id) or b"")

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
        if byte_of_name(name) is not None:
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


class TokenStarts:
    """Where each token begins in the text that it becomes a part of, in characters. A token that is a part of a
    character begins where that does, and one that is left out of the text where the next one does.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._detokenizer = make_detokenizer(tokenizer, skip_special_tokens)
        self._certain = 0  # characters
        self._held_back = b""

    def add(self, token_id: int) -> int:
        """Where the next token begins."""
        before = self._certain
        start = before + len(self._held_back.decode(errors="ignore"))
        self._certain += len(added := self._detokenizer.add(token_id))
        if token_id in self._skipped:
            return start
        text, name = self._tokenizer.token_text(token_id), self._tokenizer.token_name(token_id)
        if not added:
            if "\ufffd" in text or byte_of_name(name or "") is not None:  # otherwise it has no text
                self._held_back += self._tokenizer.token_bytes(token_id) or b""
            return start
        self._held_back = b""
        # What was held back may have become text of another length.
        return start if "\ufffd" in text else max(before, self._certain - len(text))

    def add_all(self, token_ids: Iterable[int]) -> list[int]:
        """Where each of the next tokens begins."""
        return [self.add(token_id) for token_id in token_ids]
