"""A stage's layers in one call of the C++ kernels, where they need no other rank or add up in shared memory.

Shape suffixes as in ``kernels/api/types.py``; W rows of a data-parallel rank.
"""

from __future__ import annotations

import torch

from ...kernels.api.stack import Stack
from ...kernels.api.types import AttentionBatch, ExpertBudget
from ..model.decoder import Decoder, make_stack
from .context import ParallelContext
from .data_ranks import SharedCache


def make_held_stack(decoder: Decoder, held: range, context: ParallelContext) -> HeldStack | None:
    """The layers that this rank holds, whose only sums are attention's and the experts'; None where that cannot be."""
    shared = context.shared_tensor_group
    if context.config.tensor > 1 and shared is None:
        return None
    stack = make_stack(decoder, held)
    if stack is None:
        return None
    if shared is not None:
        stack.share(shared)
    return HeldStack(stack, held, context, decoder.dtype)


class HeldStack:
    """See :func:`make_held_stack`."""

    def __init__(self, stack: Stack, held: range, context: ParallelContext, dtype: torch.dtype) -> None:
        self._stack, self._held, self._context, self._dtype = stack, held, context, dtype

    def run(
        self,
        layers: range,
        x_WD: torch.Tensor,
        cache: SharedCache,
        cos_sin_LC: torch.Tensor,
        batch: AttentionBatch,
        entropy_W: torch.Tensor | None,
        budget: ExpertBudget | None,
    ) -> torch.Tensor:
        """Run the rows of this data-parallel rank.

        Raises:
            RuntimeError: when a rank has died or does not answer in time.
        """
        first, stop = self._held.start, self._held.stop  # the stack counts these layers only
        if budget is not None:
            keep_WL, cap_WL = (x_WL[:, first:stop].contiguous() for x_WL in (budget.keep_TL, budget.cap_TL))
            budget = ExpertBudget(keep_TL=keep_WL, cap_TL=cap_WL, skipped_T=budget.skipped_T)
        own = range(layers.start - first, layers.stop - first)
        if others := self._context.config.tensor - 1:
            sums = 2 * len(own)
            self._context.count_sums(sums, sums * others * x_WD.numel() * self._dtype.itemsize)
        with self._context.watched():
            return self._stack.run(own, x_WD, cache[first:stop], cos_sin_LC, batch, entropy_W, budget)
