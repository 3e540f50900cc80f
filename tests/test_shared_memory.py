"""Processes that exchange through shared memory: the same results as on one, and an error when one dies or hangs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from dynamoe.kernels.cpu.backend import CpuBackend
from dynamoe.kernels.cpu.shared_memory import CpuSharedGroup, make_shared_file
from forks import ForkedProcess

START = """
import sys, time
from pathlib import Path
import torch
from dynamoe.kernels.cpu.backend import CpuBackend
from dynamoe.kernels.cpu.shared_memory import CpuSharedGroup

torch.set_num_threads(1)
path, rank, size, timeout = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
group = CpuSharedGroup(CpuBackend("cpu", torch.float32), path, rank, size, timeout)
Path(f"open-{rank}").touch()
while not Path("begin").exists():  # until all have opened it
    time.sleep(0.001)
"""
# Everybody makes everybody's numbers, and so knows what must come out. Places take 512 KiB.
EXCHANGES = """
def numbers(round, rank, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 * round + rank)).to(dtype)

round = 0
for repeat in range(2):
    for rows in (1, 0, 300):
        for dtype in (torch.float32, torch.bfloat16):
            round += 1
            parts = [numbers(round, r, rows, 577, dtype=dtype) for r in range(size)]
            total = parts[0].float()
            for part in parts[1:]:
                total = total + part
            assert torch.equal(group.sum(parts[rank]), total.to(dtype)), (round, "sum")
            found = parts[rank].clone()
            root = round % size
            group.broadcast(found, root)
            assert torch.equal(found, parts[root]), (round, "broadcast")
            gathered = group.gather(parts[rank], root)
            assert len(gathered) == (size if rank == root else 0)
            assert all(map(torch.equal, gathered, parts)), (round, "gather")
            # Rank r sends (r + 1) · (to + round) % 5 rows of its own to each: none to some, and now and then very many.
            many = 700 if round % 4 == 0 else 1
            counts = [[(r + 1) * (to + round) % 5 * many for to in range(size)] for r in range(size)]
            sent = [numbers(round, r, sum(counts[r]), 130, dtype=dtype) for r in range(size)]
            coming = [counts[r][rank] for r in range(size)]
            found = torch.full((sum(coming), 130), torch.nan, dtype=dtype)
            swap = group.swap(sent[rank], counts[rank], found, coming)
            swap.wait()
            mine = [sent[r].split(counts[r])[rank] for r in range(size)]
            assert torch.equal(found, torch.cat(mine)), (round, "swap")
"""
SUMS_FOR_EVER = "while True: group.sum(torch.ones(1000))"
NOTHING = "time.sleep(600)"


@pytest.fixture
def file(request: pytest.FixtureRequest) -> Iterator[Path]:
    path = make_shared_file(request.param)
    yield path
    path.unlink()


Start = Callable[[list[str], float], list[ForkedProcess]]


@pytest.fixture
def start(file: Path, tmp_path: Path) -> Iterator[Start]:
    """``start(scripts, timeout)``: processes that run one script each once all have opened the file."""
    processes: list[ForkedProcess] = []

    def run(scripts: list[str], timeout: float) -> list[ForkedProcess]:
        for rank, script in enumerate(scripts):
            command = ["-c", START + script, str(file), str(rank), str(len(scripts)), str(timeout)]
            processes.append(ForkedProcess(command, tmp_path / f"output-{rank}", tmp_path))
        for rank, process in enumerate(processes):
            while not (tmp_path / f"open-{rank}").exists():
                assert process.poll() is None, process.output
                time.sleep(0.001)
        (tmp_path / "begin").touch()
        return processes

    yield run
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("file", [1, 2, 3], indirect=True)
def test_what_comes_out_is_what_one_process_would_have(start: Start, request: pytest.FixtureRequest) -> None:
    for process in start([EXCHANGES] * request.node.callspec.params["file"], 120):
        assert process.wait(100) == 0, process.output


@pytest.mark.parametrize("file", [2], indirect=True)
def test_a_process_that_dies_is_noticed_long_before_the_time_is_up(start: Start) -> None:
    processes = start([SUMS_FOR_EVER, SUMS_FOR_EVER], 600)
    time.sleep(0.2)
    processes[1].kill()
    assert processes[0].wait(60) == 1
    assert "RuntimeError: rank 1 of the group has died" in processes[0].output


@pytest.mark.parametrize("file", [2], indirect=True)
def test_a_process_that_does_not_come_is_given_up(start: Start) -> None:
    processes = start([SUMS_FOR_EVER, NOTHING], 1)
    assert processes[0].wait(60) == 1
    assert "RuntimeError: rank 1 of the group has not answered for 1 s" in processes[0].output
    assert processes[1].poll() is None


@pytest.mark.parametrize("file", [2], indirect=True)
def test_rows_that_do_not_fit_are_refused_before_anybody_waits(file: Path) -> None:
    group = CpuSharedGroup(CpuBackend("cpu", torch.float32), file, 0, 2, 1)
    with pytest.raises(ValueError, match="rows has 3 rows"):
        group.swap(torch.ones(3, 4), [1, 1], torch.ones(2, 4), [1, 1])
    with pytest.raises(ValueError, match="x must be float32 or bfloat16"):
        group.sum(torch.ones(3, dtype=torch.float64))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cannot be opened: No such file"):
        CpuSharedGroup(CpuBackend("cpu", torch.float32), tmp_path / "none", 0, 2, 1)
