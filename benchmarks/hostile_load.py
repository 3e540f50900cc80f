"""Honest clients beside hostile ones: how long they wait, and how long one hostile body holds up the server.

First every body of a generator is sent alone while another connection asks for ``/health`` without a pause: its slowest
answer bounds how long the event loop was occupied. Then honest clients work alone, and after that beside hostile ones
(floods of invalid bodies, half headers, unfinished bodies, readers that never read, raised priorities, disconnects).

``python benchmarks/hostile_load.py [--model default] [--bodies 2000] [--minutes 10]``; all numbers go
into ``hostile_load.json``. Clients and server share the machine's cores.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import httpx
from benchmark import ROOT, command_line, surroundings, write

sys.path.append(str(ROOT / "tests"))

from hostile_bodies import hostile_bodies
from hostile_clients import Clients, Observed, lines_per_kind

BOUND_SECONDS = 0.25


def ask_health(url: str, ended: Event, pipe: Connection) -> None:
    """Ask for ``/health`` without a pause until ``ended``; sends [(asked at, answered at), …]. A process of its own, so
    that nothing but the server and the machine's other work keeps its answers waiting."""
    found = []
    with httpx.Client(base_url=url, timeout=60) as client:
        while not ended.is_set():
            began = time.monotonic()
            client.get("/health").raise_for_status()
            found.append((began, time.monotonic()))
    pipe.send(found)


def steps(url: str, count: int) -> dict[str, dict[str, float]]:
    """Per kind of body, and without any: how many, and of the slowest answer beside each the 99th percentile and the
    largest, in seconds."""
    context = multiprocessing.get_context("spawn")
    ended, (ours, theirs) = context.Event(), context.Pipe()
    other = context.Process(target=ask_health, args=(url, ended, theirs))
    other.start()
    bodies: list[tuple[str, float, float]] = []
    with httpx.Client(base_url=url, timeout=600) as client:
        for body in hostile_bodies(seed=2, count=count):
            if len(bodies) % 10 == 0:
                bodies.append(("none", time.monotonic(), time.monotonic() + 0.2))
                time.sleep(0.2)
            began = time.monotonic()
            client.post(body.path, content=body.data, headers={"Content-Type": "application/json"})
            bodies.append((body.kind, began, time.monotonic()))
    ended.set()
    asked = ours.recv()
    other.join()
    slowest: dict[str, list[float]] = defaultdict(list)
    for kind, began, done in bodies:
        beside = [last - first for first, last in asked if first <= done and last >= began]
        slowest[kind].append(max(beside, default=0.0))
    return {
        kind: {"bodies": len(found), "p99": sorted(found)[int(0.99 * (len(found) - 1))], "worst": max(found)}
        for kind, found in sorted(slowest.items())
    }


def summary(observed: Observed) -> dict[str, Any]:
    """The numbers of one run."""
    late = [size for second, size in observed.memory if second >= 60] or [observed.memory[-1][1]]
    return {
        "requests": len(observed.seconds),
        "failures": dict(observed.failures),
        "p50": observed.quantile(0.5),
        "p99": observed.quantile(0.99),
        "memory_after_first_minute_mib": late[0] >> 20,
        "memory_most_mib": max(late) >> 20,
        "hostile": dict(observed.hostile),
    }


def main() -> None:
    parser = command_line(__doc__, output=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--bodies", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--max-tokens", type=int, default=32)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"model": arguments.model, **surroundings()}
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        run = "import benchmark; from dynamoe.dynamic.cli.main import main; main()"
        command = [sys.executable, "-c", run, "serve", f"model={arguments.model}", "server.port=0"]
        server = subprocess.Popen(
            command, cwd=ROOT / "benchmarks", stdout=log.open("wb"), stderr=subprocess.STDOUT, text=True
        )
        try:
            while " on http://" not in log.read_text():
                if server.poll() is not None:
                    raise SystemExit(log.read_text())
                time.sleep(0.2)
            url = "http://" + log.read_text().partition(" on http://")[2].split()[0]
            result["steps"] = steps(url, arguments.bodies)
            clients = Clients(url, server.pid, arguments.max_tokens)
            result["alone"] = summary(clients.run(60 * min(2.0, arguments.minutes), hostile=False))
            result["beside"] = summary(clients.run(60 * arguments.minutes, hostile=True))
            result["lines_per_kind_and_minute"] = max(lines_per_kind(log.read_text()).values(), default=0)
        finally:
            server.terminate()
            result["seconds_to_stop"] = _timed(server)
    write(arguments.output / "hostile_load.json", result)
    print(f"{'kind of body':20}{'bodies':>8}{'p99 ms':>9}{'worst ms':>10}   (bound: {BOUND_SECONDS * 1000:.0f} ms)")
    for kind, row in result["steps"].items():
        print(f"{kind:20}{row['bodies']:8}{row['p99'] * 1000:9.0f}{row['worst'] * 1000:10.0f}")
    for name in ("alone", "beside"):
        row = result[name]
        print(f"honest clients {name}: {row['requests']} requests, p50 {row['p50']:.3f} s, p99 {row['p99']:.3f} s, "
              f"failures {row['failures']}, memory {row['memory_after_first_minute_mib']} to "
              f"{row['memory_most_mib']} MiB")  # fmt: skip
    print(f"p99 beside hostile clients / alone: {result['beside']['p99'] / result['alone']['p99']:.2f} (bound: 3)")
    print(f"most log lines of one kind in a minute: {result['lines_per_kind_and_minute']}")


def _timed(server: subprocess.Popen[Any]) -> float:
    began = time.monotonic()
    server.wait(120)
    return time.monotonic() - began


if __name__ == "__main__":
    main()
