"""What the monitor must not forget, in one SQLite file: picked requests on their way to a loss, and the bets.

A pick is *running* from before its request runs, *pending* once its output is there, and *counted* when its loss has
moved the bet, in the same transaction. One that ends without an output, by the end of its process or otherwise, is
*interrupted*: no loss can be had for it, and its number is reported. Every step is one transaction, and taking it again
changes nothing.

Commits wait for the disk (``synchronous=FULL``). They happen for picked requests only, three for each, and what a power
cut could take otherwise is a pick whose answer is with its client already: nobody would know that it is missing.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .e_process import EProcess

_FORMAT = 1
_TABLES = (
    "CREATE TABLE openings (count INTEGER NOT NULL)",
    "INSERT INTO openings VALUES (0)",
    "CREATE TABLE certificates (id TEXT PRIMARY KEY, process TEXT NOT NULL, interrupted INTEGER NOT NULL)",
    "CREATE TABLE picks (number INTEGER PRIMARY KEY, request TEXT NOT NULL UNIQUE, certificate TEXT NOT NULL,"
    " state TEXT NOT NULL, prompt TEXT, served TEXT)",
    "CREATE INDEX picks_by_state ON picks (state, number)",
    f"PRAGMA user_version = {_FORMAT}",
)
RUNNING, PENDING, COUNTED, INTERRUPTED = "running", "pending", "counted", "interrupted"


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What the tokens of a request that sampled were drawn from.

    Arguments:
        temperature: above 0.
        states: what the LM head got for each token, completions one after the other, float32.
    """

    temperature: float
    states: bytes


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a request was given.

    Arguments:
        prompt_tokens: token ids.
        served_tokens: token ids of each of its completions.
        draws: of a request that sampled; None of a greedy one.
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
    """How many picks of a certificate there are that have no loss yet, or never will (``interrupted``)."""

    running: int
    pending: int
    interrupted: int


