"""Plain-torch oracles: every operation in its simplest correct form. Other backends are proved against these.

Shape suffixes are explained in ``types.py``. Reductions run in float32 whatever the input's dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..api.kv_codes import read_pages, write_heads
from ..api.types import AttentionBatch, KVLayer, Routing
from .router import route as route
from .router import router_logits as router_logits

CLAMPED_SWIGLU, SWIGLU_LIMIT, SWIGLU_GAIN = "clamped_swiglu", 7.0, 1.702
SQUARED_RELU = "relu2"  # the only activation without a gate: of FFNs of two matrices


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, computed in float32, returned in the weight's dtype."""
    x32 = x_TD.float()
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (weight_D * x32.to(x_TD.dtype)).to(weight_D.dtype)


def rope(
    x_TXC: torch.Tensor, cos_sin_LC: torch.Tensor, positions_T: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """Rotary embedding (Su et al. 2021), half-split as Llama stores it, or of channels that follow each other.

    Arguments:
        x_TXC: queries or keys, X heads.
        cos_sin_LC: float32 table; row p holds cos for C/2 frequencies, then sin for C/2 frequencies, of position p.
        positions_T: int64.
        interleaved: channels 0 and 1 make a pair, not 0 and C/2; the result is half-split all the same.
    """
    cos, sin = cos_sin_LC[positions_T].unsqueeze(1).chunk(2, -1)
    x_TXC, dtype = x_TXC.float(), x_TXC.dtype
    a, b = (x_TXC[..., ::2], x_TXC[..., 1::2]) if interleaved else x_TXC.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(dtype)


def activate(gate: torch.Tensor | None, up: torch.Tensor, activation: str) -> torch.Tensor:
    """Gated activation ``act(gate) * up``; ``activation`` is ``silu``, ``gelu`` (exact) or ``gelu_tanh``.

    ``clamped_swiglu`` is ``gate · sigmoid(1.702 gate) · (up + 1)`` of a gate that is at most 7 and an up within ± 7.
    ``relu2`` is ``max(up, 0)²`` and has no gate.
    """
    if (gate is None) != (activation == SQUARED_RELU):
        raise ValueError(f"activation {activation!r}: {SQUARED_RELU} has no gate, all others have one")
    if gate is None:
        return up.relu().square()
    if activation == "silu":
        return F.silu(gate) * up
    if activation == "gelu":
        return F.gelu(gate) * up
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    if activation == CLAMPED_SWIGLU:
        gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
        return gate * (SWIGLU_GAIN * gate).sigmoid() * (up + 1)
    raise ValueError(f"unknown activation {activation!r}; known: silu, gelu, gelu_tanh, {CLAMPED_SWIGLU}")


def write_kv(k_TGC: torch.Tensor, v_TGC: torch.Tensor, layer: KVLayer, slots_T: torch.Tensor) -> None:
    """Store each row's key and value at its slot (``page * P + offset``)."""
    pages, offsets = slots_T // layer.page_size, slots_T % layer.page_size
    write_heads(layer.keys_BGPC, k_TGC, pages, offsets, layer)
    write_heads(layer.values_BGPC, v_TGC, pages, offsets, layer)


def paged_attention(
    q_THC: torch.Tensor,
    layer: KVLayer,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
    sinks_H: torch.Tensor | None = None,
    lse_TH: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal grouped-query attention of this step's rows over their sequences' pages.

    Arguments:
        q_THC: rotated queries.
        layer: the cache, which already holds this step's keys and values.
        scale: factor on the scores.
        window: a row of cache index i sees ``i - window + 1 … i`` (sliding window); None sees all up to i.
        sinks_H: float32, a logit of each head that takes part in the softmax and has no value; it is not scaled.
        lse_TH: float32; if given, takes the logarithm of the softmax's denominator, the sink's term included. It joins
            parts of a context that were attended apart.
        softcap: scores s, scaled, become ``softcap · tanh(s / softcap)``; a sink does not.

    Returns: attention output, (T, H, C), in the queries' dtype.
    """
    out_THC = torch.empty_like(q_THC)
    groups = q_THC.shape[1] // layer.keys_BGPC.shape[1]
    starts = batch.query_start_S1.tolist()
    for s, length in enumerate(batch.context_len_S.tolist()):
        rows = slice(starts[s], starts[s + 1])
        pages = batch.block_table_SM[s, : -(-length // layer.page_size)].long()
        k_GLC, v_GLC = (
            read_pages(stored, pages, layer).float().transpose(0, 1).flatten(1, 2)[:, :length]
            for stored in (layer.keys_BGPC, layer.values_BGPC)
        )
        if window is not None:  # pages behind it may be anybody's
            behind = max(0, length - (starts[s + 1] - starts[s]) - window + 1)
            k_GLC[:, :behind] = v_GLC[:, :behind] = 0.0
        k_HLC, v_HLC = k_GLC.repeat_interleave(groups, 0), v_GLC.repeat_interleave(groups, 0)
        scores_HTL = torch.einsum("thc,hlc->htl", q_THC[rows].float(), k_HLC) * scale
        scores_HTL = scores_HTL if softcap is None else softcap * (scores_HTL / softcap).tanh()
        index_L = torch.arange(length, device=q_THC.device)
        behind_TL = index_L[length - (starts[s + 1] - starts[s]) :, None] - index_L
        hidden_TL = behind_TL < 0
        if window is not None:
            hidden_TL = hidden_TL | (behind_TL >= window)
        scores_HTL = scores_HTL.masked_fill(hidden_TL, float("-inf"))
        if sinks_H is not None:
            sinks_HT1 = sinks_H.to(scores_HTL.dtype)[:, None, None].expand(-1, scores_HTL.shape[1], 1)
            scores_HTL = torch.cat((scores_HTL, sinks_HT1), -1)
        if lse_TH is not None:
            lse_TH[rows] = scores_HTL.logsumexp(-1).T.to(lse_TH.dtype)
        probs_HTL = scores_HTL.softmax(-1)[..., :length]
        out_THC[rows] = torch.einsum("htl,hlc->thc", probs_HTL, v_HLC).to(q_THC.dtype)
    return out_THC


def experts(
    x_TD: torch.Tensor,
    gate_EFD: torch.Tensor | None,
    up_EFD: torch.Tensor,
    down_EDF: torch.Tensor,
    routing: Routing,
    activation: str,
    gate_bias_EF: torch.Tensor | None = None,
    up_bias_EF: torch.Tensor | None = None,
    down_bias_ED: torch.Tensor | None = None,
) -> torch.Tensor:
    """``sum_k weight_k * down_e(act(gate_e x) * up_e x)`` with ``e = expert_ids[k]``: the mixture, expert by expert.

    The sum over k runs in float32 in the order of the slots, zero experts last. Without a gate an expert is
    ``down_e(act(up_e x))``.
    """

    def run_expert(expert: int, x: torch.Tensor) -> torch.Tensor:
        bias = None if gate_bias_EF is None else gate_bias_EF[expert]
        gate = None if gate_EFD is None else F.linear(x, gate_EFD[expert], bias)
        up = F.linear(x, up_EFD[expert], None if up_bias_EF is None else up_bias_EF[expert])
        down = F.linear(activate(gate, up, activation), down_EDF[expert])
        return down if down_bias_ED is None else down + down_bias_ED[expert]

    return mix_experts(x_TD, routing, run_expert).to(x_TD.dtype)


def mix_experts(
    x_TD: torch.Tensor, routing: Routing, run_expert: Callable[[int, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The weighted sum of what ``run_expert`` makes of each expert's rows, (T, D), float32; see :func:`experts`."""
    slots_TKD = torch.zeros(*routing.expert_ids_TK.shape, x_TD.shape[1], dtype=torch.float32, device=x_TD.device)
    used_TK = routing.used_TK
    chosen_TK = routing.expert_ids_TK.masked_fill(~used_TK, -1)
    for expert in chosen_TK[used_TK].unique().tolist():
        rows, slots = (chosen_TK == expert).nonzero(as_tuple=True)
        x = x_TD[rows]
        if routing.weight_on_input:
            x = (x * routing.weights_TK[rows, slots, None]).to(x.dtype)
        slots_TKD[rows, slots] = run_expert(expert, x).float()
    weights_TK = used_TK.float() if routing.weight_on_input else routing.weights_TK.masked_fill(~used_TK, 0.0)
    out_TD = torch.zeros_like(slots_TKD[:, 0])
    for k in range(slots_TKD.shape[1]):
        out_TD = out_TD + weights_TK[:, k, None] * slots_TKD[:, k]
    if routing.identity_weights_T is not None:
        out_TD = out_TD + routing.identity_weights_T[:, None] * x_TD.float()
    return out_TD
