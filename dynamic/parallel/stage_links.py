"""What travels between the stages of a pipeline: rows from a stage to the next, results back to rank 0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from .context import ParallelContext


class StageLinks:
    """This rank's links: to the rank of the same place in the stages before and behind, and to rank 0.

    Attributes:
        bytes_ahead: sent to the next stage in rows that run there.
        bytes_deferred: sent to the next stage in rows that exited, for their keys and values.
        bytes_back: received by rank 0 from the leaders of other stages: rows that are at their end.
        bytes_decided: likewise: which rows exit.
    """

    def __init__(self, context: ParallelContext) -> None:
        self._context = context
        self._size = context.config.stage_size
        self._sent: list[tuple[Any, torch.Tensor]] = []  # a tensor must live until it is away
        self.bytes_ahead = self.bytes_deferred = self.bytes_back = self.bytes_decided = 0

    def ahead(self, running: torch.Tensor, deferred_RD: torch.Tensor) -> None:
        """Send rows to the next stage: those that run there, and behind them those whose KV writes were deferred.

        Arguments:
            running: (T, D) or wider; float32.
        """
        deferred = torch.nn.functional.pad(deferred_RD, (0, running.shape[1] - deferred_RD.shape[1]))
        self._send(torch.cat((running, deferred)), self._context.world_rank + self._size)
        self.bytes_ahead += running.nbytes
        self.bytes_deferred += deferred.nbytes

    def from_behind(self, num_rows: int, width: int) -> torch.Tensor:
        """Receive what the stage before sent with :meth:`ahead`: (running and deferred rows, width), float32."""
        return self._receive((num_rows, width), torch.float32, self._context.world_rank - self._size)

    def back(self, found: torch.Tensor) -> None:
        """Send to rank 0, if this rank leads its stage; the others have the same."""
        if self._context.rank == 0:
            self._send(found.contiguous(), 0)

    def collect(self, stage: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """On rank 0: receive what a stage's leader sent with :meth:`back`."""
        found = self._receive(shape, dtype, stage * self._size)
        if dtype.is_floating_point:
            self.bytes_back += found.nbytes
        else:
            self.bytes_decided += found.nbytes
        return found

    def wait(self) -> None:
        """Until everything that was sent is away."""
        with self._context.watched():
            for work, _ in self._sent:
                work.wait()
        self._sent.clear()

    def _send(self, rows: torch.Tensor, rank: int) -> None:
        if not rows.numel():
            return
        with self._context.watched():
            self._sent.append((dist.isend(rows, rank), rows))

    def _receive(self, shape: tuple[int, ...], dtype: torch.dtype, rank: int) -> torch.Tensor:
        rows = torch.empty(shape, dtype=dtype, device=self._context.device)
        if rows.numel():
            with self._context.watched():
                dist.recv(rows, rank)
        return rows
