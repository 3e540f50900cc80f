"""Resolves a contract: which certificate serves a request that asks for (alpha, delta)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from .bounds import check_levels
from .certificate import Certificate, RequestFacts


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """The result for a request.

    Arguments:
        certificate: the one that it runs under; None: it runs exactly.
        reason: why, in words.
    """

    certificate: Certificate | None
    reason: str


class Contracts:
    """An immutable collection of certificates for several (alpha, delta).

    Raises:
        ValueError: for two certificates of one (alpha, delta) whose temperatures overlap: choosing between them by
            their results would use up a part of delta.
    """

    def __init__(self, certificates: Iterable[Certificate] = ()) -> None:
        # The boldest first.
        ordered = sorted(certificates, key=lambda c: (-c.alpha, -c.delta, c.scope.lowest_temperature, c.id))
        for first, second in itertools.pairwise(ordered):
            same = (first.alpha, first.delta) == (second.alpha, second.delta)
            if same and second.scope.lowest_temperature <= first.scope.highest_temperature:
                raise ValueError(
                    f"certificates {first.id} and {second.id} are both for {_levels(first)} at temperature"
                    f" {second.scope.lowest_temperature:g}; only one can be served"
                )
        self._certificates = tuple(ordered)

    @property
    def certificates(self) -> tuple[Certificate, ...]:
        """The boldest first: by alpha, then delta, both falling."""
        return self._certificates

    def resolve(self, alpha: float, delta: float, facts: RequestFacts) -> Resolution:
        """The boldest certificate that is at least as strict as asked and covers the request; exact if there is none.

        The boldest has the largest alpha, among equals the largest delta: the closest to the requested contract. One
        that covers the whole output goes before those that cover its beginning only.

        Raises:
            ValueError: for a level outside (0, 1).
        """
        check_levels(alpha=alpha, delta=delta)
        asked = f"alpha={alpha:g}, delta={delta:g}"
        strict = [c for c in self._certificates if c.alpha <= alpha and c.delta <= delta]
        strict.sort(key=lambda c: c.scope.max_tokens < facts.max_tokens)
        for certificate in strict:
            if certificate.refusal(facts) is None:
                exactly = (certificate.alpha, certificate.delta) == (alpha, delta)
                match = "as asked" if exactly else f"stricter than the {asked} that was asked for"
                against = f", against {certificate.original}" if certificate.reference else ""
                reason = f"certificate {certificate.id} holds {_levels(certificate)}, {match}{against}"
                return Resolution(certificate=certificate, reason=reason)
        if strict:
            refusals = "; ".join(f"certificate {c.id}: {c.refusal(facts)}" for c in strict)
            return Resolution(certificate=None, reason=f"no certificate for {asked} covers the request; {refusals}")
        held = ", ".join(f"({c.alpha:g}, {c.delta:g})" for c in self._certificates)
        known = f"there are {held}" if held else "there is none"
        return Resolution(certificate=None, reason=f"no certificate is as strict as {asked}; {known}")


def _levels(certificate: Certificate) -> str:
    return f"alpha={certificate.alpha:g}, delta={certificate.delta:g}"
