"""The monitor's durable state in one SQLite file: sampled requests ("picks") and each certificate's e-processes.

A certificate has an e-process of its own for each tenant, over all of that tenant's losses, and a pooled one, in which
no tenant has more than a share of the losses: one tenant's requests can revoke the certificate for that tenant alone.

A pick is *running* from before its request runs, *pending* once its output is stored, and *counted* when its loss has
updated the e-process, in the same transaction. One that ends without an output, for example because its process ended,
is *interrupted*: it gets no loss, and the number of such picks is reported. Every step is one idempotent transaction.

Commits wait for the disk (``synchronous=FULL``), three times per pick. Otherwise a power cut could lose a pick whose
answer the client already has, and the sample would be biased unnoticed.

Prompts and outputs are in the file from the end of a request until its loss is counted. Once that step has returned
their bytes are in no file: what is deleted is overwritten, the journal is cut to nothing by every commit (a write-ahead
log would keep old pages), and nothing is sorted on disk.
"""

from __future__ import annotations

import base64
import json
import os
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .e_process import EProcess
from .monitor_records import BetTotals, Counted, Draws, PendingRun, PickCounts, Served

_FORMAT = 2
_BETS = (
    "CREATE TABLE bets (certificate TEXT NOT NULL, tenant TEXT NOT NULL, process TEXT NOT NULL,"
    " pooled INTEGER NOT NULL, losses INTEGER NOT NULL, total REAL NOT NULL, log_wealth REAL NOT NULL, fired INTEGER,"
    " PRIMARY KEY (certificate, tenant))"
)
_TABLES = (
    "CREATE TABLE openings (count INTEGER NOT NULL)",
    "INSERT INTO openings VALUES (0)",
    "CREATE TABLE certificates (id TEXT PRIMARY KEY, process TEXT NOT NULL, interrupted INTEGER NOT NULL)",
    "CREATE TABLE picks (number INTEGER PRIMARY KEY, request TEXT NOT NULL UNIQUE, certificate TEXT NOT NULL,"
    " state TEXT NOT NULL, prompt TEXT, served TEXT, tenant TEXT NOT NULL DEFAULT '')",
    "CREATE INDEX picks_by_state ON picks (state, number)",
    _BETS,
    f"PRAGMA user_version = {_FORMAT}",
)
_FROM_FORMAT_1 = (
    "ALTER TABLE picks ADD COLUMN tenant TEXT NOT NULL DEFAULT ''",
    _BETS,
    f"PRAGMA user_version = {_FORMAT}",
)
MOST_TENANTS = 10_000  # with a bet of their own, per certificate
OTHERS = "others"  # all later ones together
RUNNING, PENDING, COUNTED, INTERRUPTED = "running", "pending", "counted", "interrupted"


class MonitorInUse(ValueError):
    """Another process has the file."""