class MonitorStore:
    """The file of one monitor. Not thread-safe. Readable by its owner only: prompts and outputs of picks are in it.

    The file belongs to one process at a time. Opening it marks as interrupted what the process before left running.

    Arguments:
        file: made if it is not there.
        keep: picks without tokens (counted or interrupted) are forgotten when so many newer picks have come. Until then
            their ids are known, and taking one of their steps again changes nothing.

    Raises:
        ValueError: naming the file, when it is in use, damaged, of another program or another format.
    """

    def __init__(self, file: Path, keep: int = 10_000) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self._keep = keep
        try:
            _make(file)
            self._connection = sqlite3.connect(file, timeout=1, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise ValueError(f"{file} cannot be opened: {error}") from error
        try:
            self.opened = self._open(file)
        except sqlite3.Error as error:
            self._connection.close()
            busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            reason = "is in use" if busy else f"cannot be used: {error}"
            raise ValueError(f"{file} {reason}") from error
        except ValueError:
            self._connection.close()
            raise

    def _open(self, file: Path) -> int:
        """Take hold of the file until the process ends; returns how often it has been opened."""
        self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        (found,) = self._connection.execute("PRAGMA user_version").fetchone()
        new = self._connection.execute("SELECT 1 FROM sqlite_master").fetchone() is None
        if not new and found == 0:
            raise ValueError(f"{file} is the database of another program")
        if not new and found != _FORMAT:
            raise ValueError(f"{file} has format {found}; this version reads {_FORMAT}")
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        with self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            for statement in _TABLES if new else ():
                connection.execute(statement)
            for (request_id,) in connection.execute("SELECT request FROM picks WHERE state = ?", (RUNNING,)).fetchall():
                self._interrupt(request_id)
            (opened,) = connection.execute("UPDATE openings SET count = count + 1 RETURNING count").fetchone()
        return opened

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def arm(self, certificate_id: str, alpha: float, delta: float) -> EProcess:
        """The bet against a certificate: the stored one, or else a new one, which is stored."""
        with self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(
                "INSERT OR IGNORE INTO certificates VALUES (?, ?, 0)",
                (certificate_id, EProcess.start(alpha, delta).to_json()),
            )
            return self.process(certificate_id)

    def process(self, certificate_id: str) -> EProcess:
        """The bet against a certificate.

        Raises:
            ValueError: for an id that was never armed.
        """
        found = self._connection.execute("SELECT process FROM certificates WHERE id = ?", (certificate_id,)).fetchone()
        if found is None:
            raise ValueError(f"certificate {certificate_id!r} is not monitored")
        return EProcess.from_json(found[0])

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
        """How far a pick is; None for a request that was not picked, or whose pick was forgotten."""
        found = self._connection.execute("SELECT state FROM picks WHERE request = ?", (request_id,)).fetchone()
        return found and found[0]

    def pick(self, request_id: str, certificate_id: str) -> None:
        """Store that a request is picked, before it runs. An interrupted one runs again; others stay as they are."""
        with self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            state = self.pick_state(request_id)
            if state is None:
                connection.execute(
                    "INSERT INTO picks (request, certificate, state) VALUES (?, ?, ?)",
                    (request_id, certificate_id, RUNNING),
                )
            elif state == INTERRUPTED:
                self._count_interrupted(request_id, -1)
                self._move(request_id, RUNNING)

    def withdraw(self, request_id: str) -> bool:
        """Forget a running pick; returns whether there was one."""
        with self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            deleted = connection.execute("DELETE FROM picks WHERE request = ? AND state = ?", (request_id, RUNNING))
            return deleted.rowcount > 0

    def finish(self, request_id: str, output: Served) -> bool:
        """Store the output of a running pick; without any token it is interrupted.

        Returns: whether anything changed: not for a request that was not picked or has finished before.
        """
        with self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            if self.pick_state(request_id) != RUNNING:
                return False
            if any(len(tokens) for tokens in output.served_tokens):
                tokens = [[int(token) for token in completion] for completion in output.served_tokens]
                served = tokens if output.draws is None else {"tokens": tokens, **_packed(output.draws)}
                self._move(request_id, PENDING, [int(token) for token in output.prompt_tokens], served)
            else:
                self._interrupt(request_id)
            return True

    def next_pending(self, certificate_ids: Iterable[str]) -> PendingRun | None:
        """The oldest pick of these certificates that waits for its loss. It stays the oldest until that is counted."""
        ids = tuple(certificate_ids)
        found = self._connection.execute(
            "SELECT request, certificate, prompt, served FROM picks"
            f" WHERE state = ? AND certificate IN ({', '.join('?' * len(ids))}) ORDER BY number LIMIT 1",
            (PENDING, *ids),
        ).fetchone()
        if found is None:
            return None
        served, draws = json.loads(found[3]), None
        if isinstance(served, dict):
            draws = Draws(temperature=served["temperature"], states=base64.b64decode(served["states"]))
            served = served["tokens"]
        return PendingRun(
            request_id=found[0],
            certificate_id=found[1],
            prompt_tokens=json.loads(found[2]),
            served_tokens=served,
            draws=draws,
        )

    def count_loss(self, request_id: str, loss: float) -> tuple[str, EProcess] | None:
        """Count the loss of a pending pick, once.

        Returns: the certificate's id and its bet afterwards; None when the pick was counted before, or is not known.

        Raises:
            ValueError: for a loss outside [0, 1], or a pick without output.
        """
        with self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            pick = "SELECT certificate, state FROM picks WHERE request = ?"
            found = connection.execute(pick, (request_id,)).fetchone()
            if found is None or found[1] == COUNTED:
                return None
            certificate_id, state = found
            if state != PENDING:
                raise ValueError(f"request {request_id!r} is {state}: it has no output and can have no loss")
            process = self.process(certificate_id).observe(loss)
            connection.execute("UPDATE certificates SET process = ? WHERE id = ?", (process.to_json(), certificate_id))
            self._move(request_id, COUNTED)
            self._forget_old()
            return certificate_id, process

    # From here on: inside a transaction.

    def _move(
        self, request_id: str, state: str, prompt: list[int] | None = None, served: list[list[int]] | dict | None = None
    ) -> None:
        tokens = [None if value is None else json.dumps(value, separators=(",", ":")) for value in (prompt, served)]
        self._connection.execute(
            "UPDATE picks SET state = ?, prompt = ?, served = ? WHERE request = ?", (state, *tokens, request_id)
        )

    def _interrupt(self, request_id: str) -> None:
        self._move(request_id, INTERRUPTED)
        self._count_interrupted(request_id, 1)
        self._forget_old()

    def _count_interrupted(self, request_id: str, more: int) -> None:
        """Interrupted picks are forgotten like others; how many there were is not."""
        self._connection.execute(
            "UPDATE certificates SET interrupted = interrupted + ?"
            " WHERE id = (SELECT certificate FROM picks WHERE request = ?)",
            (more, request_id),
        )

    def _forget_old(self) -> None:
        self._connection.execute(
            "DELETE FROM picks WHERE state IN (?, ?) AND number <= (SELECT max(number) FROM picks) - ?",
            (COUNTED, INTERRUPTED, self._keep),
        )


def _packed(draws: Draws) -> dict[str, float | str]:
    return {"temperature": draws.temperature, "states": base64.b64encode(draws.states).decode()}


def _make(file: Path) -> None:
    """Make the file where there is none. SQLite gives its log the same mode.

    An existing one is not touched: closing it here would end the locks that this process may hold on it (POSIX).
    """
    with contextlib.suppress(FileExistsError):
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
