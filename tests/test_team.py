"""The kernels' own threads: who computes what changes no bit, and nothing can stop the work but the work itself."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from dynamoe.kernels.cpu import build as cpu_build
from dynamoe.kernels.cpu.backend import CpuBackend
from dynamoe.kernels.cpu.fingerprint import hash_of
from dynamoe.kernels.cpu.team import TeamCounters, team_counters
from dynamoe.kernels.cpu.vectors import PLAIN, vectors

TASKS = 61
SOURCES = [*(cpu_build.SOURCES / "team").glob("*.cpp"), Path(__file__).with_name("team_trials.cpp")]
AUTOMATIC = -1


class Trial:
    """The team without the rest of the kernels."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.functions = ctypes.CDLL(str(path))
        self.functions.trial_quota.restype = ctypes.c_double
        self.functions.trial_flushed.restype = ctypes.c_int64
        self.functions.trial_places.restype = ctypes.c_char_p
        self.expected = self.tasks(1)

    def tasks(self, threads: int, bad: int = -1, inner: int = 0) -> list[int] | None:
        """What the tasks found, None where one has thrown."""
        out, more = (ctypes.c_int64 * TASKS)(), [ctypes.c_int64(n) for n in (TASKS, bad, inner)]
        failed = self.functions.trial_tasks(threads, more[0], out, *more[1:])
        return None if failed else list(out)

    def chunks(self, threads: int, parts: int) -> list[int]:
        out = (ctypes.c_int64 * TASKS)()
        assert TASKS % parts == 0
        self.functions.trial_chunks(threads, ctypes.c_int64(parts), ctypes.c_int64(TASKS // parts), out)
        return list(out)

    def set(self, helpers: int, delay: int = 0) -> None:
        self.functions.dynamoe_set_team_trial(helpers, delay)

    @property
    def counters(self) -> TeamCounters:
        out = (ctypes.c_int64 * len(TeamCounters.__dataclass_fields__))()
        self.functions.trial_counters(out)
        return TeamCounters(*out)

    def since(self, before: TeamCounters) -> dict[str, int]:
        return {name: value - getattr(before, name) for name, value in asdict(self.counters).items()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    library = tmp_path_factory.mktemp("team") / "team.so"
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-x", "c++", "-"]
    text = "".join(f'#include "{source}"\n' for source in SOURCES)
    subprocess.run([*command, f"-I{cpu_build.SOURCES}", "-o", str(library)], input=text, text=True, check=True)
    return Trial(library)


@pytest.fixture
def trial(built: Trial) -> Iterator[Trial]:
    yield built
    built.set(AUTOMATIC)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def run_alone(trial: Trial, code: str) -> subprocess.Popen[str]:
    """A process that has the library and ``threading`` but not torch."""
    head = f"import ctypes, threading, time; f = ctypes.CDLL({str(trial.path)!r}); n = ctypes.c_int64\n"
    head += f"def go(out, threads=4): f.trial_tasks(threads, n({TASKS}), out, n(-1), n(0)); return list(out)\n"
    head += f"def new(): return (n * {TASKS})()\nf.dynamoe_set_team_trial(3, 0)\n"
    return subprocess.Popen([sys.executable, "-c", head + code], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("helpers", [AUTOMATIC, 0, 1, 2, 6, 40])
@pytest.mark.parametrize("delay", [0, 300])
def test_every_task_is_done_once_whoever_does_it(trial: Trial, helpers: int, delay: int) -> None:
    trial.set(helpers, delay)
    for _ in range(4 if delay else 200):
        assert trial.tasks(4) == trial.chunks(3, 1) == trial.chunks(5, 61) == trial.expected


@pytest.mark.parametrize("delay", [0, 50])
def test_no_number_of_helpers_and_no_delay_changes_a_bit_of_any_operator(delay: int) -> None:
    library = ctypes.CDLL(str(cpu_build.loaded()))
    backend, found, threads = CpuBackend("cpu", torch.bfloat16), set(), torch.get_num_threads()
    torch.set_num_threads(4)
    before = team_counters()
    try:
        for helpers in (0, 3):
            library.dynamoe_set_team_trial(helpers, delay)
            with torch.inference_mode():
                found |= {hash_of(vectors()[part](backend)) for part in (PLAIN,)}
    finally:
        library.dynamoe_set_team_trial(AUTOMATIC, 0)
        torch.set_num_threads(threads)
    assert len(found) == 1
    assert team_counters().entered > before.entered
    assert team_counters().alone > before.alone


@pytest.mark.parametrize("helpers", [0, 1, 5])
def test_what_a_task_throws_reaches_the_caller(trial: Trial, helpers: int) -> None:
    trial.set(helpers, 20)
    for bad in range(0, TASKS, 5):
        assert trial.tasks(4, bad) is None
        assert trial.tasks(4) == trial.expected


def test_helpers_compute_with_the_callers_rounding(trial: Trial) -> None:
    trial.set(3)
    before = trial.counters
    trial.functions.trial_flushed(4, ctypes.c_int64(TASKS))  # helpers exist, with another mode or the same
    trial.tasks(4)
    assert all(trial.functions.trial_flushed(4, ctypes.c_int64(TASKS)) == TASKS for _ in range(50))
    assert trial.since(before)["entered"]


def test_work_inside_work_is_done_by_whoever_has_it(trial: Trial) -> None:
    trial.set(2)
    nested, before = trial.tasks(1, inner=5), trial.counters
    assert trial.tasks(3, inner=5) == nested
    since = trial.since(before)
    assert (since["shared"], since["alone"]) == (1, TASKS)


def test_several_threads_call_at_once(trial: Trial) -> None:
    trial.set(2)
    before, wrong = trial.counters, []

    def call() -> None:
        wrong.extend(1 for _ in range(200) if trial.tasks(3) != trial.expected)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    since = trial.since(before)
    assert since["shared"] + since["alone"] == 600


def test_idle_helpers_sleep_and_are_woken_once(trial: Trial) -> None:
    trial.set(3)
    trial.tasks(4)

    def asleep() -> bool:
        return trial.counters.sleeps - trial.counters.wakes == trial.counters.helpers

    until(asleep)
    before = trial.counters
    trial.tasks(4)
    until(asleep)
    since = trial.since(before)
    assert (since["wakes"], since["sleeps"], since["helpers"]) == (3, 3, 0)
    trial.set(1)  # the others sleep on
    trial.tasks(4)
    assert trial.since(before)["wakes"] == 4


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU: there is nobody to call")
def test_helpers_that_come_late_are_not_called_until_they_pay(trial: Trial) -> None:
    trial.set(AUTOMATIC, 30_000)  # as if others had their cores
    before = trial.counters
    until(lambda: bool(trial.tasks(2)) and trial.since(before)["drops"] > 1)
    assert trial.since(before)["waited_ns"] > 0
    dropped = trial.counters
    trial.tasks(2)
    assert trial.since(dropped)["alone"] == 1
    trial.set(AUTOMATIC, 0)
    until(lambda: bool(trial.tasks(2)) and trial.since(dropped)["shared"] > 0)


def test_a_forked_process_makes_helpers_of_its_own(trial: Trial) -> None:
    trial.set(3)
    trial.tasks(4)
    expected = (ctypes.c_int64 * TASKS)(*(trial.expected or ()))
    for _ in range(3):
        assert trial.functions.trial_fork(4, ctypes.c_int64(TASKS), expected) == 0
    assert trial.tasks(4) == trial.expected


def test_a_process_ends_while_its_threads_work(trial: Trial) -> None:
    code = "out = new()\ndef work():\n while True: go(out)\n"
    code += "for _ in range(2): threading.Thread(target=work, daemon=True).start()\ntime.sleep(0.05)\nprint('end')"
    process = run_alone(trial, code)
    assert process.communicate(timeout=60)[0] == "end\n"
    assert process.returncode == 0


def test_a_stopped_process_goes_on(trial: Trial) -> None:
    code = "for _ in range(3):\n good = all(go(new()) == go(new(), 1) for _ in range(300))\n print(good, flush=True)"
    process = run_alone(trial, code)
    assert process.stdout is not None
    first = process.stdout.readline()
    for _ in range(5):
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.01)
        process.send_signal(signal.SIGCONT)
    assert first + process.communicate(timeout=60)[0] == "True\n" * 3


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {}, 0),
        ("0::/", {"cpu.max": "max 100000"}, 0),
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"cpu.max": "400000 100000", "a/cpu.max": "max 100000", "a/b/cpu.max": "300000 100000"}, 3),
        ("0::/a/b", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "300000 100000"}, 0.5),
        ("0::/elsewhere/id", {"cpu.max": "250000 100000"}, 2.5),  # a container that sees itself as the top
        ("4:memory:/m\n2:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 0),
        ("2:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "700000", "cpu/a/cpu.cfs_period_us": "200000"}, 3.5),
        ("3:cpuacct:/a\n0::/", {"cpu/a/cpu.cfs_quota_us": "1", "cpu/a/cpu.cfs_period_us": "1"}, 0),
        ("nonsense\n0:", {"cpu.max": "1 0"}, 0),
    ],
)
def test_quotas_of_control_groups(
    trial: Trial, tmp_path: Path, groups: str, files: dict[str, str], expected: float
) -> None:
    texts = {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}
    write(tmp_path, texts)
    assert trial.functions.trial_quota(str(tmp_path).encode()) == expected


