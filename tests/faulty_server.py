"""A server whose runner fails after some full steps: ``faulty_server.py CHECKPOINT crash|hang STEPS HANG_TIMEOUT``; or
whose event loop is stuck from the first step on: ``faulty_server.py CHECKPOINT stuck 0 DRAIN_TIMEOUT``."""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from typing import Any

from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.runner import Runner
from dynamoe.serve import server
from dynamoe.serve.settings import ServerSettings


class FaultyRunner(Runner):
    """Fails in place of one step, for good or for a while."""

    kind = ""
    steps = 0

    def run(self, schedule: Any) -> Any:
        full = len(schedule.entries) == 16  # as many sequences as may run at once
        if not full and self.kind in ("crash", "hang"):
            time.sleep(0.02)  # no request may come to its end before all have come
        self.steps -= full
        if self.steps < 0:
            if self.kind == "crash":
                raise RuntimeError("injected")
            time.sleep(3600)
        if self.kind == "stuck":
            server_loop().call_soon_threadsafe(block)
            time.sleep(3600)
        return super().run(schedule)


def server_loop() -> asyncio.AbstractEventLoop:
    """The event loop of this process."""
    (loop,) = (o for o in gc.get_objects() if isinstance(o, asyncio.AbstractEventLoop) and o.is_running())
    return loop


def block() -> None:
    """Hold the event loop."""
    print("the event loop is stuck now", flush=True)
    time.sleep(3600)


def make_engine() -> Engine:
    engine = Engine(load_model(sys.argv[1], progress=False))
    engine.runner.__class__ = FaultyRunner
    FaultyRunner.kind, FaultyRunner.steps = sys.argv[2], int(sys.argv[3])
    return engine


if __name__ == "__main__":
    if sys.argv[2] == "stuck":
        server.END_SECONDS = 2.0
        settings = ServerSettings(port=0, warm_up=False, drain_timeout=float(sys.argv[4]))
    else:
        settings = ServerSettings(port=0, hang_timeout=float(sys.argv[4]), drain_timeout=1)
    sys.exit(server.serve_engine(make_engine, settings))
