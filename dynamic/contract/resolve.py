"""Contracts on offer: which certificate serves a request that asks for (alpha, delta)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from .certificate import Certificate, RequestFacts


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """What a request gets.

    Arguments:
        certificate: the one that it runs under; None: it runs exactly.
        reason: why, in words.
    """

    certificate: Certificate | None
    reason: str


class Contracts:
    """Certificates for several (alpha, delta), never changed: other certificates make another collection.

    Raises:
        ValueError: for two certificates of one (alpha, delta) whose temperatures overlap. Which of them a request gets
            would be a choice by their results, and that choice would cost a part of delta.
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
        """The boldest certificate that promises at least what was asked and covers the request; exact if there is none.

        The boldest has the largest alpha, among equals the largest delta: the closest to what was asked.

        Raises:
            ValueError: for a level outside (0, 1).
        """
        for name, value in (("alpha", alpha), ("delta", delta)):
            if not 0 < value < 1:
                raise ValueError(f"{name} must be between 0 and 1, not {value}")
        asked = f"alpha={alpha:g}, delta={delta:g}"
        strict = [c for c in self._certificates if c.alpha <= alpha and c.delta <= delta]
        for certificate in strict:
            if certificate.refusal(facts) is None:
                exactly = (certificate.alpha, certificate.delta) == (alpha, delta)
                match = "as asked" if exactly else f"stricter than the {asked} that was asked for"
                return Resolution(
                    certificate=certificate,
                    reason=f"certificate {certificate.id} holds {_levels(certificate)}, {match}",
                )
        if strict:
            refusals = "; ".join(f"certificate {c.id}: {c.refusal(facts)}" for c in strict)
            return Resolution(certificate=None, reason=f"no certificate for {asked} covers the request; {refusals}")
        held = ", ".join(f"({c.alpha:g}, {c.delta:g})" for c in self._certificates)
        return Resolution(
            certificate=None,
            reason=f"no certificate is as strict as {asked}; " + (f"there are {held}" if held else "there is none"),
        )


def _levels(certificate: Certificate) -> str:
    return f"alpha={certificate.alpha:g}, delta={certificate.delta:g}"
