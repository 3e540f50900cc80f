"""A line with the progress and the estimated end of a run, and the record of its losses."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

_QUIET_SECONDS = 30.0


def tensorboard_writer(directory: Path) -> Any:
    """TensorBoard's ``SummaryWriter``, which writes events into a directory.

    Raises:
        ValueError: when the package ``tensorboard`` is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("tensorboard=true needs the package tensorboard (pip install tensorboard)") from error
    return SummaryWriter(str(directory))


class ProgressLine:
    """Step, losses, speed and estimated end, rewritten in place on a terminal, every half a minute elsewhere."""

    def __init__(self, total: int, first: int, what: str = "step") -> None:
        self.total, self.first, self.what = total, first, what
        self.stream = sys.stderr
        self.started = self.shown = time.monotonic()

    def update(self, done: int, values: dict[str, float]) -> None:
        """Show the state after ``done`` steps, if it is time for it."""
        now = time.monotonic()
        terminal = self.stream.isatty()
        if now - self.shown < (0.2 if terminal else _QUIET_SECONDS):
            return
        self.shown = now
        per_step = (now - self.started) / max(1, done - self.first)
        left = time.strftime("%H:%M:%S", time.gmtime(per_step * (self.total - done)))
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        rate = f"{per_step:.2f} s/step  " if self.what == "step" else ""
        line = f"{self.what} {done}/{self.total}  {numbers}  {rate}{left} left"
        self.stream.write(f"\r\x1b[K{line}" if terminal else line + "\n")
        self.stream.flush()

    def close(self) -> None:
        """End the line."""
        if self.stream.isatty():
            self.stream.write("\n")


@contextmanager
def progress_line(total: int, what: str, shown: bool) -> Iterator[Callable[[int], None]]:
    """A function that shows how much of a total is done, on a line that is closed at the end."""
    if not shown:
        yield lambda done: None
        return
    with closing(ProgressLine(total, 0, what=what)) as line:
        yield lambda done: line.update(done, {})


class LossLog:
    """``metrics.jsonl``: one line per logged step. A resumed run first drops records after its checkpoint."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                # A killed writer may leave half a line; it is beyond the checkpoint by construction.
                if line.endswith("}") and json.loads(line)["step"] <= resume_step:
                    kept.append(line + "\n")
        path.write_text("".join(kept))
        self.file = path.open("a")

    def add(self, record: dict[str, Any]) -> None:
        """Append one record and flush it."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read_losses(path: Path) -> list[dict[str, Any]]:
    """All records of a ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_text().splitlines()]
