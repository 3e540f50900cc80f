"""Commands on several processes: contracts, studies, another launcher, and a server one of whose processes fails."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

LAUNCH = Path(__file__).with_name("parallel_launch.py")


class Fleet:
    """``dynamoe serve`` on two processes; workers are known by their rank in the environment."""

    def __init__(self, model: Path | str, folder: Path, axis: str, *more: str, timeout: float = 30) -> None:
        self.log = folder / "log.txt"
        settings = [f"model={json.dumps(str(model))}", "server.port=0", "dtype=float32", f"parallel.{axis}=2"]
        settings += [f"parallel.timeout={timeout}", "server.served_model_name=tiny", "engine.max_model_len=500", *more]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(LAUNCH), "2", "-m", "dynamoe", "serve", *settings],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while not (found := re.search(r"serves .* on (http://\S+)$", self.log.read_text(), re.M)):
            assert time.monotonic() < deadline, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        self.url = found[1]

    def worker(self) -> int:
        """The process id of rank 1."""
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) != self.process.pid:
                    continue
                if b"\0RANK=1\0" in b"\0" + (entry / "environ").read_bytes():
                    return int(entry.name)
            except (OSError, ValueError):
                continue
        raise AssertionError("there is no worker")

    def ask(self, tokens: int, **fields: Any) -> str:
        body = {"model": "tiny", "prompt": "The quick brown", "max_tokens": tokens, "temperature": 0, "stream": True}
        body |= {"ignore_eos": True, **fields}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()

    def contracts(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/v1/contracts", timeout=60) as answer:
            return json.loads(answer.read())

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()  # the launcher ends its processes, which are in sessions of their own
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tensor", "pipeline", "expert"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_streams_end_with_an_error_when_a_worker_does(
    make_checkpoint: Callable[..., Path], tmp_path: Path, how: signal.Signals, axis: str
) -> None:
    fleet = Fleet(make_checkpoint("mixtral"), tmp_path, axis, timeout=4)
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


def run(processes: int, *command: str) -> str:
    """What rank 0 printed."""
    start = [sys.executable, str(LAUNCH), str(processes), "-m", "dynamoe"]
    done = subprocess.run([*start, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tensor", "pipeline", "expert", "data"])
def test_a_contract_that_two_processes_made_holds_in_two(tmp_path: Path, axis: str) -> None:
    settings = ["dtype=float32", "requests=40", "test_requests=10", "max_tokens=12", "probabilities=[0.95,0.6]"]
    output = tmp_path / "calibration"
    run(2, "calibrate", "model=tiny", f"parallel.{axis}=2", "alphas=[0.3]", f"output={output}", *settings)
    (certificate,) = (json.loads(file.read_text()) for file in (output / "certificates").glob("*.json"))
    quality = [f"quality.certificates={output / 'certificates'}", "quality.monitor.share=1"]
    quality.append(f"quality.monitor.file={tmp_path / 'monitor.sqlite'}")
    fleet = Fleet("tiny", tmp_path, axis, *quality)
    try:
        plain: dict[str, Any] = {"stream": False, "ignore_eos": False}
        exact = json.loads(fleet.ask(12, **plain))
        with ThreadPoolExecutor(16) as pool:
            contract = plain | {"quality": {"alpha": 0.3}}
            asked = [pool.submit(fleet.ask, 12, **(contract if n % 2 else plain)) for n in range(16)]
            answers = [json.loads(one.result()) for one in asked]
        for answer in answers[::2]:
            assert answer["choices"][0]["text"] == exact["choices"][0]["text"]
        for answer in answers[1::2]:
            compute = answer["usage"]["compute"]
            assert compute["certificates"] == [certificate["id"]], compute
            assert compute["layer_rows"] < exact["usage"]["compute"]["layer_rows"]
        deadline = time.monotonic() + 60
        while (monitor := fleet.contracts()["data"][0]["monitor"])["pending"] + monitor["running"]:
            assert time.monotonic() < deadline, monitor
            time.sleep(0.1)
        assert monitor["losses"] == 8  # each was run again in full, by both processes
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
