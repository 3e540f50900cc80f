"""The certificates of a command."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """Certified contracts.

    Arguments:
        certificates: directory that ``dynamoe calibrate`` filled; null takes the certificates beside the model, if any.
    """

    certificates: str | None = None
