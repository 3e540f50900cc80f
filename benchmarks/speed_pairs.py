"""Two states of the code side by side: is the second one as fast as the first?

``python benchmarks/speed_pairs.py FIRST SECOND result.json`` takes two folders that hold a ``dynamoe`` (a checkout, or
a link to one). Of each a process loads the models; then the two are asked in turns, one measurement each, while the
other one waits for its next line of input. Who goes first changes from pair to pair. Since a process keeps what it got
in memory, for better or worse, both are started anew several times (``--starts``), each time for ``--pairs`` pairs.

For every cell it prints the median over the pairs of SECOND's tokens per second by FIRST's (above 1: SECOND is faster)
with its 95 % bootstrap interval, which draws starts and, in each, pairs; the same for the processor's time, which other
programs on the machine disturb less; and whether the two gave the same tokens; then the same for each model's cells
together, and for all. Prompts count in the rates of decoding:
16 tokens each.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from peers_engines import Process

TEXT = (
    "To install the package, unpack the archive and run the configure script, which looks for a compiler and for the "
    "libraries that are needed. A mixture of experts holds many feed-forward layers, of which a router chooses a few "
    "for every token. The list of files is sorted by name unless an option says otherwise; a line that begins with a "
    "hash sign is a comment and is ignored. When the server receives a signal it finishes the requests that are under "
    "way, closes its sockets and ends with the exit code 0. Numbers are written in base ten: 1, 2, 3, 5, 8, 13, 21. "
)
EXITS = {4: 0.75, 8: 0.75, 12: 0.75}  # of tiny
PAUSE = 0.05  # seconds between measurements, in which idle threads of the process before go to sleep
DRAWS = 10_000


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement.

    Arguments:
        name: of the cell.
        model: what ``LLM`` takes.
        settings: its keyword arguments.
        sampling: keyword arguments of ``SamplingParams``.
        requests: that run together.
        prompt: tokens of each prompt.
        output: tokens of each output; 1 measures the prompts.
        repeats: of the whole, in one measurement.
    """

    name: str
    model: str
    settings: dict[str, Any]
    sampling: dict[str, Any] = field(default_factory=dict)
    requests: int
    prompt: int
    output: int
    repeats: int = 1

    @property
    def tokens(self) -> int:
        """What rates count: output tokens, or the prompts' if nothing else is measured."""
        return self.repeats * self.requests * (self.prompt if self.output == 1 else self.output)


def chosen_cells(pattern: str) -> list[Cell]:
    """Those whose names hold a regular expression."""
    found: list[Cell] = []
    exits = {"quality": None, "exit_thresholds": EXITS}
    precisions = {"bfloat16": {}, "int8": {"quantization": "int8"}, "int4": {"quantization": "int4"}}
    for name, model, settings, sampling, scale in (
        *((f"default {name}", "default", {"dtype": "bfloat16", **more}, {}, 1) for name, more in precisions.items()),
        *((f"tiny {name}", "tiny", {"dtype": "bfloat16", **more}, {}, 8) for name, more in precisions.items()),
        ("tiny exits", "tiny", {"dtype": "bfloat16"}, exits, 8),
    ):
        common: dict[str, Any] = {"model": model, "settings": settings, "sampling": sampling}
        found += [
            Cell(name=f"{name}, decode {requests}", **common, requests=requests, prompt=16, output=output * scale)
            for requests, output in ((1, 48), (8, 24), (16, 12))
        ]
        found.append(Cell(name=f"{name}, prefill 512", **common, requests=1, prompt=512, output=1, repeats=scale))
    return [cell for cell in found if re.search(pattern, cell.name)]


