"""Room for more experts than a layer has: experts come and go in it while the model is there.

Shape suffixes are explained in ``types.py``.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..api.types import ExpertWeights
from .split import SplitExperts


class ExpertRoom:
    """A backend's memory of experts, one by one."""

    def with_room(self, weights: ExpertWeights, count: int) -> ExpertWeights:
        """The same experts in memory for ``count``; the places behind them hold nothing of use until they are written.

        Raises:
            ValueError: for experts that do not lie one behind the other.
        """
        if isinstance(weights.data, SplitExperts):
            raise ValueError("experts without gates, or with projections in different formats, are kept one by one")
        return replace(weights, num_experts=count, data=weights.data.map(lambda part: self._with_room(part, count)))

    def _with_room(self, part: torch.Tensor, count: int) -> torch.Tensor:
        if part.stride(-1) != 1 or (part.dim() > 1 and part.stride(0) < part.stride(1)):
            raise ValueError("experts that are slices of one dense matrix stay together")
        roomy = torch.empty_strided((count, *part.shape[1:]), part.stride(), dtype=part.dtype, device=part.device)
        roomy.zero_()[: len(part)] = part
        return roomy

    def expert_tensors(self, weights: ExpertWeights) -> tuple[list[torch.Tensor], str]:
        """What :meth:`with_room` made, to read and to write: tensors whose first dimension are the experts.

        Returns: the tensors' bytes, uint8, and how one expert lies in them, in words: where these are the same, an
            expert's bytes may be copied from one to the other.
        """
        parts: list[torch.Tensor] = []

        def take(part: torch.Tensor) -> torch.Tensor:
            parts.append(part.view(torch.uint8))
            return part

        weights.data.map(take)
        lie = [(tuple(part.shape[1:]), part.stride()) for part in parts]
        return parts, f"{lie} {getattr(weights.data, 'layouts', '')}"
