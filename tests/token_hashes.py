"""Fixed greedy runs, and hashes of what they give: shows whether two states of the code compute the same bits.

``python tests/token_hashes.py before.json`` runs everything with one thread and writes, for every run, a SHA-256
of the tokens (``tokens``), one of their log-probabilities as ``repr`` writes them (``logprobs``), and one of whatever
else the results say: texts, finish reasons, layers, experts, cached tokens, certificates, launched rows (``details``).

``--package FOLDER`` runs the package in ``FOLDER/dynamoe`` (a checkout, or a link to one) instead of the one that is
installed. ``--compare a.json b.json`` prints the runs that differ, and exits with 1 if there are any.
``--only PATTERN`` takes the runs whose names hold the regular expression; ``--list`` prints the names.

The hashes hold for one machine and one version of torch. Runs that fail are written with their error, and the exit
code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from token_hashes_runs import FAMILIES, RANDOM, Group, groups
from token_hashes_worker import launcher

WORKER = Path(__file__).with_name("token_hashes_worker.py")
KINDS = ("tokens", "logprobs", "details")
PREPARE_SECONDS = 1800.0


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the runs happen.

    Arguments:
        package: folder with a ``dynamoe`` in it; None takes what is installed.
        folder: for checkpoints and messages between processes.
        threads: of each process; None leaves them alone.
        timeout: seconds that one group may take.
    """

    package: Path | None
    folder: Path
    threads: int | None
    timeout: float

    def environment(self) -> dict[str, str]:
        """Of every process."""
        chosen = {"GOMP_SPINCOUNT": "0", "PYTHONUNBUFFERED": "1"}
        chosen |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if self.threads is not None:
            chosen["OMP_NUM_THREADS"] = str(self.threads)
        if self.package is not None:
            chosen["PYTHONPATH"] = str(self.package.resolve())
        return {**os.environ, **chosen}

    def python(self, *arguments: str) -> tuple[int, str]:
        """Run an interpreter with these arguments; its exit code, and all that it said."""
        command = [sys.executable, *arguments]
        said = self.folder / f"log-{uuid.uuid4().hex}.txt"
        with said.open("w") as log:
            process = subprocess.Popen(
                command, env=self.environment(), cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
            try:
                process.wait(self.timeout)
            except BaseException as error:  # an interrupt as well: what it started must end with it
                _end(process)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                log.write(f"it took longer than {self.timeout:.0f} seconds")
        return process.returncode, said.read_text()


def _end(process: subprocess.Popen[bytes]) -> None:
    """With everything in its session; a launcher ends its own processes, given the time."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def make_checkpoints(place: Place, chosen: list[Group]) -> None:
    """Those random checkpoints that the runs need."""
    needed = {load.model for group in chosen for load in group.loads}
    for family in FAMILIES:
        if RANDOM + family in needed:
            code, said = place.python(str(WORKER), "--checkpoint", family, str(place.folder / family))
            if code:
                print(f"no checkpoint of {family}: {said[-2000:]}", file=sys.stderr)


def run_group(place: Place, group: Group, number: int) -> dict[str, Any]:
    """Entries of the group's runs; those that its process did not live to write are errors."""
    loads = []
    for load in group.loads:
        family = load.model.removeprefix(RANDOM)
        loads.append(load if family == load.model else replace(load, model=str(place.folder / family)))
    job, answer = place.folder / f"job-{number}.json", place.folder / f"answer-{number}.json"
    job.write_text(json.dumps([asdict(load) for load in loads]))
    started = time.monotonic()
    in_python = [load.processes for load in loads if load.how == "python"]  # others start their processes themselves
    code, said = place.python(*launcher(max(in_python, default=1)), str(WORKER), str(job), str(answer))
    found: dict[str, Any] = json.loads(answer.read_text()) if answer.exists() else {}
    missing = {"error": f"the process ended with {code}: {said[-2000:]}"}
    found = {name: found.get(name, missing) for name in group.runs}
    failed = [name for name in found if "error" in found[name]]
    seconds = time.monotonic() - started
    print(f"{group.name}: {len(found)} runs, {len(failed)} failed, {seconds:.0f} s", flush=True)
    for name in failed:
        print(f"  {name}: {found[name]['error'][-800:]}", file=sys.stderr, flush=True)
    return found


def about(place: Place) -> dict[str, Any]:
    """Which code ran, and on what; kernels and the default model are made where they are not there yet."""
    script = "import dynamoe, torch; print('\\n', dynamoe.__file__, dynamoe.__version__, torch.__version__)"
    code, said = place.python("-c", script)
    if code:
        raise SystemExit(f"no dynamoe to run: {said[-2000:]}")
    file, version, torch = said.splitlines()[-1].split()
    # As anybody prepares it: the number of threads may decide where neurons of the default model come to lie.
    usual = replace(place, threads=None, timeout=PREPARE_SECONDS)
    code, said = usual.python("-m", "dynamoe", "prepare", "model=default")
    default = said.splitlines()[-1].strip() if code == 0 else f"not prepared: {said[-2000:]}"
    return {"package": file, "version": version, "torch": torch, "threads": place.threads, "default": default}


def compare(left: Path, right: Path, pattern: re.Pattern[str]) -> int:
    """Print what differs; 1 if any run does."""
    both = [json.loads(file.read_text()) for file in (left, right)]
    for key in ("torch", "threads", "default"):
        if (first := both[0]["about"][key]) != (second := both[1]["about"][key]):
            print(f"note: {key} is {first} and {second}")
    runs = [file["runs"] for file in both]
    names = [name for name in runs[0] | runs[1] if pattern.search(name)]
    differing = 0
    for name in names:
        if missing := [str(file) for file, entries in zip((left, right), runs, strict=True) if name not in entries]:
            reason = f"not in {missing[0]}"
        elif errors := [entries[name]["error"] for entries in runs if "error" in entries[name]]:
            reason = f"failed: {errors[0].strip().splitlines()[-1][:160]}"
        else:
            first, second = (entries[name] for entries in runs)
            reason = ", ".join(kind for kind in KINDS if first[kind] != second[kind])
        if reason:
            differing += 1
            print(f"{name}: {reason}")
    print(f"{len(names)} runs, {differing} differ")
    return int(differing > 0 or not names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", help="JSON file for the hashes")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="two such files")
    parser.add_argument("--only", type=re.compile, default=re.compile(""), metavar="PATTERN")
    parser.add_argument("--list", action="store_true", help="print the runs' names")
    parser.add_argument("--package", type=Path, metavar="FOLDER", help="folder with a dynamoe in it")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--jobs", type=int, default=1, help="groups that run at once")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a group of runs")
    options = parser.parse_args()
    if options.compare:
        return compare(*options.compare, options.only)
    chosen = [group for whole in groups() if (group := whole.only(options.only)).loads]
    if options.list:
        print("\n".join(name for group in chosen for name in group.runs))
        return 0
    if options.output is None or not chosen:
        parser.error("give a file for the hashes" if chosen else f"no run's name holds {options.only.pattern!r}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        place = Place(package=options.package, folder=Path(folder), threads=options.threads, timeout=options.timeout)
        facts = about(place)
        make_checkpoints(place, chosen)
        answers = pool.map(lambda numbered: run_group(place, numbered[1], numbered[0]), enumerate(chosen))
        runs = {name: found for answer in answers for name, found in answer.items()}
    options.output.write_text(json.dumps({"about": facts, "runs": runs}, indent=1, ensure_ascii=False) + "\n")
    failed = sum("error" in found for found in runs.values())
    print(f"{options.output}: {len(runs)} runs, {failed} failed, {time.monotonic() - started:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