def write(root: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


def places(trial: Trial, root: Path, helpers: int, here: int, allowed: int = 8) -> list[list[int]]:
    lines = trial.functions.trial_places(helpers, here, allowed, str(root).encode()).decode().splitlines()
    return [[int(cpu) for cpu in line.split()] for line in lines]


def test_helpers_keep_to_the_callers_memory_node_while_it_has_cores(trial: Trial, tmp_path: Path) -> None:
    system = {
        "node/has_cpu": "0-1",
        "node/node0/cpulist": "0-1,4-5",
        "node/node1/cpulist": "2-3,6-7",
        "cpu/online": "0-7",
    }
    system |= {f"cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}
    write(tmp_path, {f"sys/devices/system/{name}": text for name, text in system.items()})
    first, second = [0, 1, 4, 5], [2, 3, 6, 7]
    assert places(trial, tmp_path, 5, here=4) == [first, second, second, first, first]  # two cores each
    assert places(trial, tmp_path, 1, here=2) == [second]
    assert places(trial, tmp_path, 1, here=2, allowed=7) == []  # somebody has restricted the process
    write(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "400000 100000"})
    assert places(trial, tmp_path, 1, here=2) == []
    write(tmp_path, {"proc/self/cgroup": "0::/none", "sys/fs/cgroup/cpu.max": "max 1"})
    assert places(trial, tmp_path, 1, here=2) != []
    write(tmp_path, {"sys/devices/system/node/has_cpu": "0"})
    assert places(trial, tmp_path, 1, here=2) == []


@pytest.mark.parametrize("openmp", [False, True])
def test_the_processors_a_process_may_use(trial: Trial, openmp: bool) -> None:
    """Those it is kept to; but where OpenMP binds the threads, all that it has for them."""
    code = "import os, sys, ctypes; "
    if openmp:
        (library,) = (Path(torch.__file__).parent / "lib").glob("libgomp*")
        code += f"ctypes.CDLL({str(library)!r}, ctypes.RTLD_GLOBAL); "
    else:
        code += "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
    code += "print(ctypes.CDLL(sys.argv[1]).trial_usable(), len(os.sched_getaffinity(0)))"
    environment = os.environ | ({"OMP_PROC_BIND": "true"} if openmp else {})
    command = [sys.executable, "-c", code, str(trial.path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(trial.functions.trial_usable() if openmp else 1), "1"]
