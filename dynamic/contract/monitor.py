"""The live monitor of quality contracts: a random sample of requests gets losses, which update the e-processes of their
certificate: the tenant's own and a pooled one. Where a tenant's own fires, the certificate is reverted for that tenant;
where the pooled one fires, for everybody.

For every request under a certificate: :meth:`RiskMonitor.admit` before it runs, :meth:`RiskMonitor.finished` with its
output. In idle time: :meth:`RiskMonitor.next_pending`, a full pass over that output, and
:meth:`RiskMonitor.record_loss`. The sampling decision is independent of how a request is served.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...kernels.api.ranges import check_ranges
from .e_process import EProcess
from .monitor_records import BetTotals, Draws, PendingRun, PickCounts, Served
from .monitor_store import OTHERS, MonitorStore

if TYPE_CHECKING:
    from .certificate import Certificate

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """How the monitor samples requests and how long it keeps them.

    Arguments:
        share: share of the requests under a certificate that are run again in full, 0 to 1.
        seed: of the sampling decisions. Every opening of the file uses a separate random stream, so that a process
            that crashes repeatedly does not repeat the same decisions.
        keep: sampled requests with a loss, and interrupted ones, are kept until so many newer ones exist.
        tenant_share: of the losses that can revert a certificate for everybody, the most that one tenant's may be.
            With fewer than 1 / tenant_share tenants each is watched by its own losses alone.

    Raises:
        ValueError: for a share outside [0, 1], a tenant's share that is not above 0, or a number to keep below 1.
    """

    share: float = 0.02
    seed: int = 0
    keep: int = 10_000
    tenant_share: float = 0.1

    def __post_init__(self) -> None:
        check_ranges(self, "share", least=0, most=1)
        check_ranges(self, "tenant_share", above=0, most=1)
        check_ranges(self, "keep", least=1)


@dataclass(frozen=True, kw_only=True)
class ContractState:
    """The monitor's state of a certificate.

    Arguments:
        process: the pooled e-process: number of losses in it, wealth, whether it has fired.
        picks: counts of sampled requests without a loss.
        bets: of all tenants together: losses, realised risk.
    """

    process: EProcess
    picks: PickCounts
    bets: BetTotals


class RiskMonitor:
    """Monitors the realised risk of every registered certificate. Thread-safe.

    Every change is durable when its method returns, which may wait for the disk. If the disk fails, methods raise
    ``sqlite3.Error`` and change nothing; a request that could not be admitted must run exactly.

    Arguments:
        file: database; see :class:`MonitorStore`.
        config: share and seed of the sample.

    Raises:
        ValueError: naming the file, when it cannot be used.
    """

    def __init__(self, file: Path, config: MonitorConfig | None = None) -> None:
        self.config = config or MonitorConfig()
        self.file = file
        self._store = MonitorStore(file, self.config.keep, self.config.tenant_share)
        self._random = random.Random(f"{self.config.seed}/{self._store.opened}")
        self._lock = threading.Lock()
        # Written under the lock; single entries may be read without it.
        self._registered: dict[str, EProcess] = {}  # the pooled ones
        self._reverted_for: dict[str, set[str]] = {}  # tenants

    def register(self, certificate: Certificate) -> bool:
        """Monitor a certificate from now on, continuing from its stored state.

        One that has fired stays reverted: only a new certificate, from a new calibration, starts afresh.

        Returns: whether it may be served, that is, the pooled e-process has not fired.
        """
        with self._lock:
            process = self._store.register(certificate.id, certificate.alpha, certificate.delta)
            self._reverted_for[certificate.id] = self._store.reverted_for(certificate.id)
            self._registered[certificate.id] = process
            return not process.fired

    def is_reverted(self, certificate_id: str, tenant: str = "") -> bool:
        """Whether a tenant's requests under this certificate must run exactly.

        Raises:
            ValueError: for a certificate that is not registered.
        """
        return self.fired_bet(certificate_id, tenant) is not None

    def admit(self, request_id: str, certificate_id: str, tenant: str = "") -> bool:
        """Decide whether to sample a request that is about to run under a certificate.

        Arguments:
            request_id: never used before, in this process or another one with the same file.
            tenant: whose it is.

        Returns: whether it is sampled; the decision is persisted first. Never under a certificate that has fired. A
            request that was sampled before stays sampled.

        Raises:
            ValueError: for a certificate that is not registered.
        """
        fired = self.is_reverted(certificate_id, tenant)
        with self._lock:
            if self._store.pick_state(request_id) is None and (fired or self._random.random() >= self.config.share):
                return False
            self._store.pick(request_id, certificate_id, tenant)
            return True

    def withdraw(self, request_id: str) -> bool:
        """Remove a sampled request that was refused before it ran, so that it has no output to judge.

        Returns: whether there was one.
        """
        with self._lock:
            return self._store.withdraw(request_id)

    def finished(
        self,
        request_id: str,
        prompt_tokens: Sequence[int],
        served_tokens: Sequence[Sequence[int]],
        draws: Draws | None = None,
    ) -> bool:
        """Store the output of a request for its full run. Also for a request that was aborted or failed.

        Arguments:
            prompt_tokens: token ids.
            served_tokens: token ids of each of its completions; without any token there is no loss, and the request
                counts as interrupted.
            draws: of a request with temperature > 0, whose loss is a distance between distributions.

        Returns: whether it was sampled and had not finished before; otherwise nothing changes.
        """
        output = Served(prompt_tokens=prompt_tokens, served_tokens=served_tokens, draws=draws)
        with self._lock:
            return self._store.finish(request_id, output)

    def next_pending(self) -> PendingRun | None:
        """The oldest sampled request without a loss; the same one until :meth:`record_loss`.

        Only of registered certificates: other deployments served the rest, and this model would misjudge it.
        """
        with self._lock:
            return self._store.next_pending(self._registered)

    def record_loss(self, request_id: str, loss: float) -> bool:
        """Count the loss of a pending request; the certificate is reverted if an e-process fires.

        A request whose full run is impossible counts with the worst loss, 1: sampled requests are never dropped.

        Returns: whether it was counted now: False if it was counted before, or is unknown.

        Raises:
            ValueError: for a loss outside [0, 1], or a request that has not finished.
        """
        with self._lock:
            counted = self._store.count_loss(request_id, loss)
            if counted is None:
                return False
            known = counted.certificate_id in self._registered
            before = self._registered.get(counted.certificate_id)
            if known:
                self._registered[counted.certificate_id] = counted.pooled
            own_fires = counted.own.fired_at == counted.own.count
            if own_fires and known:
                self._reverted_for[counted.certificate_id].add(counted.tenant)
            if counted.pooled.fired and not (before and before.fired):
                self._warn(counted.certificate_id, counted.pooled, "")
            elif own_fires:
                self._warn(counted.certificate_id, counted.own, f" for {counted.tenant or 'a tenant'}")
            return True

    @staticmethod
    def _warn(certificate_id: str, process: EProcess, whom: str) -> None:
        logger.warning(
            "certificate %s has fired%s: %d monitored requests have a mean loss of %.4f, against a risk of at most %g"
            " at delta=%g; these requests run exactly from now on",
            certificate_id,
            whom,
            process.count,
            process.mean,
            process.alpha,
            process.delta,
        )

    @property
    def registered(self) -> tuple[str, ...]:
        """Ids of the registered certificates."""
        return tuple(self._registered)

    def state(self, certificate_id: str) -> ContractState:
        """The stored state of a certificate, registered now or earlier.

        Raises:
            ValueError: for one that never was registered.
        """
        with self._lock:
            return ContractState(
                process=self._store.process(certificate_id),
                picks=self._store.counts(certificate_id),
                bets=self._store.totals(certificate_id),
            )

    def fired_bet(self, certificate_id: str, tenant: str = "") -> EProcess | None:
        """The e-process for which a tenant's requests run exactly, if one has fired: everybody's or its own.

        Raises:
            ValueError: for a certificate that is not registered.
        """
        pooled = self._process(certificate_id)
        if pooled.fired or self._reverted_for[certificate_id].isdisjoint((tenant, OTHERS)):
            return pooled if pooled.fired else None
        with self._lock:
            own = self._store.bet(certificate_id, self._store.bettor(certificate_id, tenant))
            return own if own is not None and own.fired else None

    def close(self) -> None:
        """Close the file. Requests that still run are marked as interrupted when it is opened again."""
        with self._lock:
            self._store.close()

    def _process(self, certificate_id: str) -> EProcess:
        process = self._registered.get(certificate_id)
        if process is None:
            raise ValueError(f"certificate {certificate_id!r} is not registered")
        return process
