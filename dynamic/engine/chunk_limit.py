"""How many prompt tokens a step may compute beside running streams, so that these do not wait for long."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .config import EngineConfig
from .step_times import StepTimes

FAIR = 2.0  # times its decodes, with one prompt: a prompt gets as much time as all streams together
FARTHEST = 3.0  # times a full step of decodes: longer ones are not timed, the table's last line goes on
LEAST = 8  # rows of prompts in a step that may have any: a prompt always goes on


def for_streams(config: EngineConfig, *, alone: bool) -> EngineConfig:
    """The settings of an engine whose streams are watched: ``auto`` is a bound for it.

    Arguments:
        alone: whether one process has the model; steps of several are not timed.
    """
    if config.prefill_slowdown != "auto":
        return config
    return replace(config, prefill_slowdown="fair" if alone else None)


@dataclass(frozen=True, kw_only=True)
class ChunkLimit:
    """Bounds steps that have decodes by the time that the decodes alone would take.

    Arguments:
        times: of this engine's steps.
        slowdown: how many times as long as its decodes alone a step may take, above 1.
        fair: whether every further prompt that waits makes it as much longer as the first one.
    """

    times: StepTimes
    slowdown: float
    fair: bool = False

    @classmethod
    def of(cls, slowdown: float | str, times: StepTimes) -> ChunkLimit:
        """The bound that a setting means: a number, or ``fair``."""
        fair = isinstance(slowdown, str)
        return cls(times=times, slowdown=FAIR if isinstance(slowdown, str) else slowdown, fair=fair)

    def step(self, decodes: int, prompts: int) -> StepChunks:
        """The room for prompts, of which so many wait for theirs, beside so many decodes, at least one."""
        longer = (self.slowdown - 1) * (prompts if self.fair else 1)
        return StepChunks(self, decodes, (1 + longer) * self.times.seconds(decodes))


class StepChunks:
    """What is left of one step for prompts.

    Arguments:
        limit: that made this.
        decodes: rows of the step that are none of prompts.
        seconds: that the whole step may take.
    """

    def __init__(self, limit: ChunkLimit, decodes: int, seconds: float) -> None:
        self._limit, self._decodes, self._seconds = limit, decodes, seconds
        self._rows = 0  # of prompts so far
        self._contexts = 0.0  # rows times positions in front of them

    def room(self, start: int, most: int) -> int:
        """How many tokens of a prompt fit, of which ``start`` lie in front of them, and which are at most ``most``."""
        low, high = min(most, max(LEAST - self._rows, 0)), most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._seconds_with(start, middle) <= self._seconds else (low, middle - 1)
        return low

    def take(self, start: int, count: int) -> None:
        """These tokens run in the step."""
        self._rows += count
        self._contexts += count * (start + count / 2)

    def _seconds_with(self, start: int, count: int) -> float:
        times, contexts = self._limit.times, self._contexts + count * (start + count / 2)
        rows = self._decodes + self._rows + count
        return times.seconds(rows, sampled=self._decodes) + times.per_position * contexts
