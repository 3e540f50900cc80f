"""Rank 0 does not wait for ever for a worker that no longer listens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forks import run_processes

LATE = """
import json, os, sys, time
import torch
from dynamoe.dynamic.parallel.config import ParallelConfig
from dynamoe.dynamic.parallel.context import ParallelContext
from dynamoe.dynamic.parallel.plan import Message, Operation
from dynamoe.kernels.cpu.backend import CpuBackend

context = ParallelContext(ParallelConfig(tensor=2, timeout=2), torch.device("cpu"))
if json.loads(sys.argv[1]):
    context.share_memory(CpuBackend("cpu", torch.float32))
    assert context.shares_memory
if context.leads:
    began = time.monotonic()
    try:
        while True:
            context.send(Message(operation=Operation.EMBED))
    except RuntimeError as error:
        print(json.dumps([time.monotonic() - began, str(error)]), flush=True)
else:
    context.receive()
    time.sleep(600)
os._exit(int(context.leads))  # which ends the other
"""


@pytest.mark.parametrize("through", ["memory", "messages"])
def test_rank_0_gives_up_a_message_that_nobody_fetches(tmp_path: Path, through: str) -> None:
    """A worker that is stopped between two steps has not broken any exchange yet."""
    script = tmp_path / "late.py"
    script.write_text(LATE)
    _, output = run_processes([str(script), json.dumps(through == "memory")], 2, tmp_path)
    seconds, error = json.loads(next(line for line in output.splitlines() if line.startswith("[")))
    assert seconds > 1.5
    assert "a process of the model has died or hangs" in error
