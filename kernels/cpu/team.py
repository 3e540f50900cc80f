"""What the kernels' own threads have done (``csrc/team``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import build as cpu_build


@dataclass(frozen=True)
class TeamCounters:
    """Of this process since it began.

    Arguments:
        shared: pieces of parallel work that helpers were called to.
        alone: those that one thread did, though it was allowed more.
        entered: helpers that took part in one.
        sleeps: of helpers.
        wakes: of helpers.
        waits: of callers for helpers that were still at work, longer than a few looks.
        naps: sleeps of callers in them.
        waited_ns: nanoseconds in ``waits``.
        drops: how often helpers were found to cost more time than they brought, as where other programs use the cores.
        helpers: threads beside the callers.
    """

    shared: int
    alone: int
    entered: int
    sleeps: int
    wakes: int
    waits: int
    naps: int
    waited_ns: int
    drops: int
    helpers: int


def team_counters() -> TeamCounters:
    """The counters now.

    Raises:
        BuildError: the C++ kernels could not be built or loaded.
    """
    cpu_build.load()
    return TeamCounters(*torch.ops.dynamoe_cpu.team_counters())
