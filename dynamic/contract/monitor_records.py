"""What the monitor's file takes and gives: outputs of sampled requests, counts of picks, states of bets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .e_process import EProcess


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What the tokens of a request with temperature > 0 were drawn from.

    Arguments:
        temperature: above 0.
        states: LM head inputs of each token, completions concatenated, float32.
    """

    temperature: float
    states: bytes


@dataclass(frozen=True, kw_only=True)
class Served:
    """Prompt and output of a request.

    Arguments:
        prompt_tokens: token ids.
        served_tokens: token ids of each of its completions.
        draws: None for a greedy request.
    """

    prompt_tokens: Sequence[int]
    served_tokens: Sequence[Sequence[int]]
    draws: Draws | None = None


@dataclass(frozen=True, kw_only=True)
class PendingRun(Served):
    """A finished request that waits for its loss."""

    request_id: str
    certificate_id: str


@dataclass(frozen=True, kw_only=True)
class PickCounts:
    """Numbers of a certificate's picks that have no loss yet, or never will (``interrupted``)."""

    running: int
    pending: int
    interrupted: int


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What a loss has changed: the tenant's own e-process and the pooled one."""

    certificate_id: str
    tenant: str
    own: EProcess
    pooled: EProcess


@dataclass(frozen=True, kw_only=True)
class BetTotals:
    """A certificate's bets together.

    Arguments:
        losses: of all tenants; total: their sum.
        log_wealth: the largest of any bet, the pooled one included.
        tenants: with a bet of their own; reverted: those of them whose bet has fired.
        fired_at: the smallest number of losses after which a tenant's bet fired.
    """

    losses: int
    total: float
    log_wealth: float
    tenants: int
    reverted: int
    fired_at: int | None

    @property
    def mean(self) -> float | None:
        """The realised risk; None before the first loss."""
        return self.total / self.losses if self.losses else None
