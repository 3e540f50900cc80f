"""Full runs of sampled requests in the engine's idle time, one layer at a time, so that new requests hardly wait."""

from __future__ import annotations

import itertools
import logging
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..engine.outputs import CompletionOutput, RequestOutput
from .monitor import RiskMonitor
from .monitor_records import PendingRun
from .served_loss import Steps, loss_steps, request_loss

if TYPE_CHECKING:
    import numpy as np

    from ..model.decoder import Decoder

logger = logging.getLogger("dynamoe.contracts")


@dataclass(kw_only=True)
class FullRuns:
    """Computes the losses of the monitor's pending requests. For the engine's thread only.

    Arguments:
        decoder: the serving model; pass and loss are those of the calibration.
        monitor: returns the monitor; None while there is none.
    """

    decoder: Decoder
    monitor: Callable[[], RiskMonitor | None]
    _run: PendingRun | None = field(default=None, init=False)
    _steps: Steps[list[list[np.ndarray]]] | None = field(default=None, init=False)

    def work(self) -> bool:
        """Do a small part; returns whether more is ready."""
        try:
            return self._work()
        except sqlite3.Error as error:  # the request stays pending and is run again at the next wake-up
            logger.error("the monitor's disk fails: %s; full runs wait", error)
            self._run = self._steps = None
            return False

    def _work(self) -> bool:
        monitor = self.monitor()
        if monitor is None:
            return False
        if self._run is None or self._steps is None:
            self._run = monitor.next_pending()
            if self._run is None:
                return False
            draws = self._run.draws
            self._steps = loss_steps(self.decoder, [_output(self._run)], draws.temperature if draws else 0.0)
        try:
            next(self._steps)
            return True
        except StopIteration as end:
            loss = request_loss(end.value[0])
        except Exception:
            logger.exception("a full run is impossible: it counts with the worst loss, 1")
            loss = 1.0
        monitor.record_loss(self._run.request_id, loss)
        self._run = self._steps = None
        return True


def _output(run: PendingRun) -> RequestOutput:
    completions = [CompletionOutput(index, token_ids=list(tokens)) for index, tokens in enumerate(run.served_tokens)]
    if run.draws:
        count = sum(map(len, run.served_tokens))
        states = iter(torch.frombuffer(bytearray(run.draws.states), dtype=torch.float32).view(count, -1))
        for completion in completions:
            completion.states = list(itertools.islice(states, len(completion.token_ids)))
    return RequestOutput(run.request_id, None, list(run.prompt_tokens), completions)
