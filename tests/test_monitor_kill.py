"""The monitor's process is killed at random moments, again and again: no pick is lost, no loss is counted twice."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import time
import zlib
from pathlib import Path

from dynamoe.dynamic.contract.e_process import EProcess
from dynamoe.dynamic.contract.monitor import MonitorConfig, RiskMonitor

ALPHA, DELTA, KILLS = 0.05, 0.05, 12

# Serves requests, several at a time, and scores them. What a method has answered is written down at once, what it has
# not may or may not have happened. Losses are functions of the request's id: whoever counts it counts the same.
WORKER = """
import os, random, sys, zlib
from pathlib import Path
from types import SimpleNamespace
from dynamoe.dynamic.contract.monitor import MonitorConfig, RiskMonitor

file, journal, run = Path(sys.argv[1]), os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT), int(sys.argv[3])
note = lambda *words: os.write(journal, (" ".join(words) + "\\n").encode())
monitor = RiskMonitor(file, MonitorConfig(share=0.8, tenant_share=1.0))
monitor.register(SimpleNamespace(id="c", alpha=0.05, delta=0.05))
choose, running, number = random.Random(run), [], 0
while True:
    action = choose.choice(("admit", "finish", "score"))
    if action == "admit" and len(running) < 5:
        request_id, number = f"{run}-{number}", number + 1
        if monitor.admit(request_id, "c"):
            note("picked", request_id)
            running.append(request_id)
    elif action == "finish" and running:
        request_id = running.pop(choose.randrange(len(running)))
        assert monitor.finished(request_id, [1, 2, 3], [[4, 5]])
        note("finished", request_id)
    elif action == "score" and (pending := monitor.next_pending()):
        note("scoring", pending.request_id)
        assert monitor.record_loss(pending.request_id, zlib.crc32(pending.request_id.encode()) % 100 / 2000)
        note("counted", pending.request_id)
"""


def run_and_kill(file: Path, journal: Path, number: int, lines: int, pause: float) -> None:
    """Run the worker until it has written so many lines, and kill it ``pause`` seconds later."""
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(file), str(journal), str(number)])
    wanted = len(entries(journal)) + lines
    try:
        while len(entries(journal)) < wanted:
            assert worker.poll() is None, "the worker ended by itself"
            time.sleep(0.002)
        time.sleep(pause)
    finally:
        worker.kill()
        assert worker.wait() == -signal.SIGKILL


def entries(journal: Path) -> list[list[str]]:
    return [line.split() for line in journal.read_text().splitlines()] if journal.exists() else []


def loss_of(request_id: str) -> float:
    return zlib.crc32(request_id.encode()) % 100 / 2000


def test_killed_at_any_moment_it_neither_loses_nor_counts_twice(tmp_path: Path) -> None:
    file, journal = tmp_path / "monitor.db", tmp_path / "journal"
    moments = random.Random(0)
    for number in range(KILLS):
        run_and_kill(file, journal, number, lines=moments.randint(1, 60), pause=moments.uniform(0, 0.02))

    monitor = RiskMonitor(file, MonitorConfig())
    process = monitor.state("c").process
    told: dict[str, list[str]] = {"picked": [], "finished": [], "scoring": [], "counted": []}
    for word, request_id in entries(journal):
        told[word].append(request_id)
    picks = monitor.state("c").picks
    monitor.close()
    connection = sqlite3.connect(file)
    states: dict[str, str] = dict(connection.execute("SELECT request, state FROM picks").fetchall())
    connection.close()

    assert set(told["picked"]) <= states.keys()
    assert {states[request_id] for request_id in told["finished"]} <= {"pending", "counted"}
    assert {states[request_id] for request_id in told["counted"]} == {"counted"}
    assert len(set(told["counted"])) == len(told["counted"])
    found = list(states.values())
    assert (picks.running, picks.pending, picks.interrupted) == (0, found.count("pending"), found.count("interrupted"))

    # The bet is that on exactly the counted requests, in the order in which they were scored.
    order = [request_id for request_id in dict.fromkeys(told["scoring"]) if states[request_id] == "counted"]
    assert len(order) == found.count("counted") == process.count
    expected = EProcess.start(ALPHA, DELTA)
    for request_id in order:
        expected = expected.observe(loss_of(request_id))
    assert process == expected

    # The kills have hit something: requests on their way, and more than a few that had been counted.
    assert process.count > 3 * KILLS
    assert picks.interrupted > KILLS / 2
