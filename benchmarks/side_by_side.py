"""Several processes that generate at once on the same cores: what waiting threads that spin cost.

``python benchmarks/side_by_side.py result.json`` runs 1, 2 and 4 processes side by side, each with as many threads as
there are cores, with several bounds on how long a thread of libgomp spins at a barrier (``GOMP_SPINCOUNT``; ``none`` is
libgomp's own), with the engine on the main thread or on one of its own. It prints each process's tokens per second.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median

import benchmark

DEFAULT = "package"  # what the package sets itself


def work(model: str, quantization: str, seconds: float, own_thread: bool) -> None:
    """One process: says that it is ready, waits for a line, and prints its tokens per second."""
    from dynamoe import LLM, SamplingParams

    llm = LLM(model, quantization=quantization, progress=False)
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)

    def measure() -> None:
        llm.generate("The capital of France is", params, use_tqdm=False)
        print("ready", flush=True)
        sys.stdin.readline()
        tokens, begin = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < seconds:
            llm.generate("The capital of France is", params, use_tqdm=False)
            tokens += 32
        print(tokens / elapsed, flush=True)

    if own_thread:
        thread = threading.Thread(target=measure)
        thread.start()
        thread.join()
    else:
        measure()


def side_by_side(count: int, spin: str, arguments: list[str]) -> list[float]:
    """Tokens per second of ``count`` processes that run at once."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment |= {} if spin == DEFAULT else {"GOMP_SPINCOUNT": "300000" if spin == "none" else spin}
    command = [sys.executable, __file__, "--worker", *arguments]
    workers = [
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    pipes = [(worker.stdin, worker.stdout) for worker in workers]
    for _, answers in pipes:
        assert answers is not None
        assert answers.readline().strip() == "ready"
    for start, _ in pipes:
        assert start is not None
        print(file=start, flush=True)
    return [float(worker.communicate()[0]) for worker in workers]


def main() -> None:
    """Measure and write."""
    parser = benchmark.command_line(__doc__)
    parser.add_argument("result", nargs="?")
    parser.add_argument("--worker", nargs=4, help="used by the script itself")
    parser.add_argument("--model", default="default")
    parser.add_argument("--quantization", default="int4")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--spins", nargs="+", default=["none", DEFAULT, "2000", "300", "0"])
    options = parser.parse_args()
    if options.worker:
        model, quantization, seconds, own_thread = options.worker
        work(model, quantization, float(seconds), own_thread == "own thread")
        return
    cells = []
    for count in options.processes:
        for spin in options.spins:
            for thread in ("main thread", "own thread"):
                rates = side_by_side(count, spin, [options.model, options.quantization, str(options.seconds), thread])
                cells.append({"processes": count, "spin": spin, "engine": thread, "tokens_per_second": rates})
                print(f"{count} processes, spin {spin:8} {thread:12} {median(rates):7.1f} tokens/s each", flush=True)
    if options.result:
        benchmark.write(Path(options.result), {**benchmark.surroundings(), "cells": cells})


if __name__ == "__main__":
    main()
