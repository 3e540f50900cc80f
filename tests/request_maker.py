"""Requests as the engine would make them, for tests of its parts."""

from __future__ import annotations

from typing import Any

from dynamoe.dynamic.engine.request import Request, Sequence, StopTokens
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.text.tokenizer import Tokenizer

NO_STOPS = StopTokens(eos=frozenset(), listed=frozenset())


def make_request(
    tokens: list[int],
    request_id: str = "r",
    *,
    priority: int = 0,
    salt: str | None = None,
    arrival: int = 0,
    max_total_tokens: int = 10_000,
    stop_tokens: StopTokens = NO_STOPS,
    tokenizer: Tokenizer | None = None,
    **params: object,
) -> Request:
    """A request; ``params`` are those of :class:`SamplingParams`."""
    return Request(
        request_id,
        tokens,
        SamplingParams(**params),  # type: ignore[arg-type]
        priority=priority,
        cache_salt=salt,
        arrival=arrival,
        max_total_tokens=max_total_tokens,
        stop_tokens=stop_tokens,
        base_seed=0,
        tokenizer=tokenizer,
    )


def make_sequence(tokens: list[int], **settings: Any) -> Sequence:
    """The one completion of a request as :func:`make_request` makes it."""
    return make_request(tokens, **settings).sequences[0]