class MonitorStore:
    """The file of one monitor. Not thread-safe. Readable by its owner only: prompts and outputs of picks are in it.

    The file belongs to one process at a time. Opening it marks as interrupted what the process before left running.

    Arguments:
        file: created if it does not exist.
        keep: counted and interrupted picks are deleted when so many newer picks exist, at least 1. Until then repeating
            one of their steps changes nothing.
        tenant_share: of the losses in a pooled e-process, the most that one tenant's may be; 1 pools all. Those of a
            tenant whose own e-process has fired are pooled no longer.

    Raises:
        MonitorInUse: another process has it.
        ValueError: naming the file, when it is damaged, of another program or another format.
    """

    def __init__(self, file: Path, keep: int = 10_000, tenant_share: float = 1.0) -> None:
        self._keep = keep
        self._tenant_share = tenant_share
        try:
            _create(file)
            self._connection = sqlite3.connect(file, timeout=1, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise ValueError(f"{file} cannot be opened: {error}") from error
        try:
            self.opened = self._open(file)
        except sqlite3.Error as error:
            self._connection.close()
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
                raise MonitorInUse(f"{file} is in use") from error
            raise ValueError(f"{file} cannot be used: {error}") from error
        except ValueError:
            self._connection.close()
            raise

    def _open(self, file: Path) -> int:
        """Lock the file until the process ends; returns how often it has been opened."""
        self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        (found,) = self._connection.execute("PRAGMA user_version").fetchone()
        new = self._connection.execute("SELECT 1 FROM sqlite_master").fetchone() is None
        if not new and found == 0:
            raise ValueError(f"{file} is the database of another program")
        if not new and found not in (1, _FORMAT):
            raise ValueError(f"{file} has format {found}; this version reads {_FORMAT}")
        for (found_fault,) in self._connection.execute("PRAGMA quick_check(1)").fetchall():
            if found_fault != "ok":
                raise ValueError(f"{file} is damaged: {found_fault}")
        if not new:
            self._check_content(file, found)
        self._forget_deleted()
        self._connection.execute("PRAGMA synchronous = FULL")
        with self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            for statement in _TABLES if new else _FROM_FORMAT_1 if found == 1 else ():
                connection.execute(statement)
            for (request_id,) in connection.execute("SELECT request FROM picks WHERE state = ?", (RUNNING,)).fetchall():
                self._interrupt(request_id)
            (opened,) = connection.execute("UPDATE openings SET count = count + 1 RETURNING count").fetchone()
        return opened

    def _check_content(self, file: Path, version: int) -> None:
        """Refuse bets and outputs that cannot be read: otherwise they would stop the bets of a server that runs."""
        read = self._connection.execute
        try:
            for table in ("certificates", "bets")[:version]:
                for (text,) in read(f"SELECT process FROM {table}"):
                    EProcess.from_json(text)
            for prompt, served in read("SELECT prompt, served FROM picks WHERE state = ?", (PENDING,)):
                _read_output(prompt, served)
            if read("SELECT count(*) FROM openings").fetchone() != (1,):
                raise ValueError("it does not say how often it was opened")
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file} is damaged: {error}") from error

    def _forget_deleted(self) -> None:
        """From now on leave no copy of what is deleted. A file of a version that did is written anew, without it."""
        self._connection.execute("PRAGMA secure_delete = ON")
        self._connection.execute("PRAGMA temp_store = MEMORY")
        (before,) = self._connection.execute("PRAGMA journal_mode").fetchone()
        self._connection.execute("PRAGMA journal_mode = TRUNCATE")
        if before == "wal":
            self._connection.execute("VACUUM")

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def register(self, certificate_id: str, alpha: float, delta: float) -> EProcess:
        """The stored e-process of a certificate, or a new one, which is stored."""
        with self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(
                "INSERT OR IGNORE INTO certificates VALUES (?, ?, 0)",
                (certificate_id, EProcess.start(alpha, delta).to_json()),
            )
            return self.process(certificate_id)

    def process(self, certificate_id: str) -> EProcess:
        """The e-process of a certificate.

        Raises:
            ValueError: for an id that was never registered.
        """
        found = self._connection.execute("SELECT process FROM certificates WHERE id = ?", (certificate_id,)).fetchone()
        if found is None:
            raise ValueError(f"certificate {certificate_id!r} is not monitored")
        return EProcess.from_json(found[0])

    def bettor(self, certificate_id: str, tenant: str) -> str:
        """Under whose name a tenant's losses are kept: its own, or :data:`OTHERS` once there are too many."""
        known = "SELECT count(*), coalesce(max(tenant = ?), 0) FROM bets WHERE certificate = ?"
        tenants, mine = self._connection.execute(known, (tenant, certificate_id)).fetchone()
        return tenant if mine or tenants < MOST_TENANTS else OTHERS

    def bet(self, certificate_id: str, tenant: str) -> EProcess | None:
        """A tenant's own e-process; None before its first loss."""
        found = self._connection.execute(
            "SELECT process FROM bets WHERE certificate = ? AND tenant = ?", (certificate_id, tenant)
        ).fetchone()
        return found and EProcess.from_json(found[0])

    def reverted_for(self, certificate_id: str) -> set[str]:
        """Tenants whose own e-process has fired."""
        found = self._connection.execute(
            "SELECT tenant FROM bets WHERE certificate = ? AND fired IS NOT NULL", (certificate_id,)
        )
        return {tenant for (tenant,) in found.fetchall()}

    def totals(self, certificate_id: str) -> BetTotals:
        """All bets of a certificate together."""
        losses, total, log_wealth, tenants, reverted, fired_at = self._connection.execute(
            "SELECT coalesce(sum(losses), 0), coalesce(sum(total), 0.0), coalesce(max(log_wealth), 0.0), count(*),"
            " count(fired), min(fired) FROM bets WHERE certificate = ?",
            (certificate_id,),
        ).fetchone()
        largest = max(log_wealth, self.process(certificate_id).log_wealth) if tenants else 0.0
        return BetTotals(
            losses=losses, total=total, log_wealth=largest, tenants=tenants, reverted=reverted, fired_at=fired_at
        )

    def counts(self, certificate_id: str) -> PickCounts:
        """Picks of a certificate without a loss."""
        states = dict(
            self._connection.execute(
                "SELECT state, count(*) FROM picks WHERE certificate = ? GROUP BY state", (certificate_id,)
            ).fetchall()
        )
        found = self._connection.execute("SELECT interrupted FROM certificates WHERE id = ?", (certificate_id,))
        (interrupted,) = found.fetchone() or (0,)
        return PickCounts(running=states.get(RUNNING, 0), pending=states.get(PENDING, 0), interrupted=interrupted)

    def pick_state(self, request_id: str) -> str | None:
        """State of a pick; None for a request that was not sampled, or whose pick was deleted."""
        found = self._connection.execute("SELECT state FROM picks WHERE request = ?", (request_id,)).fetchone()
        return found and found[0]

    def pick(self, request_id: str, certificate_id: str, tenant: str = "") -> None:
        """Store that a request is sampled, before it runs. An interrupted one runs again; others are unchanged."""
        with self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            state = self.pick_state(request_id)
            if state is None:
                connection.execute(
                    "INSERT INTO picks (request, certificate, state, tenant) VALUES (?, ?, ?, ?)",
                    (request_id, certificate_id, RUNNING, tenant),
                )
            elif state == INTERRUPTED:
                self._count_interrupted(request_id, -1)
                self._move(request_id, RUNNING)

    def withdraw(self, request_id: str) -> bool:
        """Delete a running pick; returns whether there was one."""
        with self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            deleted = connection.execute("DELETE FROM picks WHERE request = ? AND state = ?", (request_id, RUNNING))
            return deleted.rowcount > 0

    def finish(self, request_id: str, output: Served) -> bool:
        """Store the output of a running pick; without any token it is interrupted.

        Returns: whether anything changed: not for a request that was not sampled or has finished before.
        """
        with self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            if self.pick_state(request_id) != RUNNING:
                return False
            if any(len(tokens) for tokens in output.served_tokens):
                tokens = [[int(token) for token in completion] for completion in output.served_tokens]
                served: Any = tokens
                if (draws := output.draws) is not None:
                    states = base64.b64encode(draws.states).decode()
                    served = {"tokens": tokens, "temperature": draws.temperature, "states": states}
                self._move(request_id, PENDING, [int(token) for token in output.prompt_tokens], served)
            else:
                self._interrupt(request_id)
            return True

    def next_pending(self, certificate_ids: Iterable[str]) -> PendingRun | None:
        """The oldest pending pick of these certificates; the same one until its loss is counted."""
        ids = tuple(certificate_ids)
        found = self._connection.execute(
            "SELECT request, certificate, prompt, served FROM picks"
            f" WHERE state = ? AND certificate IN ({', '.join('?' * len(ids))}) ORDER BY number LIMIT 1",
            (PENDING, *ids),
        ).fetchone()
        if found is None:
            return None
        output = _read_output(found[2], found[3])
        return PendingRun(request_id=found[0], certificate_id=found[1], **vars(output))

    def count_loss(self, request_id: str, loss: float) -> Counted | None:
        """Count the loss of a pending pick, once.

        Returns: the new e-processes; None when the pick was counted before, or is unknown.

        Raises:
            ValueError: for a loss outside [0, 1], or a pick without output.
        """
        with self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            pick = "SELECT certificate, state, tenant FROM picks WHERE request = ?"
            found = connection.execute(pick, (request_id,)).fetchone()
            if found is None or found[1] == COUNTED:
                return None
            certificate_id, state, tenant = found
            if state != PENDING:
                raise ValueError(f"request {request_id!r} is {state}: it has no output and can have no loss")
            counted = self._bet(certificate_id, tenant, loss)
            self._move(request_id, COUNTED)
            self._delete_old()
            return counted

    # From here on: inside a transaction.

    def _bet(self, certificate_id: str, tenant: str, loss: float) -> Counted:
        """Let the tenant's own e-process see a loss, and the pooled one if it is not too much of one tenant's.

        Whether the pooled one sees it depends on earlier losses and on whose it is, never on the loss.
        """
        pooled, tenant = self.process(certificate_id), self.bettor(certificate_id, tenant)
        where = "WHERE certificate = ? AND tenant = ?"
        found = self._connection.execute(
            f"SELECT process, pooled FROM bets {where}", (certificate_id, tenant)
        ).fetchone()
        own = EProcess.start(pooled.alpha, pooled.delta) if found is None else EProcess.from_json(found[0])
        in_pool = 0 if found is None else found[1]
        room = max(1.0, self._tenant_share * (pooled.count + 1))
        if self._tenant_share == 1 or (not own.fired and in_pool + 1 <= room):
            pooled, in_pool = pooled.observe(loss), in_pool + 1
            self._connection.execute(
                "UPDATE certificates SET process = ? WHERE id = ?", (pooled.to_json(), certificate_id)
            )
        own = own.observe(loss)
        self._connection.execute(
            "INSERT OR REPLACE INTO bets VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (certificate_id, tenant, own.to_json(), in_pool, own.count, own.total, own.log_wealth, own.fired_at),
        )
        return Counted(certificate_id=certificate_id, tenant=tenant, own=own, pooled=pooled)

    def _move(self, request_id: str, state: str, prompt: list[int] | None = None, served: Any = None) -> None:
        tokens = [None if value is None else json.dumps(value, separators=(",", ":")) for value in (prompt, served)]
        self._connection.execute(
            "UPDATE picks SET state = ?, prompt = ?, served = ? WHERE request = ?", (state, *tokens, request_id)
        )

    def _interrupt(self, request_id: str) -> None:
        self._move(request_id, INTERRUPTED)
        self._count_interrupted(request_id, 1)
        self._delete_old()

    def _count_interrupted(self, request_id: str, more: int) -> None:
        """Change the count, which outlives the deleted picks."""
        self._connection.execute(
            "UPDATE certificates SET interrupted = interrupted + ?"
            " WHERE id = (SELECT certificate FROM picks WHERE request = ?)",
            (more, request_id),
        )

    def _delete_old(self) -> None:
        self._connection.execute(
            "DELETE FROM picks WHERE state IN (?, ?) AND number <= (SELECT max(number) FROM picks) - ?",
            (COUNTED, INTERRUPTED, self._keep),
        )


