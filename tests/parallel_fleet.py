"""Starts commands on several processes, for tests: a server to ask over HTTP, or what rank 0 prints."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from forks import ForkedProcess

LAUNCH = Path(__file__).with_name("parallel_launch.py")


def settings_of(sizes: dict[str, int]) -> list[str]:
    """Of a command line."""
    return [f"parallel.{axis}={size}" for axis, size in sizes.items()]


class Fleet:
    """``dynamoe serve``; workers are known by their rank in the environment.

    Arguments:
        sizes: of the axes; none: one process without a launcher.
    """

    def __init__(
        self, model: Path | str, folder: Path, sizes: dict[str, int], *more: str, timeout: float = 240
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.log = folder / "log.txt"
        settings = [f"model={json.dumps(str(model))}", "server.port=0", "dtype=float32", *settings_of(sizes)]
        settings += [f"parallel.timeout={timeout}", "server.served_model_name=tiny", "engine.max_model_len=500", *more]
        processes, command = math.prod(sizes.values()), ["-m", "dynamoe", "serve", *settings]
        if processes == 1:
            self.process = ForkedProcess(command, self.log, folder)
        else:
            launch = [sys.executable, str(LAUNCH), str(processes), *command]
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(launch, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 240
        while not (found := re.search(r"serves .* on (http://\S+)$", self.log.read_text(), re.M)):
            assert time.monotonic() < deadline, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        self.url = found[1]

    def worker(self) -> int:
        """The process id of rank 1."""
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) != self.process.pid:
                    continue
                if b"\0RANK=1\0" in b"\0" + (entry / "environ").read_bytes():
                    return int(entry.name)
            except (OSError, ValueError):
                continue
        raise AssertionError("there is no worker")

    def ask(self, tokens: int, **fields: Any) -> str:
        body = {"model": "tiny", "prompt": "The quick brown", "max_tokens": tokens, "temperature": 0, "stream": True}
        body |= {"ignore_eos": True, **fields}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()

    def contracts(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/v1/contracts", timeout=60) as answer:
            return json.loads(answer.read())

    def metrics(self) -> dict[str, float]:
        """By name, those that have no labels of their own."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            found = re.findall(r"^([\w:]+)\{[^,}]*,[^,}]*\} (\S+)$", answer.read().decode(), re.M)
        return {name: float(value) for name, value in found}

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()  # the launcher ends its processes, which are in sessions of their own
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


def run(processes: int, *command: str) -> str:
    """What rank 0 printed."""
    start = [sys.executable, str(LAUNCH), str(processes), "-m", "dynamoe"]
    patience = [] if processes == 1 else ["parallel.timeout=240"]
    done = subprocess.run([*start, *command, *patience], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
