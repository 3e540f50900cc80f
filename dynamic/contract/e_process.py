"""An e-process against "the risk is at most alpha": a sequential test that is valid at every request.

The wealth K starts at 1, and part of it is bet on the next loss exceeding alpha; after the loss x_t

    K_t = K_{t-1} (1 + lambda_t (x_t - alpha)),   0 <= lambda_t <= 1 / (2 alpha).

lambda_t depends on earlier losses only. While the mean of every loss, given earlier ones, is at most alpha, K is a
nonnegative supermartingale, so the probability that it ever reaches 1 / delta is at most delta (Ville 1939;
Waudby-Smith & Ramdas 2024, whose "aGRAPA" stakes these are). Losses may have any distribution on [0, 1].
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace

from .bounds import check_levels

# Stakes follow the losses of about so many recent requests, so a long stable period does not mask drift; with a much
# shorter memory they follow noise.
_MEMORY = 100


@dataclass(frozen=True, kw_only=True)
class EProcess:
    """The state of one e-process; :meth:`observe` returns the next one.

    Arguments:
        alpha, delta: the claim under test, and how often a true claim may be rejected.
        count: losses so far.
        total: their sum.
        log_wealth: natural logarithm of K.
        recent_mean, recent_variance: exponential moving averages over the losses; at the start, those of a risk of
            exactly ``alpha``, as one loss.
        fired_at: the number of the loss at which K reached 1 / delta; None before. Never reset.

    Raises:
        ValueError: for a level outside (0, 1).
    """

    alpha: float
    delta: float
    count: int = 0
    total: float = 0.0
    log_wealth: float = 0.0
    recent_mean: float
    recent_variance: float
    fired_at: int | None = None

    def __post_init__(self) -> None:
        check_levels(alpha=self.alpha, delta=self.delta)

    @classmethod
    def start(cls, alpha: float, delta: float) -> EProcess:
        """The state before the first loss."""
        return cls(alpha=alpha, delta=delta, recent_mean=alpha, recent_variance=alpha * (1 - alpha))

    @property
    def fired(self) -> bool:
        """Whether the claim has been rejected."""
        return self.fired_at is not None

    @property
    def mean(self) -> float | None:
        """The realised risk: the mean of all losses so far; None before the first."""
        return self.total / self.count if self.count else None

    @property
    def stake(self) -> float:
        """lambda for the next loss.

        The best stake for a small edge at the recent mean and variance; 0 while the recent risk is below alpha. At most
        1 / (2 alpha), so that a request without loss costs at most half of the wealth; with 1 / alpha a single one
        could reduce it to 0 for good.
        """
        edge = self.recent_mean - self.alpha
        if edge <= 0:
            return 0.0
        return min(edge / (self.recent_variance + edge**2), 0.5 / self.alpha)

    def observe(self, loss: float) -> EProcess:
        """The state after one more request's loss.

        Raises:
            ValueError: for a loss outside [0, 1].
        """
        if not 0 <= loss <= 1:  # NaN fails this too
            raise ValueError(f"a loss must lie between 0 and 1, not {loss}")
        count = self.count + 1
        log_wealth = self.log_wealth + math.log1p(self.stake * (loss - self.alpha))
        weight = 1 / min(count + 1, _MEMORY)
        mean = self.recent_mean + weight * (loss - self.recent_mean)
        spread = (loss - self.recent_mean) * (loss - mean)
        fires = self.fired_at is None and log_wealth >= -math.log(self.delta)
        return replace(
            self,
            count=count,
            total=self.total + loss,
            log_wealth=log_wealth,
            recent_mean=mean,
            recent_variance=self.recent_variance + weight * (spread - self.recent_variance),
            fired_at=count if fires else self.fired_at,
        )

    def to_json(self) -> str:
        """The state as JSON text; numbers round-trip exactly."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> EProcess:
        """The state that :meth:`to_json` wrote.

        Raises:
            ValueError: for anything else.
        """
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{text[:80]!r} is not the state of a bet: {error}") from error
