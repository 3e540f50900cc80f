"""What becomes of the keys and values that a row owes to the layers it skipped."""

from __future__ import annotations

from typing import Protocol

import torch

from ...kernels.api.types import AttentionBatch, KVLayer
from ..model.decoder import Decoder
from ..model.exits import DecoderExit


class Backfill(Protocol):
    """Pays the debts of rows that leave. One object serves an engine for its whole life.

    ``leave`` is called when rows leave at an exit, in front of any deeper layer's launch of the same step: rows that go
    on may attend to them.
    """

    def leave(self, exit: DecoderExit, x_RD: torch.Tensor, batch: AttentionBatch) -> None:
        """Take the residual streams of rows that leave.

        Arguments:
            batch: positions and slots of these rows.
        """
        ...


class Project:
    """Keys and values of all skipped layers at once, made of the state at the exit: approximate, and cheap."""

    def __init__(self, decoder: Decoder, kv: list[KVLayer]) -> None:
        self._decoder, self._kv = decoder, kv

    def leave(self, exit: DecoderExit, x_RD: torch.Tensor, batch: AttentionBatch) -> None:
        self._decoder.project(exit, x_RD, self._kv, batch)
