"""What running streams wait for while prompts are prefilled: ``python benchmarks/many_streams.py --model default``.

Streams decode in one engine; then prompts arrive. The time between two tokens of a stream is the time of a step, so
that its percentiles are those of the steps. The same is done with each value of ``engine.prefill_slowdown``, in turns,
because machines drift: ``none`` fills a step with prompts up to ``max_num_batched_tokens``. Measured are one long
prompt beside streams, sixteen of them at once, and many short requests at once. No two prompts begin alike.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from benchmark import command_line, in_turns, surroundings, write
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.sampling_params import SamplingParams

LONG = 2048  # tokens of a long prompt
SHORT = 32
IDLE = 64  # steps of streams alone


class Streams:
    """An engine with one value of the key, and what is measured of it."""

    def __init__(self, model: Any, config: EngineConfig) -> None:
        self.engine = Engine(model, config)
        self._numbers = count()
        self._draws = np.random.default_rng(0)

    def add(self, prompt: int, tokens: int) -> str:
        """A request with a prompt of its own; gives its id."""
        name, ids = str(next(self._numbers)), self._draws.integers(3, self.engine.vocab_size, prompt).tolist()
        self.engine.add_request(name, ids, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
        return name

    def step(self) -> tuple[float, set[str]]:
        """Seconds of a step, and whose tokens came."""
        began = time.perf_counter()
        deltas = self.engine.step()
        return time.perf_counter() - began, {delta.request_id for delta in deltas}

    def beside(self, streams: int, prompts: int) -> dict[str, Any]:
        """Long prompts that arrive at once beside so many streams; all numbers in seconds."""
        running = [self.add(SHORT, 1 << 12) for _ in range(streams)]
        while running and len(self.step()[1]) < streams:
            pass
        idle = [self.step()[0] for _ in range(IDLE)] if streams else []
        waiting = {self.add(LONG, 2) for _ in range(prompts)}
        began, steps, firsts = time.perf_counter(), [], []
        while waiting:
            seconds, came = self.step()
            steps.append(seconds)
            firsts += [time.perf_counter() - began] * len(came & waiting)
            waiting -= came
        self.engine.abort([str(number) for number in range(next(self._numbers))])
        return {"idle": idle, "steps": steps, "first_tokens": firsts}

    def many(self, streams: int, tokens: int) -> dict[str, Any]:
        """So many short requests at once, to their end."""
        for _ in range(streams):
            self.add(SHORT, tokens)
        steps, came = [], 0
        while self.engine.has_unfinished():
            seconds, names = self.step()
            steps.append(seconds)
            came += len(names)
        return {"steps": steps, "tokens": came}


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Percentiles in milliseconds over all runs of a cell."""

    def percentiles(name: str, values: list[float]) -> dict[str, float]:
        if not values:
            return {}
        p50, p99 = np.percentile(values, (50, 99))
        return {f"{name}_p50_ms": round(1e3 * float(p50), 2), f"{name}_p99_ms": round(1e3 * float(p99), 2)}

    every = {name: [value for run in runs for value in run.get(name, ())] for name in ("idle", "steps", "first_tokens")}
    found = percentiles("idle", every["idle"]) | percentiles("step", every["steps"])
    found["longest_step_ms"] = round(1e3 * max(every["steps"]), 2)
    if every["idle"]:
        for name in ("p50", "p99"):
            found[f"{name}_over_idle"] = round(found[f"step_{name}_ms"] / found[f"idle_{name}_ms"], 2)
    if firsts := every["first_tokens"]:
        found["mean_first_token_s"] = round(float(np.mean(firsts)), 3)
        found["last_first_token_s"] = round(float(np.mean([max(run["first_tokens"]) for run in runs])), 3)
    if "tokens" in runs[0]:
        found["tokens_per_second"] = round(sum(run["tokens"] for run in runs) / sum(every["steps"]), 1)
    return found


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The results so far, whenever there are more."""
    model = load_model(options.model, quantization=options.quantization, progress=False)
    limits = EngineConfig(max_num_seqs=256, max_model_len=2 * LONG, kv_memory=options.kv_memory)
    known = {"none": None, "fair": "fair"}
    slowdowns = {name: known[name] if name in known else float(name) for name in options.slowdown}
    engines = {name: Streams(model, replace(limits, prefill_slowdown=value)) for name, value in slowdowns.items()}
    for streams in engines.values():
        streams.beside(2, 1)  # memory that is touched first
    cells: dict[str, Any] = {}
    jobs: dict[str, Any] = {
        **{f"1 prompt beside {n}": lambda s, n=n: s.beside(n, 1) for n in options.streams},
        "16 prompts beside 8": lambda s: s.beside(8, 16),
        **{f"{n} requests at once": lambda s, n=n: s.many(n, 16) for n in (64, 256)},
    }
    times = next(e.engine.step_times for e in engines.values() if e.engine.step_times is not None)
    table = [{"rows": p.rows, "ms": round(1e3 * (p.layers + p.head), 2)} for p in times.points]
    step_times = {"points": table, "ns_per_row_and_position": round(1e9 * times.per_position, 2)}
    print(step_times, flush=True)
    for cell, job in jobs.items():
        runs: dict[str, list[Any]] = {name: [] for name in engines}
        for turn in range(options.turns if cell.startswith("1 ") else 1):
            for name in in_turns(list(engines), turn):
                runs[name].append(job(engines[name]))
        cells[cell] = {name: summary(found) for name, found in runs.items()}
        print(cell, *(f"\n  {name:5} {found}" for name, found in cells[cell].items()), flush=True)
        yield {"step_times": step_times, "cells": cells}


def main() -> None:
    parser = command_line(__doc__, output=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--kv-memory", default="2GiB")
    parser.add_argument(
        "--slowdown", nargs="+", default=["none", "fair"], help="values of the key: none, fair, numbers"
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--turns", type=int, default=1, help="runs of the cells with one long prompt")
    options = parser.parse_args()
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    began = time.perf_counter()
    for found in measure(options):
        result = {**surroundings(), **settings, "seconds": round(time.perf_counter() - began), **found}
        write(options.output / f"many_streams_{Path(options.model).name}.json", result)


if __name__ == "__main__":
    main()
