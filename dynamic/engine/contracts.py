"""What the engine asks about quality contracts; the answers come from a catalog of certificates."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from .quality import ContractOutcome, Quality
from .sampling_params import SamplingParams


class ContractResolver(Protocol):
    """Turns the risk that a caller accepts into what its request may spend."""

    def resolve(
        self, quality: Quality, params: SamplingParams, max_tokens: int
    ) -> tuple[SamplingParams, ContractOutcome]:
        """What a request spends, as raw settings or ``exact``, and what to tell its caller.

        Arguments:
            max_tokens: the longest output that it may get.
        """
        ...


class NoContracts:
    """Without certificates every request runs exactly."""

    def resolve(
        self, quality: Quality, params: SamplingParams, max_tokens: int
    ) -> tuple[SamplingParams, ContractOutcome]:
        """See :class:`ContractResolver`."""
        asked = f"alpha={quality.alpha:g}, delta={quality.delta:g}"
        reason = f"no certificate is as strict as {asked}; there is none"
        return replace(params, quality="exact"), ContractOutcome(quality=quality, certificate=None, reason=reason)
