"""The quality contract: the risk that a caller accepts, and what it got."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The risk that a caller accepts.

    Arguments:
        alpha: share of tokens, in the mean over requests, that may differ from the full model's choice.
        delta: probability with which the calibration behind this promise may have erred.

    Raises:
        ValueError: for a level that is not between 0 and 1.
    """

    alpha: float
    delta: float = 0.05

    def __post_init__(self) -> None:
        for name in ("alpha", "delta"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1:
                raise ValueError(f"quality.{name} must be between 0 and 1, not {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ContractOutcome:
    """What became of a contract.

    Arguments:
        quality: what was asked for.
        certificate: id of the certificate that the request ran under; None: it ran exactly.
        reason: why, in words.
        certified_tokens: of each completion, from its beginning on; what follows runs exactly. None: without one.
        exact_after: once a completion was longer: how many tokens it had when it was computed anew to go on exactly.
    """

    quality: Quality
    certificate: str | None
    reason: str
    certified_tokens: int | None = None
    exact_after: int | None = None


def read_quality(value: Any) -> str | Quality | None:
    """``"exact"``, None, a :class:`Quality`, or the same as a mapping with ``alpha`` and perhaps ``delta``.

    Raises:
        ValueError: for anything else.
    """
    if value is None or isinstance(value, Quality) or value == "exact":
        return value
    if isinstance(value, Mapping) and "alpha" in value and set(value) <= {"alpha", "delta"}:
        return Quality(**value)
    raise ValueError(f"quality must be 'exact', or hold alpha and perhaps delta, not {value!r}")
