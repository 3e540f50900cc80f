"""Operations of layers with recurrent states in C++: threads share out sequences and heads, rows run in their order."""

from __future__ import annotations

import torch

from ..api.types import AttentionBatch
from ..reference.states import L2_EPS
from ..torch.states import StateOperations


class CpuStateOperations(StateOperations):
    """See :class:`.StateOperations`; a part of :class:`.CpuBackend`."""

    _isa: int

    def short_convolution(
        self,
        x_TX: torch.Tensor,
        weight_WX: torch.Tensor,
        bias_X: torch.Tensor | None,
        tails_NWX: torch.Tensor,
        batch: AttentionBatch,
        activation: str = "none",
    ) -> torch.Tensor:
        parts, silu = (x_TX, weight_WX, bias_X, tails_NWX), activation == "silu"
        return torch.ops.dynamoe_cpu.short_convolution.default(self._isa, *parts, *_places(batch), silu)

    def time_steps(
        self, x_TH: torch.Tensor, bias_H: torch.Tensor, rate_H: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.dynamoe_cpu.time_steps.default(x_TH, bias_H, rate_H)

    def silu_gated(self, x_TX: torch.Tensor, gate_TX: torch.Tensor) -> torch.Tensor:
        return torch.ops.dynamoe_cpu.silu_gated.default(self._isa, x_TX, gate_TX)

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
        parts = q_TGC, k_TGC, v_THV, decay_TH.contiguous(), step_TH.contiguous(), states_NHCV
        return torch.ops.dynamoe_cpu.recurrence.default(self._isa, *parts, *_places(batch), delta_rule, L2_EPS)

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
        parts = q_TC, k_TC, v_TX, step_TX, rate_CX, states_NCX
        return torch.ops.dynamoe_cpu.selective_scan.default(self._isa, *parts, *_places(batch))


def _places(batch: AttentionBatch) -> tuple[torch.Tensor | None, ...]:
    assert batch.state_slots_S is not None, "the batch does not say where its sequences' states are"
    return batch.state_slots_S, batch.kept_slots_S, batch.query_start_S1, batch.context_len_S
