"""Decoding beside other programs: what is left of the speed when others use the cores too.

``python benchmarks/shared_cores.py [--only PATTERN]`` decodes one request with ``dynamoe bench``, ``dynamoe generate``
and ``dynamoe serve``, each a process of its own, alone and beside busy loops that only use registers, at equal
priority. It prints tokens per second (of ``generate`` and the server, characters) and the share of the speed alone,
with the least share that is asked for: beside n loops half of threads / (threads + n). Then it stops a server in the
midst of a stream for half a minute, keeps a process on one core, and runs two at once. All numbers go into
``shared_cores.json``, beside those of other runs whose names ``--only`` leaves out.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from benchmark import ROOT, command_line, surroundings, write

LOOP = 'int main() { for (;;) __asm__ volatile(""); }\n'
PROMPT = "The capital of France is"
RUN = "import benchmark; from dynamoe.dynamic.cli.main import main; main()"


class Commands:
    """Starts commands of this checkout on a model, and busy loops, in one session: Linux may share the cores out among
    sessions before it does among their threads.
    """

    def __init__(self, folder: Path, model: list[str]) -> None:
        self.folder, self.model = folder, model
        (folder / "loop.cpp").write_text(LOOP)
        subprocess.run(
            [os.environ.get("CXX", "g++"), "-O2", str(folder / "loop.cpp"), "-o", str(folder / "loop")], check=True
        )

    def start(self, name: str, *settings: str, before: tuple[str, ...] = (), **streams: Any) -> subprocess.Popen[str]:
        command = [*before, sys.executable, "-c", RUN, name, *self.model, *settings]
        return subprocess.Popen(command, cwd=ROOT / "benchmarks", text=True, **streams)

    @contextmanager
    def loops(self, count: int) -> Iterator[None]:
        """So many busy loops beside what the block does."""
        running = [subprocess.Popen([str(self.folder / "loop")]) for _ in range(count)]
        try:
            yield
        finally:
            for process in running:
                process.kill()
                process.wait()

    def bench(self, count: int, requests: int, before: tuple[str, ...] = ()) -> list[float]:
        """Tokens per second of ``dynamoe bench``, of so many that run at once."""
        files = [self.folder / f"bench{n}.json" for n in range(count)]
        shape = ["bench.concurrency=[1]", "bench.input_len=[16]", "bench.output_len=64", f"bench.requests={requests}"]
        running = [
            self.start("bench", *shape, f"bench.json={file}", before=before, stdout=subprocess.DEVNULL)
            for file in files
        ]
        if any(process.wait() for process in running):
            raise SystemExit("dynamoe bench failed; see its own output above")
        return [json.loads(file.read_text())["points"][0]["output_tokens_per_second"] for file in files]


class Rate:
    """Counts what comes, in another thread."""

    def __init__(self, parts: Iterator[str]) -> None:
        self._characters = 0
        self.begun = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(parts,), daemon=True)
        self._thread.start()

    def _read(self, parts: Iterator[str]) -> None:
        with suppress(httpx.HTTPError):  # the server was stopped
            for part in parts:
                self._characters += len(part)
                self.begun.set()

    def over(self, seconds: float) -> float:
        """Characters per second from now on."""
        if not self.begun.wait(300) or not self._thread.is_alive():
            raise SystemExit("nothing comes")
        before, begin = self._characters, time.perf_counter()
        time.sleep(seconds)
        return (self._characters - before) / (time.perf_counter() - begin)


@contextmanager
def generating(commands: Commands) -> Iterator[Rate]:
    """A ``dynamoe generate`` that does not end."""
    settings = ["sampling.max_tokens=8000", "sampling.temperature=0", "sampling.ignore_eos=true"]
    with commands.start("generate", f"prompt={PROMPT}", "chat=false", *settings, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        descriptor = process.stdout.fileno()
        try:
            yield Rate(iter(lambda: os.read(descriptor, 4096).decode(errors="replace"), ""))
        finally:
            process.kill()


def stream(url: str) -> Iterator[str]:
    """The texts of one completion after the other."""
    body = {
        "model": "default",
        "prompt": PROMPT,
        "max_tokens": 256,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    with httpx.Client(base_url=url, timeout=600) as client:
        body["model"] = client.get("/v1/models").json()["data"][0]["id"]
        while True:
            with client.stream("POST", "/v1/completions", json=body) as answer:
                answer.raise_for_status()
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        chunk = json.loads(line[6:])
                        if "error" in chunk:
                            raise SystemExit(f"the server failed a stream: {line}")
                        yield "".join(choice["text"] for choice in chunk["choices"])


@contextmanager
def serving(commands: Commands) -> Iterator[tuple[Rate, subprocess.Popen[str]]]:
    """A server, and what one client at a time receives from it."""
    log = commands.folder / "server.log"
    with commands.start("serve", "server.port=0", stdout=log.open("w"), stderr=subprocess.STDOUT) as server:
        try:
            while " on http://" not in log.read_text():
                if server.poll() is not None:
                    raise SystemExit(log.read_text())
                time.sleep(0.2)
            yield Rate(stream("http://" + log.read_text().partition(" on http://")[2].split()[0])), server
        finally:
            server.kill()


def main() -> None:
    """Measure and write."""
    parser = command_line(__doc__, output=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--quantization", default="int4")
    parser.add_argument("--only", default="", metavar="PATTERN", help="measurements whose names hold it")
    parser.add_argument("--loops", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--seconds", type=float, default=60.0, help="beside the most loops; a quarter beside fewer")
    parser.add_argument("--stopped", type=float, default=30.0, help="seconds that a server is stopped for")
    options = parser.parse_args()
    facts = surroundings()
    file = options.output / "shared_cores.json"
    found = json.loads(file.read_text())["measured"] if file.exists() else {}

    def wanted(name: str) -> bool:
        return re.search(options.only, name) is not None

    def note(name: str, rates: list[float], alone: float, least: float) -> None:
        share = min(rates) / alone
        found[name] = {"rates": rates, "alone": alone, "share": share, "least": least, "holds": share >= least}
        found[name] |= {key: facts[key] for key in ("when", "processor", "threads")}
        print(f"{name:24}{min(rates):9.1f} of{alone:9.1f}: {share:.3f} (at least {least:.3f})", flush=True)
        write(file, {**facts, "model": options.model, "quantization": options.quantization, "measured": found})

    def seconds(loops: int) -> float:
        return options.seconds if loops == max(options.loops) else options.seconds / 4

    def least(loops: int) -> float:
        return 0.5 * facts["threads"] / (facts["threads"] + loops)

    with tempfile.TemporaryDirectory() as folder:
        commands = Commands(Path(folder), [f"model={options.model}", f"quantization={options.quantization}"])
        if wanted("bench"):
            (alone,) = commands.bench(1, 24)
            for loops in options.loops:
                if wanted(f"bench, {loops} loops"):
                    with commands.loops(loops):  # as many tokens as fit into the time at the least speed
                        rates = commands.bench(1, int(seconds(loops) * alone * least(loops) / 64) + 1)
                    note(f"bench, {loops} loops", rates, alone, least(loops))
            if wanted("bench, one core"):
                note("bench, one core", commands.bench(1, 24, before=("taskset", "-c", "0")), alone, 0.4)
            if wanted("bench, two at once"):
                note("bench, two at once", commands.bench(2, 24), alone, 0.4)
        for name, context in (("generate", generating), ("server", serving)):
            if not wanted(name):
                continue
            with context(commands) as value:
                rate = value[0] if isinstance(value, tuple) else value
                rate.over(1)
                alone = rate.over(5)
                for loops in options.loops:
                    if wanted(f"{name}, {loops} loops"):
                        with commands.loops(loops):
                            beside = rate.over(seconds(loops))
                        alone = (alone + rate.over(5)) / 2  # before and after, as the context grows
                        note(f"{name}, {loops} loops", [beside], alone, least(loops))
                if isinstance(value, tuple) and wanted("server, stopped"):
                    value[1].send_signal(signal.SIGSTOP)
                    time.sleep(options.stopped)
                    value[1].send_signal(signal.SIGCONT)
                    rate.over(1)
                    note("server, stopped", [rate.over(5)], alone, 0.4)


if __name__ == "__main__":
    main()
