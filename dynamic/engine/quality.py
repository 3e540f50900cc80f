"""The quality contract: the risk that a caller accepts, and what it got."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The risk that a caller accepts.

    Arguments:
        alpha: share of tokens, in the mean over requests, that may differ from the full model's choice.
        delta: probability with which the calibration behind this promise may have erred.
        require: refuse the request where no certificate covers it, instead of running it exactly.

    Raises:
        ValueError: for a level that is not between 0 and 1.
    """

    alpha: float
    delta: float = 0.05
    require: bool = False

    def __post_init__(self) -> None:
        for name in ("alpha", "delta"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1:
                raise ValueError(f"quality.{name} must be between 0 and 1, not {value!r}")
        if not isinstance(self.require, bool):
            raise ValueError(f"quality.require must be true or false, not {self.require!r}")


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


class ContractUnavailable(ValueError):
    """A contract that its caller requires cannot be kept."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"quality.require: the contract cannot be kept: {reason}")


def required(outcome: ContractOutcome) -> ContractOutcome:
    """The outcome of a contract.

    Raises:
        ContractUnavailable: where the request would run exactly, and its caller requires the contract.
    """
    if outcome.quality.require and outcome.certificate is None:
        raise ContractUnavailable(outcome.reason)
    return outcome


def check_fields(value: Mapping[Any, Any]) -> None:
    """Names of a contract's fields.

    Raises:
        ValueError: for an unknown one, with the one that was perhaps meant, or a missing alpha.
    """
    names = [field.name for field in fields(Quality)]
    unknown = [str(name)[:40] for name in value if name not in names][:3]
    meant = {name: difflib.get_close_matches(name.lower(), names, n=1) for name in unknown}
    said = [f"{name!r}" + (f" (did you mean {close[0]}?)" if close else "") for name, close in meant.items()]
    if "alpha" not in value:
        raise ValueError(
            "alpha is missing: quality is 'exact', or holds alpha and perhaps delta and require"
            + (f", not {', '.join(said)}" if said else "")
        )
    if unknown:
        raise ValueError(f"quality holds alpha and perhaps delta and require, not {', '.join(said)}")


def read_quality(value: Any) -> str | Quality | None:
    """``"exact"``, None, a :class:`Quality`, or the same as a mapping with ``alpha`` and perhaps other fields.

    Raises:
        ValueError: for anything else.
    """
    if value is None or isinstance(value, Quality) or value == "exact":
        return value
    if isinstance(value, Mapping):
        check_fields(value)
        return Quality(**value)
    raise ValueError(f"quality must be 'exact', or hold alpha and perhaps delta and require, not {value!r}")
