"""What the examples that need a server share: take the one that runs, or start one for as long as the example does."""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 300  # the first start of all compiles the kernels and prepares the default model


def server_arguments(description: str | None, model: str) -> argparse.ArgumentParser:
    """Which server an example asks."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", help="of a running server; left out, one is started")
    parser.add_argument("--model", default=model, help="what a server that is started here serves")
    return parser


@contextmanager
def running_server(base_url: str | None, model: str) -> Iterator[str]:
    """The base URL of a server, such as ``http://127.0.0.1:8000/v1``.

    Arguments:
        base_url: of a server that runs already; None starts one on a free port and stops it in the end.
        model: what the started server serves.

    Raises:
        RuntimeError: with the server's log, when it does not start.
    """
    if base_url is not None:
        yield base_url.rstrip("/")
        return
    with tempfile.TemporaryDirectory() as folder:
        log_file = Path(folder) / "server.log"
        settings = [f"model={model}", "server.port=0", f"quality.monitor.file={folder}/monitor.db"]
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "dynamoe", "serve", *settings], stdout=log, stderr=subprocess.STDOUT
            )
        try:
            yield _address(process, log_file) + "/v1"
        finally:
            process.terminate()
            process.wait()


def _address(process: subprocess.Popen[bytes], log_file: Path) -> str:
    """Where the server listens, from the line that it prints when it is ready."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if found := re.search(r"^dynamoe .* serves .* on (http://\S+)$", log_file.read_text(), re.MULTILINE):
            return found.group(1)
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start:\n{log_file.read_text()}")
