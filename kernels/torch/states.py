"""Operations of layers with recurrent states, as a part of the torch backend."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..api.types import AttentionBatch
from ..reference import states as reference


class StateOperations:
    """What a backend does for layers that keep a state for each sequence; see :class:`.TorchBackend`."""

    _fall_back: Callable[[str], None]

    def short_convolution(
        self,
        x_TX: torch.Tensor,
        weight_WX: torch.Tensor,
        bias_X: torch.Tensor | None,
        tails_NWX: torch.Tensor,
        batch: AttentionBatch,
        activation: str = "none",
    ) -> torch.Tensor:
        """Causal convolution of every channel, (T, X). See :func:`.states.short_convolution`."""
        return reference.short_convolution(x_TX, weight_WX, bias_X, tails_NWX, batch, activation)

    def time_steps(
        self, x_TH: torch.Tensor, bias_H: torch.Tensor, rate_H: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Steps and decays of a state space, (T, H). See :func:`.states.time_steps`."""
        return reference.time_steps(x_TH, bias_H, rate_H)

    def silu_gated(self, x_TX: torch.Tensor, gate_TX: torch.Tensor) -> torch.Tensor:
        """``x · silu(gate)``, float32, (T, X); both may be narrower."""
        return reference.silu_gated(x_TX, gate_TX)

    def recurrence(
        self,
        q_TGC: torch.Tensor,
        k_TGC: torch.Tensor,
        v_THV: torch.Tensor,
        decay_TH: torch.Tensor,
        step_TH: torch.Tensor,
        states_NHCV: torch.Tensor,
        batch: AttentionBatch,
        *,
        delta_rule: bool,
    ) -> torch.Tensor:
        """What rows read from their sequences' states, (T, H, V). See :func:`.states.recurrence`."""
        inputs = (q_TGC, k_TGC, v_THV, decay_TH, step_TH)
        return reference.recurrence(*inputs, states_NHCV, batch, delta_rule=delta_rule)

    def selective_scan(
        self,
        q_TC: torch.Tensor,
        k_TC: torch.Tensor,
        v_TX: torch.Tensor,
        step_TX: torch.Tensor,
        rate_CX: torch.Tensor,
        states_NCX: torch.Tensor,
        batch: AttentionBatch,
    ) -> torch.Tensor:
        """What rows read from their sequences' states, (T, X). See :func:`.states.selective_scan`."""
        return reference.selective_scan(q_TC, k_TC, v_TX, step_TX, rate_CX, states_NCX, batch)
