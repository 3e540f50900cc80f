"""Layers whose memory is a state of fixed size for each sequence, row after row: the truth for every backend.

Every row of a sequence is computed by the same recurrence from the state that the row before it left, whether it
belongs to a prompt or not. So a row's result depends neither on how its sequence was cut into steps, nor on others.

Shape suffixes as in ``kernels/api/types.py``; X channels of a convolution, W taps of it, N slots of states,
H heads that have states, G groups of them that share queries and keys, C channels of a key, V channels of a value.
"""

from __future__ import annotations

import torch

from ..api.types import AttentionBatch
from .elementwise import silu, softplus

L2_EPS = 1e-6


def short_convolution(
    x_TX: torch.Tensor,
    weight_WX: torch.Tensor,
    bias_X: torch.Tensor | None,
    tails_NWX: torch.Tensor,
    batch: AttentionBatch,
    activation: str = "none",
) -> torch.Tensor:
    """Causal convolution of every channel with its own few taps, (T, X). Rows before a sequence's first are zero.

    Arguments:
        x_TX: float32.
        weight_WX: float32, the newest row's tap last.
        tails_NWX: float32, the last W - 1 rows of each sequence before this step; overwritten with those after it, and
            kept where the batch says so.
        activation: ``none`` or ``silu``, of the sum.
    """
    out_TX, taps = torch.empty_like(x_TX), weight_WX.shape[0]
    for slot, first, end, begins, kept in batch.state_runs:
        tail_WX = torch.zeros_like(tails_NWX[slot]) if begins else tails_NWX[slot]
        rows_RX = torch.cat((tail_WX, x_TX[first:end]))
        sum_RX = rows_RX[: end - first] * weight_WX[0]
        for tap in range(1, taps):
            sum_RX += rows_RX[tap : tap + end - first] * weight_WX[tap]
        out_TX[first:end] = sum_RX
        tails_NWX[slot] = rows_RX[end - first :]
        if kept >= 0:
            tails_NWX[kept] = tails_NWX[slot]
    if bias_X is not None:
        out_TX += bias_X
    return silu(out_TX) if activation == "silu" else out_TX


def time_steps(x_TH: torch.Tensor, bias_H: torch.Tensor, rate_H: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How far each head's time goes on with a row, and what is left of its state then, (T, H) each.

    ``step = softplus(x + bias)``, ``decay = exp(rate · step)``.

    Arguments:
        x_TH, bias_H, rate_H: float32; rates are below zero.
    """
    step_TH = softplus(x_TH + bias_H)
    return step_TH, torch.exp(rate_H * step_TH)


def silu_gated(x_TX: torch.Tensor, gate_TX: torch.Tensor) -> torch.Tensor:
    """``x · silu(gate)`` in float32, (T, X)."""
    return x_TX.float() * silu(gate_TX.float())


def recurrence(
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
    """What each row reads from its sequence's states after it has written to them, (T, H, V).

    ``S ← decay · S``, ``S ← S + step · k ⊗ v``, ``out = Sᵀ q``. With the delta rule (Yang et al. 2024) a row writes
    ``step · k ⊗ (v - Sᵀ k)`` instead, keys and queries have length one, and queries are divided by √C.

    Arguments:
        q_TGC, k_TGC: float32; head ``h`` uses those of group ``h // (H / G)``.
        v_THV, step_TH: float32.
        decay_TH: float32; (T, H), or one for each channel of the keys, (T, H, C).
        states_NHCV: float32, before this step; overwritten with those after it, and kept where the batch says so.
    """
    out_THV, per_group = torch.empty_like(v_THV), v_THV.shape[1] // q_TGC.shape[1]
    decay_THX1 = decay_TH.view(*decay_TH.shape[:2], -1, 1)
    for slot, first, end, begins, kept in batch.state_runs:
        state_HCV = states_NHCV[slot]
        if begins:
            state_HCV.zero_()
        # All shapes below are those of one row: torch's sums depend on the shape.
        for row in range(first, end):
            q_GC, k_GC = q_TGC[row], k_TGC[row]
            if delta_rule:
                q_GC = _unit_length(q_GC) * q_GC.shape[-1] ** -0.5
                k_GC = _unit_length(k_GC)
            q_HC1, k_HC1 = (part.repeat_interleave(per_group, 0).unsqueeze(-1) for part in (q_GC, k_GC))
            state_HCV *= decay_THX1[row]
            value_HV = v_THV[row]
            if delta_rule:
                value_HV = value_HV - (state_HCV * k_HC1).sum(1)
            state_HCV += k_HC1 * (value_HV * step_TH[row, :, None]).unsqueeze(1)
            out_THV[row] = (state_HCV * q_HC1).sum(1)
        if kept >= 0:
            states_NHCV[kept] = state_HCV
    return out_THV


def selective_scan(
    q_TC: torch.Tensor,
    k_TC: torch.Tensor,
    v_TX: torch.Tensor,
    step_TX: torch.Tensor,
    rate_CX: torch.Tensor,
    states_NCX: torch.Tensor,
    batch: AttentionBatch,
) -> torch.Tensor:
    """The recurrence of a state space whose channels share queries and keys, (T, X) (Gu and Dao 2023).

    ``S ← exp(rate · step) · S + k ⊗ (step · v)``, ``out = Sᵀ q``: a channel is a head with values of one.

    Arguments:
        q_TC, k_TC, v_TX, step_TX, rate_CX: float32.
        states_NCX: float32, before this step; overwritten with those after it, and kept where the batch says so.
    """
    decay_TXC = torch.exp(step_TX[..., None] * rate_CX.T)
    inputs = q_TC[:, None], k_TC[:, None], v_TX[..., None], decay_TXC, step_TX
    return recurrence(*inputs, states_NCX.transpose(1, 2)[..., None], batch, delta_rule=False)[..., 0]


def _unit_length(x_GC: torch.Tensor) -> torch.Tensor:
    return x_GC * torch.rsqrt(x_GC.square().sum(-1, keepdim=True) + L2_EPS)
