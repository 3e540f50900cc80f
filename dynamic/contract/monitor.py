"""The live monitor of quality contracts: a coin picks requests, their losses move a bet, which may end a contract.

For every request under a certificate: :meth:`RiskMonitor.admit` before it runs, :meth:`RiskMonitor.finished` with what
was served. In idle time: :meth:`RiskMonitor.next_pending`, a full pass over what was served, and
:meth:`RiskMonitor.record_loss`. The coin neither knows nor changes how a request is served.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .e_process import EProcess
from .monitor_store import Draws, MonitorStore, PendingRun, PickCounts, Served

if TYPE_CHECKING:
    from .certificate import Certificate

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """How the monitor picks and remembers.

    Arguments:
        share: of the requests under a certificate that are run again in full, 0 to 1.
        seed: of the coin. Every opening of the file has a stream of its own, so that a process that dies early again
            and again does not throw the same coins each time.
        keep: picks with a loss, and interrupted ones, are remembered until so many newer ones have come.

    Raises:
        ValueError: for a share outside [0, 1], or a number to keep below 1.
    """

    share: float = 0.02
    seed: int = 0
    keep: int = 10_000

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be between 0 and 1, not {self.share}")
        if self.keep < 1:
            raise ValueError(f"keep must be at least 1, not {self.keep}")


@dataclass(frozen=True, kw_only=True)
class ContractState:
    """What the monitor knows about a certificate.

    Arguments:
        process: the bet: number of losses, realised risk, wealth, whether it has fired.
        picks: those without a loss.
    """

    process: EProcess
    picks: PickCounts


class RiskMonitor:
    """Watches the realised risk of every certificate that is armed. Safe to use from several threads.

    Picks are stored before :meth:`admit` returns, and every step is durable when its method does: methods but
    :meth:`is_reverted` may wait for the disk. When the disk fails they raise ``sqlite3.Error`` and nothing has changed;
    a request that could not be admitted has to run exactly.

    Arguments:
        file: where everything is kept; see :class:`MonitorStore`.
        config: the coin.

    Raises:
        ValueError: naming the file, when it cannot be used.
    """

    def __init__(self, file: Path, config: MonitorConfig | None = None) -> None:
        self.config = config or MonitorConfig()
        self._store = MonitorStore(file, self.config.keep)
        self._coin = random.Random(f"{self.config.seed}/{self._store.opened}")
        self._lock = threading.Lock()
        self._armed: dict[str, EProcess] = {}  # written under the lock; one entry may be read without

    def arm(self, certificate: Certificate) -> bool:
        """Watch a certificate from now on; what is stored about it goes on.

        One that has fired stays reverted: only another certificate, from a new calibration, starts afresh.

        Returns: whether it may be served, that is, has not fired.
        """
        with self._lock:
            process = self._store.arm(certificate.id, certificate.alpha, certificate.delta)
            self._armed[certificate.id] = process
            return not process.fired

    def is_reverted(self, certificate_id: str) -> bool:
        """Whether requests under this certificate have to run exactly. Never waits.

        Raises:
            ValueError: for a certificate that is not armed.
        """
        return self._process(certificate_id).fired

    def admit(self, request_id: str, certificate_id: str) -> bool:
        """Throw the coin for a request that is about to run under a certificate.

        Arguments:
            request_id: no other request ever had it, in this process or another one with the same file.

        Returns: whether it is picked, which is on the disk by then. Never under a certificate that has fired. A request
            that was picked before stays picked.

        Raises:
            ValueError: for a certificate that is not armed.
        """
        with self._lock:
            fired = self._process(certificate_id).fired
            if self._store.pick_state(request_id) is None and (fired or self._coin.random() >= self.config.share):
                return False
            self._store.pick(request_id, certificate_id)
            return True

    def withdraw(self, request_id: str) -> bool:
        """Take a pick back whose request was refused before any of it ran: nothing was served that could have a loss.

        Returns: whether there was such a pick.
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
        """Store what was served, for a full run to come. Also for a request that was aborted or failed.

        Arguments:
            prompt_tokens: token ids.
            served_tokens: token ids of each of its completions; without any token no loss can be had, and the pick
                counts as interrupted.
            draws: of a request that sampled: its loss is a distance between distributions.

        Returns: whether it was picked and had not finished before; otherwise nothing changes.
        """
        with self._lock:
            output = Served(prompt_tokens=prompt_tokens, served_tokens=served_tokens, draws=draws)
            return self._store.finish(request_id, output)

    def next_pending(self) -> PendingRun | None:
        """The oldest pick that waits for its loss, until :meth:`record_loss` has it.

        Only picks of certificates that are armed: others were served by a deployment that does not run now, and would
        be judged by the wrong model.
        """
        with self._lock:
            return self._store.next_pending(self._armed)

    def record_loss(self, request_id: str, loss: float) -> bool:
        """Count the loss of a pending pick, and end the certificate's contract if that is one too many.

        A pick whose full run is impossible counts with the worst loss, 1: picks are never dropped.

        Returns: whether it was counted now: not when it was before, or is not known.

        Raises:
            ValueError: for a loss outside [0, 1], or a pick that has not finished.
        """
        with self._lock:
            counted = self._store.count_loss(request_id, loss)
            if counted is None:
                return False
            certificate_id, process = counted
            if certificate_id in self._armed:
                self._armed[certificate_id] = process
            if process.fired_at == process.count:
                logger.warning(
                    "certificate %s has fired: %d monitored requests have a mean loss of %.4f, against a risk of at"
                    " most %g at delta=%g; its requests run exactly from now on",
                    certificate_id,
                    process.count,
                    process.mean,
                    process.alpha,
                    process.delta,
                )
            return True

    @property
    def armed(self) -> tuple[str, ...]:
        """Ids of the certificates that are armed."""
        return tuple(self._armed)

    def state(self, certificate_id: str) -> ContractState:
        """What is stored about a certificate, armed or not.

        Raises:
            ValueError: for one that never was.
        """
        with self._lock:
            return ContractState(process=self._store.process(certificate_id), picks=self._store.counts(certificate_id))

    def close(self) -> None:
        """Let go of the file. Requests that still run are marked as interrupted when it is opened again."""
        with self._lock:
            self._store.close()

    def _process(self, certificate_id: str) -> EProcess:
        process = self._armed.get(certificate_id)
        if process is None:
            raise ValueError(f"certificate {certificate_id!r} is not armed")
        return process