def _read_output(prompt: str, served: str) -> Served:
    """What :meth:`MonitorStore.finish` has stored."""
    tokens, draws = json.loads(served), None
    if isinstance(tokens, dict):
        draws = Draws(temperature=tokens["temperature"], states=base64.b64decode(tokens["states"], validate=True))
        tokens = tokens["tokens"]
    output = Served(prompt_tokens=json.loads(prompt), served_tokens=tokens, draws=draws)
    ids = [token for part in (output.prompt_tokens, *output.served_tokens) for token in part]
    if not any(map(len, tokens)) or not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise ValueError("an output holds no tokens, or something else")
    if draws is not None:
        if type(draws.temperature) not in (int, float) or not 0 < draws.temperature <= 100:
            raise ValueError(f"the temperature of an output is {draws.temperature!r}")
        if not draws.states or len(draws.states) % (4 * sum(map(len, tokens))):
            raise ValueError(f"an output of {sum(map(len, tokens))} tokens has {len(draws.states)} bytes of states")
    return output


def _create(file: Path) -> None:
    """Create the file if it does not exist. SQLite gives its journal the same mode.

    An existing one is not opened: closing it here would release the locks that this process may hold on it (POSIX).
    """
    try:
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        # SQLite would take it for a new one, and certificates that have fired would be forgotten.
        if not file.stat().st_size:
            raise ValueError(f"{file} is empty: it was cut off; remove it to begin anew") from None
