"""Contracts of a running server: resolves them, monitors them, and reloads certificates.

Everything that may block on the monitor's disk runs on one separate thread, never on the event loop. A failing disk
costs savings, not answers: requests that cannot be monitored run exactly.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import logging
import re
import sqlite3
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch

from ..dynamic.contract.catalog import CertificateSource, ContractCatalog
from ..dynamic.contract.monitor import ContractState, MonitorConfig, RiskMonitor
from ..dynamic.contract.monitor_files import KEEP_DAYS, open_first, remove_stale
from ..dynamic.contract.monitor_records import Draws
from ..dynamic.convert.model_store import cache_home
from ..dynamic.engine.fault_log import FaultLog
from ..dynamic.engine.outputs import RequestDelta
from ..dynamic.engine.quality import ContractOutcome, Quality, required
from ..dynamic.engine.sampling_params import SamplingParams

logger = logging.getLogger("dynamoe.contracts")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class MonitorSettings(MonitorConfig):
    """The live monitor of contracts.

    Arguments:
        file: SQLite file of sampled requests and e-processes, used by one server at a time; null takes one in the
            cache for this model, of several servers at once the first that is free. It holds prompts and outputs of
            sampled requests until their losses are counted.
        share: share of the requests under a certificate that are run again in full, 0 to 1. 0 samples none;
            certificates that have fired stay reverted.
        seed: of the sampling decisions.
        tenant_share: of the losses that can revert a certificate for everybody, the most that one tenant's may be. A
            tenant is an API key, without keys an address. With fewer than 1 / tenant_share tenants each is watched by
            its own losses alone.
    """

    file: str | None = None


def default_monitor_file(model: Path) -> Path:
    """The monitor's file of the servers of a model, in the user's cache; see :func:`.monitor_files.open_first`."""
    key = hashlib.sha256(str(model.resolve()).encode()).hexdigest()[:12]
    name = re.sub(r"[^\w.]+", "-", model.name).strip("-")[-80:]
    return cache_home() / "monitor" / f"{name}-{key}.db"


def tenant(key_id: str | None, host: str | None) -> str:
    """Whose a request is: its key's, without keys its address's (of IPv6 the network, of which one client has all).

    Arguments:
        key_id: see :class:`.auth.Caller`; host: the peer's address, None on a UNIX socket.
    """
    if key_id is not None:
        return f"key {key_id}"
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return "local"
    network = ipaddress.ip_network((address, 64 if address.version == 6 else 32), strict=False)
    return f"address {network.network_address}"


@dataclass(slots=True)
class _Served:
    """Output so far of a request that is sampled for the monitor, as far as it is certified."""

    prompt_tokens: Sequence[int]
    temperature: float  # 0 if it is greedy
    certified_tokens: int
    completions: list[list[int]] = field(default_factory=list)
    states: list[list[torch.Tensor]] = field(default_factory=list)  # of each completion's tokens, if it samples

    def add(self, delta: RequestDelta) -> None:
        for completion in delta.completions:
            while len(self.completions) <= completion.index:
                self.completions.append([])
                self.states.append([])
            room = self.certified_tokens - len(self.completions[completion.index])
            self.completions[completion.index] += completion.token_ids[:room]
            self.states[completion.index] += completion.states[:room]

    def draws(self) -> Draws | None:
        states = [state for completion in self.states for state in completion]
        if not self.temperature or not states:
            return None
        return Draws(temperature=self.temperature, states=torch.stack(states).numpy().tobytes())


@dataclass(slots=True)
class _DiskLog:
    """Logs the first of several disk failures in a row, and the recovery."""

    failing: bool = False

    def failed(self, error: sqlite3.Error) -> None:
        if not self.failing:
            logger.error("the monitor's disk fails: %s; sampled requests run exactly until it works again", error)
        self.failing = True

    def worked(self) -> None:
        if self.failing:
            logger.info("the monitor's disk works again")
        self.failing = False


@dataclass(kw_only=True)
class ContractManager:
    """Resolves contracts and monitors them.

    Arguments:
        source: of the certificates.
        settings: of the monitor.
        default_file: of the monitor, if the settings name none.
        on_pending: called from another thread when a sampled request waits for its full run.
        between_steps: calls a function where nothing else steps the engine.
    """

    source: CertificateSource
    settings: MonitorSettings
    default_file: Path
    on_pending: Callable[[], None] = lambda: None
    between_steps: Callable[[Callable[[], object]], Awaitable[object]] = asyncio.to_thread
    catalog: ContractCatalog = field(default_factory=ContractCatalog, init=False)  # replaced as a whole
    monitor: RiskMonitor | None = field(default=None, init=False)  # from the first certificate on
    states: dict[str, ContractState] = field(default_factory=dict, init=False)  # as of the last refresh
    _served: dict[str, _Served] = field(default_factory=dict, init=False)
    _unsaved: deque[tuple[str, _Served]] = field(default_factory=deque, init=False)
    _disk: _DiskLog = field(default_factory=_DiskLog, init=False)
    _faults: FaultLog = field(default_factory=lambda: FaultLog(logger), init=False)
    _reloading: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    _thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="monitor"), init=False
    )

    def open(self) -> None:
        """Read and register the certificates before the server starts.

        Raises:
            ValueError: for certificates or a monitor's file that cannot be used.
        """
        self.catalog = self._register(self.source.read())

    async def reload(self) -> None:
        """Read the certificates again and replace the catalog. Requests in flight keep their settings.

        Raises:
            ValueError: as :meth:`open`; the catalog is unchanged.
        """
        async with self._reloading:
            await asyncio.to_thread(self.source.prepare)
            await self.between_steps(self.source.know_running)
            catalog = await asyncio.to_thread(self.source.read)
            self.catalog = await self._off_loop(self._register, catalog)
        logger.info(
            "certificates read again: %d valid, %d refused", len(catalog.contracts.certificates), len(catalog.refused)
        )

    async def resolve(
        self, request_id: str, prompt_tokens: Sequence[int], params: SamplingParams, tenant: str = ""
    ) -> tuple[SamplingParams, ContractOutcome | None]:
        """A request's settings and the outcome of its contract; the monitor's sampling decision is persisted first.

        Arguments:
            request_id: unique across servers.
            params: with ``max_tokens`` set.
            tenant: whose it is, see :func:`tenant`.

        Raises:
            ContractUnavailable: where it requires a contract that cannot be kept.
        """
        if not isinstance(params.quality, Quality):
            return params, None
        assert params.max_tokens is not None
        spends, outcome = self.catalog.resolve(params.quality, params, params.max_tokens)
        required(outcome)
        if outcome.certificate is None or self.monitor is None or outcome.certificate not in self.monitor.registered:
            return spends, outcome
        assert outcome.certified_tokens is not None
        served = _Served(prompt_tokens, 0.0 if params.greedy else params.temperature, outcome.certified_tokens)
        reason = await self._off_loop(self._admit, request_id, outcome.certificate, served, tenant)
        if reason is None:
            return replace(spends, keep_states=not params.greedy and request_id in self._served), outcome
        exact = required(ContractOutcome(quality=outcome.quality, certificate=None, reason=reason))
        return replace(params, quality="exact"), exact

    def on_delta(self, delta: RequestDelta) -> None:
        """Record a request's output."""
        served = self._served.get(delta.request_id)
        if served is None:
            return
        served.add(delta)
        if delta.finished:
            self.ended([delta.request_id])

    def ended(self, request_ids: Iterable[str]) -> None:
        """Record that requests have ended, finished or not."""
        for request_id in request_ids:
            if served := self._served.pop(request_id, None):
                self._unsaved.append((request_id, served))
                self._thread.submit(self._save)

    def refused(self, request_ids: Iterable[str]) -> None:
        """Withdraw requests that were resolved but never ran; those that have ended otherwise are skipped."""
        ids = list(request_ids)
        if self.monitor is not None:
            self._thread.submit(self._withdraw, ids)

    async def refresh(self) -> bool:
        """Update :attr:`states`; returns whether the monitor could be read."""
        return await self._off_loop(self._refresh)

    async def close(self) -> None:
        """Store outstanding outputs and close the file."""
        await asyncio.to_thread(self._thread.shutdown)
        if self.monitor is not None:
            self.monitor.close()

    async def _off_loop(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    # From here on: on the monitor's thread, or before it starts.

    def _register(self, catalog: ContractCatalog) -> ContractCatalog:
        certificates = [certificate for certificate in catalog.contracts.certificates if not certificate.reference]
        for other in catalog.contracts.certificates:
            if other.reference:  # a full run of this model would not measure what was promised
                text = "certificate %s: this whole deployment keeps alpha=%g against %s, which nothing runs to watch it"
                logger.info(text, other.id, other.alpha, other.original)
        if certificates and self.monitor is None:
            self.monitor = self._open_monitor()
        if self.monitor is not None:
            try:
                for certificate in certificates:
                    if not self.monitor.register(certificate):
                        logger.warning("certificate %s has fired before: its requests run exactly", certificate.id)
                    elif tenants := self.monitor.state(certificate.id).bets.reverted:
                        text = "certificate %s has fired before for %d tenants: their requests run exactly"
                        logger.warning(text, certificate.id, tenants)
            except sqlite3.Error as error:
                raise ValueError(f"the monitor cannot store new certificates: {error}") from error
        return catalog

    def _open_monitor(self) -> RiskMonitor | None:
        named = self.settings.file
        file = self.default_file if named is None else Path(named).expanduser()
        if self.settings.share == 0 and not file.exists():
            return None
        try:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{file.parent} cannot be made: {error}") from error
        if named is None:
            monitor = open_first(file, lambda free: RiskMonitor(free, self.settings))
            for stale in remove_stale(file.parent):
                logger.info("removed %s: nobody has used it for %d days", stale, KEEP_DAYS)
        else:
            monitor = RiskMonitor(file, self.settings)
        logger.info(
            "%g of the requests under a certificate are run again in full; %s", self.settings.share, monitor.file
        )
        return monitor

    def _admit(self, request_id: str, certificate_id: str, served: _Served, tenant: str) -> str | None:
        """Why a request must run exactly; None if it may run under its certificate."""
        assert self.monitor is not None
        try:
            if (bet := self.monitor.fired_bet(certificate_id, tenant)) is not None:
                return (
                    f"certificate {certificate_id} is reverted: {bet.count} monitored requests have a mean loss of"
                    f" {bet.mean:.4f}, against a risk of at most {bet.alpha:g} at delta={bet.delta:g}; a new"
                    " certificate is needed"
                )
            if self.monitor.admit(request_id, certificate_id, tenant):
                self._served[request_id] = served
        except sqlite3.Error as error:
            self._disk.failed(error)
            return f"certificate {certificate_id} cannot be monitored at present: the monitor's disk fails ({error})"
        self._save()
        return None

    def _withdraw(self, request_ids: list[str]) -> None:
        assert self.monitor is not None
        for request_id in request_ids:
            if self._served.pop(request_id, None) is not None:
                try:
                    self.monitor.withdraw(request_id)
                except sqlite3.Error as error:  # it counts as interrupted when the file is opened again
                    self._disk.failed(error)

    def _save(self) -> None:
        """Store the outputs of sampled requests; after a disk failure they are stored with the next one."""
        if self.monitor is None or not self._unsaved:
            return
        try:
            while self._unsaved:
                request_id, served = self._unsaved[0]
                try:
                    self.monitor.finished(request_id, served.prompt_tokens, served.completions, served.draws())
                except sqlite3.Error:
                    raise
                except Exception as error:  # it counts as interrupted when the file is opened again
                    self._faults.report("storing a sampled request", error)
                self._unsaved.popleft()
        except sqlite3.Error as error:
            self._disk.failed(error)
            return
        self._disk.worked()
        self.on_pending()

    def _refresh(self) -> bool:
        if self.monitor is None:
            return True
        try:
            self.states = {certificate: self.monitor.state(certificate) for certificate in self.monitor.registered}
        except sqlite3.Error as error:
            self._disk.failed(error)
            return False
        return True