def work(chosen: Sequence[Cell]) -> None:
    """The life of a process that measures: a cell's number per line of input, an answer per line of output."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    import dynamoe
    from dynamoe import LLM, SamplingParams

    models: dict[str, Any] = {}

    def measure(cell: Cell) -> dict[str, Any]:
        key = json.dumps([cell.model, cell.settings])
        if key not in models:
            limits = {"max_num_seqs": 16, "max_model_len": 768, "enable_prefix_caching": False, "progress": False}
            llm = LLM(cell.model, **limits, **cell.settings)
            text = llm.generate(TEXT, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
            models[key] = (llm, text[0].prompt_token_ids * 16)
        llm, ids = models[key]
        prompts = [{"prompt_token_ids": ids[11 * n : 11 * n + cell.prompt]} for n in range(cell.requests)]
        common = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
        params = SamplingParams(**common, max_tokens=cell.output, **cell.sampling)
        outputs: list[Any] = []
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(cell.repeats):
            outputs = llm.generate(prompts, params, use_tqdm=False)
        spent = {"seconds": time.perf_counter() - wall, "processor": time.process_time() - processor}
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        return spent | {"tokens": hashlib.sha256(json.dumps(tokens).encode()).hexdigest()}

    for cell in chosen:  # loaded and warm
        measure(cell)
    print(json.dumps({"package": dynamoe.__file__}), file=answers)
    for line in sys.stdin:
        print(json.dumps(measure(chosen[int(line)])), file=answers)


def start(package: Path, pattern: str, threads: int) -> Process:
    """A process that measures what is in a folder with a ``dynamoe``."""
    environment = {**os.environ, "PYTHONPATH": str(package.resolve()), "OMP_NUM_THREADS": str(threads)}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return Process(str(package), [sys.executable, __file__, "--worker", pattern], environment)


def measure_start(options: argparse.Namespace, count: int, title: str) -> tuple[list[str], list[list[list[dict]]]]:
    """One start of both: which files they are, and by cell, pair and package, the answers."""
    with ExitStack() as stack:
        workers = [  # one after the other, as loading would disturb
            stack.enter_context(closing(start(package, options.only, options.threads))) for package in options.packages
        ]
        found: list[list[list[dict[str, Any]]]] = [[] for _ in range(count)]
        begin = time.monotonic()
        for pair in range(options.pairs):
            if pair and time.monotonic() - begin > options.seconds:
                break
            print(f"\r{title}, pair {pair + 1} of {options.pairs} ", end="", file=sys.stderr, flush=True)
            for number in range(count):
                answers: dict[int, dict[str, Any]] = {}
                for which in (0, 1) if (pair + number) % 2 == 0 else (1, 0):
                    time.sleep(PAUSE)
                    answers[which] = workers[which].ask(number)
                found[number].append([answers[0], answers[1]])
        print(file=sys.stderr)
    return [worker.facts["package"] for worker in workers], found


def interval(ratios_CSP: np.ndarray) -> dict[str, float]:
    """Median of ratios by cell, start and pair, with the 95 % interval of a bootstrap that draws starts, then pairs."""
    _, starts, pairs = ratios_CSP.shape
    generator = np.random.default_rng(0)
    medians = []
    for _ in range(DRAWS):
        start_S1 = generator.integers(starts, size=(starts, 1))
        pair_SP = generator.integers(pairs, size=(starts, pairs))
        medians.append(np.median(ratios_CSP[:, start_S1, pair_SP]))
    low, high = np.quantile(medians, [0.025, 0.975])
    return {"median": float(np.median(ratios_CSP)), "low": float(low), "high": float(high)}


def together(entries: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The cells of each model as one, and all cells as one: :func:`interval` by clock."""
    models = dict.fromkeys(name.partition(",")[0] for name in entries)
    groups = {f"{model}, all": [n for n in entries if n.startswith(f"{model},")] for model in models}
    found: dict[str, dict[str, Any]] = {}
    for group, names in {**groups, "all cells": list(entries)}.items():
        found[group] = {}
        for clock in ("seconds", "processor"):
            times = np.array([entries[name][clock]["by_start_pair_and_package"] for name in names])
            found[group][clock] = {"ratio": interval(times[..., 0] / times[..., 1])}
    return found


def summary(cell: Cell, starts: list[list[list[dict[str, Any]]]]) -> dict[str, Any]:
    """A cell's line of the table; ``starts`` are its answers by start, pair and package."""
    hashes = {answer["tokens"] for pairs in starts for pair in pairs for answer in pair}
    entry: dict[str, Any] = {"cell": asdict(cell), "same_tokens": len(hashes) == 1}
    for clock in ("seconds", "processor"):
        times_SP2 = np.array([[[answer[clock] for answer in pair] for pair in pairs] for pairs in starts])
        entry[clock] = {
            "ratio": interval((times_SP2[..., 0] / times_SP2[..., 1])[None]),
            "tokens_per_second": [float(cell.tokens / np.median(times_SP2[..., which])) for which in (0, 1)],
            "by_start_pair_and_package": times_SP2.round(6).tolist(),
        }
    return entry


def as_text(result: dict[str, dict[str, Any]]) -> str:
    """JSON with a line for each cell: numbers of single measurements would be thousands."""
    parts = (
        f"{json.dumps(name)}: {{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in part.items()) + "\n}"
        for name, part in result.items()
    )
    return "{\n" + ",\n".join(parts) + "\n}\n"


def table(entries: dict[str, dict[str, Any]]) -> str:
    """What is printed: cells, and several of them together."""
    lines = [f"{'':28}{'first':>9}{'second':>9}  {'second / first':24}{'in processor time':24}tokens"]
    for name, entry in entries.items():
        rates = "".join(f"{rate:9.1f}" for rate in entry["seconds"].get("tokens_per_second", ())) or " " * 18
        ratios = []
        for clock in ("seconds", "processor"):
            ratio = entry[clock]["ratio"]
            ratios.append(f"{ratio['median']:.3f} ({ratio['low']:.3f} … {ratio['high']:.3f})".ljust(24))
        same = {True: "same", False: "DIFFERENT"}.get(entry.get("same_tokens"), "")
        lines.append(f"{name:28}{rates}  {''.join(ratios)}{same}".rstrip())
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(chosen_cells(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, nargs=2, metavar="FOLDER", help="FIRST and SECOND")
    parser.add_argument("output", type=Path, help="JSON file")
    parser.add_argument("--starts", type=int, default=6, help="of both processes")
    parser.add_argument("--pairs", type=int, default=3, help="of measurements per start")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which a start begins no other pair")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--only", default="", metavar="PATTERN", help="cells' names hold it")
    options = parser.parse_args()
    chosen = chosen_cells(options.only)
    if not chosen or min(options.starts, options.pairs) < 1:
        parser.error("there is nothing to measure")
    for package in options.packages:
        if not (package / "dynamoe" / "__init__.py").is_file():
            parser.error(f"{package} holds no dynamoe")
    measured: list[list[list[list[dict[str, Any]]]]] = []
    files: list[str] = []
    for number in range(options.starts):
        files, found = measure_start(options, len(chosen), f"start {number + 1} of {options.starts}")
        measured.append(found)
    pairs = min(len(found[0]) for found in measured)
    entries = {cell.name: summary(cell, [found[n][:pairs] for found in measured]) for n, cell in enumerate(chosen)}
    facts = {"packages": files, "threads": options.threads, "when": datetime.now(UTC).isoformat(timespec="seconds")}
    pooled = together(entries)
    options.output.write_text(as_text({"about": facts, "cells": entries, "together": pooled}))
    print(table({**entries, **pooled}))


if __name__ == "__main__":
    main()
