"""A server whose runner fails after some full steps: ``faulty_server.py CHECKPOINT crash|hang STEPS HANG_TIMEOUT``."""

from __future__ import annotations

import sys
import time
from typing import Any

from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.runner import Runner
from dynamoe.serve.server import serve_engine
from dynamoe.serve.settings import ServerSettings


class FaultyRunner(Runner):
    """Fails in place of one step, for good or for a while."""

    kind = ""
    steps = 0

    def run(self, schedule: Any) -> Any:
        self.steps -= len(schedule.entries) == 16  # as many sequences as may run at once
        if self.steps < 0:
            if self.kind == "crash":
                raise RuntimeError("injected")
            time.sleep(3600)
        return super().run(schedule)


def make_engine() -> Engine:
    engine = Engine(load_model(sys.argv[1], progress=False))
    engine.runner.__class__ = FaultyRunner
    FaultyRunner.kind, FaultyRunner.steps = sys.argv[2], int(sys.argv[3])
    return engine


if __name__ == "__main__":
    sys.exit(serve_engine(make_engine, ServerSettings(port=0, hang_timeout=float(sys.argv[4]), drain_timeout=1)))
