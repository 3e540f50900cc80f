"""The engines of ``peers.py``, each behind ``turn(cell, seed)`` -> tokens per second, and the share others took."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

PREFILL, PROMPT, OUTPUT = 512, 128, 64
CONCURRENCY = (1, 4, 16)
CELLS = ("prefill", *(f"decode {c}" for c in CONCURRENCY))


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(10, 49_000) for _ in range(length)] for _ in range(count)]


def weight_bits(name: str) -> int:
    """Of an engine as this benchmark names it: what it is fair to compare it with."""
    if any(mark in name for mark in ("int8", "w8a8", "Q8")):
        return 8
    return 4 if any(mark in name for mark in ("int4", "w4a", "Q4")) else 16


class Process:
    """A process in a group of its own that answers questions: a line of JSON each way.

    Its first answer, ``facts``, says what it is.
    """

    def __init__(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        self.facts = self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with {self.process.wait()}; see its own output above")
        return json.loads(line)

    def ask(self, question: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return self._read()

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def close(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()


class Worker(Process):
    """An engine loaded in its own process, stopped except while it is measured."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        super().__init__(name, command, environment)
        self.peak_bytes = 0.0
        self.measure("prefill", 0)  # warm up
        self.measure("decode 4", 0)
        self.signal(signal.SIGSTOP)

    def seconds(self, tokens: list[list[int]], output_len: int) -> float:
        return self.ask({"tokens": tokens, "output_len": output_len})["seconds"]

    def measure(self, cell: str, seed: int) -> float:
        """Tokens per second."""
        if cell == "prefill":
            return PREFILL / self.seconds(prompts(1, PREFILL, seed), 1)
        count = int(cell.split()[1])
        first = self.seconds(prompts(count, PROMPT, 1000 + seed), 1)
        whole = self.seconds(prompts(count, PROMPT, 2000 + seed), OUTPUT)
        self.peak_bytes = max(self.peak_bytes, _resident(self.process.pid))
        return count * (OUTPUT - 1) / (whole - first)

    def turn(self, cell: str, seed: int) -> float:
        self.signal(signal.SIGCONT)
        try:
            return self.measure(cell, seed)
        finally:
            self.signal(signal.SIGSTOP)


class LlamaCpp:
    """llama.cpp's own benchmark programs: a process per measurement, the file in the page cache."""

    def __init__(self, name: str, programs: Path, gguf: Path, threads: int) -> None:
        self.name = name
        self._programs, self._gguf, self._threads = programs, gguf, str(threads)
        begin = time.perf_counter()
        out, self.peak_bytes = self._call("llama-bench", "-p", "8", "-n", "0", "-r", "1", "-o", "json")
        started = time.perf_counter() - begin
        self.facts: dict[str, Any] = {"start_seconds": started, "version": str(json.loads(out)[0].get("build_commit"))}

    def _call(self, program: str, *arguments: str) -> tuple[str, float]:
        command = [str(self._programs / program), "-m", str(self._gguf), "-t", self._threads, *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        out = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
        return out, usage.ru_maxrss * 1024.0

    def turn(self, cell: str, seed: int) -> float:
        if cell == "prefill":
            out, peak = self._call("llama-bench", "-p", str(PREFILL), "-n", "0", "-r", "1", "-o", "json")
            self.peak_bytes = max(self.peak_bytes, peak)
            return float(json.loads(out)[0]["avg_ts"])
        count = int(cell.split()[1])
        context = max(1024, count * (PROMPT + OUTPUT) + 64)
        sizes = ("-c", str(context), "-b", "2048", "-ub", "512", "-npp", str(PROMPT), "-ntg", str(OUTPUT))
        out, peak = self._call(
            "llama-batched-bench", *sizes, "-tb", self._threads, "-npl", str(count), "--output-format", "jsonl"
        )
        self.peak_bytes = max(self.peak_bytes, peak)
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        return float(lines[-1]["speed_tg"])

    def close(self) -> None:
        pass


def _resident(pid: int) -> float:
    """Resident memory of a process and its children; pages that they share count for each of them."""
    root = psutil.Process(pid)
    return float(sum(process.memory_info().rss for process in (root, *root.children(recursive=True))))


class Foreign:
    """The share of the machine that neither this process nor its children used since this was made."""

    def __init__(self) -> None:
        self._busy, self._own, self._start = self._machine(), self._ours(), time.perf_counter()

    @staticmethod
    def _machine() -> float:
        times = psutil.cpu_times()
        return times.user + times.nice + times.system

    @staticmethod
    def _ours() -> float:
        own = psutil.Process()
        ended = os.times()
        total = ended.children_user + ended.children_system
        for process in (own, *own.children(recursive=True)):
            times = process.cpu_times()
            total += times.user + times.system
        return total

    def share(self) -> float:
        cores = (time.perf_counter() - self._start) * (os.cpu_count() or 1)
        return max(0.0, (self._machine() - self._busy) - (self._ours() - self._own)) / cores
