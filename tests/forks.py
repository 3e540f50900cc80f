"""Python processes that begin with torch and the package imported: forked from a template, which does nothing else.

To import them takes seconds of processor time, and the tests start more than a hundred processes. A forked one has its
own memory, environment, working directory, output and signals, and ends as any other does.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

IMPORTED = ("dynamoe.dynamic.llm", "dynamoe.dynamic.cli.main", "dynamoe.serve.server", "dynamoe.dynamic.cli.config")
_LOCK = threading.Lock()


class ForkedProcess:
    """A Python process, with the methods of :class:`subprocess.Popen` that the tests use.

    Arguments:
        command: arguments of the interpreter: ``-m MODULE …``, ``-c CODE …`` or ``FILE …``.
        file: that takes standard output and standard error.
        directory: to run in.
        variables: of the environment, beside those of this process.
    """

    def __init__(self, command: list[str], file: Path, directory: Path, **variables: str) -> None:
        self.args = [sys.executable, *command]
        self._file = file
        request = {"command": command, "directory": str(directory), "environment": {**os.environ, **variables}}
        self._status, status = os.pipe()
        self.returncode: int | None = None
        with file.open("wb") as output, _LOCK:  # threads start processes too, and there is one template
            socket.send_fds(_template(), [json.dumps(request).encode()], [output.fileno(), status])
        os.close(status)
        self._lines = b""
        number = self._line(120)  # the template may still be importing
        assert number is not None, "the process that starts others starts none"
        self.pid = int(number)

    @property
    def output(self) -> str:
        """What it has written so far."""
        return self._file.read_text()

    def _line(self, timeout: float | None) -> str | None:
        """The next line about the process: its number, then its exit code; None when none has come in time."""
        while b"\n" not in self._lines:
            if not select.select([self._status], [], [], timeout)[0]:
                return None
            part = os.read(self._status, 64)
            assert part, "the process that starts others is gone"
            self._lines += part
        line, _, self._lines = self._lines.partition(b"\n")
        return line.decode()

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; minus the signal's number when a signal ended it."""
        if self.returncode is None:
            line = self._line(timeout)
            if line is None:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(line)
            os.close(self._status)
        return self.returncode

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_processes(command: list[str], count: int, folder: Path, timeout: float = 300) -> tuple[int, str]:
    """Run one process, or as many as a ``torch.distributed`` job has: the first that fails ends all, as with
    ``torchrun``. Each writes into a file of its own in ``folder``, where all run.

    Returns:
        The exit code of the first that failed, or 0; and what all have written, rank 0 first.
    """
    job: dict[str, str] = {}
    if count > 1:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        job["WORLD_SIZE"] = str(count)
    ranks = [
        ForkedProcess(command, folder / f"output-{rank}.txt", folder, **job, **({"RANK": str(rank)} if job else {}))
        for rank in range(count)
    ]
    deadline = time.monotonic() + timeout
    while None in (codes := [rank.poll() for rank in ranks]) and not any(codes) and time.monotonic() < deadline:
        time.sleep(0.01)
    for rank in ranks:
        rank.kill()
        rank.wait()
    output = "".join(rank.output for rank in ranks)
    if not any(codes) and None in codes:
        raise subprocess.TimeoutExpired(ranks[0].args, timeout, output)
    return next((code for code in codes if code), 0), output


@cache
def _template() -> socket.socket:
    """The socket of this process's template."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}  # read while torch is imported
    with theirs:
        template = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    atexit.register(lambda: (ours.close(), template.wait()))
    return ours


def _serve(requests: socket.socket) -> None:
    """Forks for every request until nobody is there to ask; in the forked processes it runs the command and returns."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # otherwise each process copies what was imported when it clears up at its end
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 2)
        if not message:
            break
        if os.fork() == 0:
            requests.close()
            _begin(json.loads(message), *descriptors)
            return
        for descriptor in descriptors:
            os.close(descriptor)
        _reap(os.WNOHANG)
    signal.alarm(10)  # nothing that the tests began should run any more
    _reap(0)


def _reap(how: int) -> None:
    """Take the ends of the processes in between that have ended; or of all."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, how)[0]:
            pass


def _begin(request: dict[str, Any], output: int, status: int) -> None:
    """Forks once more: one process runs the command, the other tells how it ends."""
    if child := os.fork():
        os.write(status, b"%d\n" % child)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with suppress(BrokenPipeError):
            os.write(status, b"%d\n" % code)
        os._exit(0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.close(status)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    first, *rest = request["command"]
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), module.__dict__)
    elif first == "-m":
        sys.argv, sys.path[0] = rest, request["directory"]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [first, *rest], str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
