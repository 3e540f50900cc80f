"""The text of one output while it grows: detokenising, stop strings, what is held back."""

from __future__ import annotations

from collections.abc import Sequence

from ..text.detokenizer import make_detokenizer
from ..text.tokenizer import Tokenizer
from .sampling_params import SamplingParams


class StopStrings:
    """Looks for stop strings in a growing text.

    Arguments:
        strings: non-empty strings; the one that begins first in the text wins, of several there the first listed.
        keep: leave the stop string at the end of the text.
    """

    def __init__(self, strings: Sequence[str], keep: bool) -> None:
        self._strings = tuple(strings)
        self._keep = keep
        self._longest = max(map(len, self._strings), default=0)
        self._pending = ""  # not released: might be the beginning of a stop string

    def add(self, piece: str, stop_enabled: bool = True) -> tuple[str, str | None]:
        """Take more text; returns the text that may be shown now, and the stop string that was found, if any.

        Arguments:
            stop_enabled: False while the output may not end yet: no stop is looked for, and all text is released.
        """
        if not self._strings:
            return piece, None
        text = self._pending + piece
        if not stop_enabled:
            self._pending = ""
            return text, None
        if found := self._first(text):
            at, string = found
            return text[: at + len(string) if self._keep else at], string
        held = self._possible_beginning(text)
        self._pending = text[len(text) - held :]
        return text[: len(text) - held], None

    def flush(self) -> str:
        """The text still held back."""
        text, self._pending = self._pending, ""
        return text

    def _first(self, text: str) -> tuple[int, str] | None:
        hits = [(at, order) for order, s in enumerate(self._strings) if (at := text.find(s)) >= 0]
        if not hits:
            return None
        at, order = min(hits)
        return at, self._strings[order]

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(s.startswith(tail) for s in self._strings):
                return length
        return 0


class OutputText:
    """Turns an output's tokens into the pieces of text that may be shown.

    Arguments:
        tokenizer: of the model.
        params: of the request; ``params.detokenize`` must be set.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._detokenizer = make_detokenizer(tokenizer, params.skip_special_tokens)
        self._stops = StopStrings(params.stop, params.include_stop_str_in_output)

    def add(self, token_id: int, stop_enabled: bool) -> tuple[str, str | None]:
        """Text that is certain after one more token, and the stop string it completes (see :class:`StopStrings`)."""
        return self._stops.add(self._detokenizer.add(token_id), stop_enabled)

    def finish(self) -> tuple[str, str | None]:
        """The rest of the text once no token follows, and the stop string that it completes."""
        text, stop = self._stops.add(self._detokenizer.flush())
        return (text, stop) if stop is not None else (text + self._stops.flush(), None)
