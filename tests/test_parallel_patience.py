"""Rank 0 does not wait for ever for a worker that no longer listens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).with_name("parallel_launch.py")
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
    time.sleep(20)
os._exit(int(context.leads))  # the launcher then ends the other
"""


@pytest.mark.parametrize("through", ["memory", "messages"])
def test_rank_0_gives_up_a_message_that_nobody_fetches(tmp_path: Path, through: str) -> None:
    """A worker that is stopped between two steps has not broken any exchange yet."""
    script = tmp_path / "late.py"
    script.write_text(LATE)
    command = [sys.executable, str(LAUNCH), "2", str(script), json.dumps(through == "memory")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    seconds, error = json.loads(done.stdout.splitlines()[0])
    assert 1.5 < seconds < 10
    assert "a process of the model has died or hangs" in error
