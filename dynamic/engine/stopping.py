"""When an output ends: stop strings in its text, and the text that may be shown before that is decided."""

from __future__ import annotations

from collections.abc import Sequence


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
