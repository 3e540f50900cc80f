"""The text of one output while it grows: detokenising, stop strings, what is held back."""

from __future__ import annotations

from ..text.detokenizer import make_detokenizer
from ..text.tokenizer import Tokenizer
from .sampling_params import SamplingParams
from .stopping import StopStrings


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
