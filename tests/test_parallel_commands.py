"""Commands on several processes: studies, another launcher, and a server one of whose processes fails."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from parallel_fleet import Fleet, run


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tensor", "pipeline", "expert", "data"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("through", ["memory", "messages"])
def test_streams_end_with_an_error_when_a_worker_does(
    make_checkpoint: Callable[..., Path], tmp_path: Path, how: signal.Signals, axis: str, through: str
) -> None:
    shared = f"parallel.shared_memory={str(through == 'memory').lower()}"
    fleet = Fleet(make_checkpoint("mixtral"), tmp_path, {axis: 2}, shared, timeout=4)
    worker = fleet.worker()
    try:
        assert "[DONE]" in fleet.ask(4)
        answers: list[str] = []

        def ask() -> None:
            try:
                answers.append(fleet.ask(450))
            except (OSError, urllib.error.URLError) as error:
                answers.append(f"error: {error}")

        clients = [threading.Thread(target=ask) for _ in range(16)]
        for client in clients:
            client.start()
        time.sleep(0.5)
        assert not answers, "the streams ended before the worker did"
        os.kill(worker, how)
        began = time.monotonic()
        for client in clients:
            client.join(30)
        assert time.monotonic() - began < 10
        assert len(answers) == 16
        assert all("error" in answer for answer in answers)
        if how is signal.SIGSTOP:
            with pytest.raises((urllib.error.HTTPError, OSError)):
                urllib.request.urlopen(f"{fleet.url}/health", timeout=5)
            os.kill(worker, signal.SIGKILL)
        assert fleet.process.wait(60) != 0
    finally:
        fleet.end()


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tensor", "pipeline", "expert", "data"])
def test_studies_measure_what_one_process_measures(tmp_path: Path, axis: str) -> None:
    settings = ["model=tiny", "dtype=float32", "requests=12", "texts=12", "max_tokens=16", "timing_groups=2"]
    settings.append("quality.exit_thresholds={4: 0.5, 8: 0.5, 12: 0.5}")
    found = []
    for processes, name in ((1, "one"), (2, "two")):
        more = [f"parallel.{axis}=2"] if processes == 2 else []
        run(processes, "evaluate", *settings, *more, f"json={tmp_path / name}")
        metrics = json.loads((tmp_path / name).read_text())["metrics"]
        found.append({key: metrics[key]["value"] for key in ("agreement", "kl", "perplexity", "layers_share")})
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[0]["layers_share"] < 1


@pytest.mark.slow
def test_the_launcher_of_deepspeed(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    command = ["generate", "model=tiny", "dtype=float32", "prompt=The list of files", "sampling.max_tokens=16"]
    launcher = Path(sys.executable).with_name("deepspeed")
    start = [
        str(launcher),
        "--quiet",
        "--num_gpus",
        "2",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(free_port()),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{launcher.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*start, "--module", "dynamoe", *command, "parallel.tensor=2"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert run(1, *command).strip() in done.stdout


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
